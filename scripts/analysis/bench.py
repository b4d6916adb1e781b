"""Speed and memory: a against TRL's GRPOTrainer, b each arm against `absorb`, c how the cost grows.

    python scripts/analysis/bench.py                       parts a, b and c on this machine's CPU
    python scripts/analysis/bench.py --only b --rounds 40  part b over more steps of each run
    python scripts/analysis/bench.py --no-measure --write docs/performance.md
                                                           the tables of out/bench.json, in the page

All parts are real runs of the organism's preset, in processes that stay up and take turns step by
step, the first step dropped: a ratio is of neighbours, so that a machine that is busy for a while
slows both sides. A repeat is a step, and every figure a median over repeats with its range. Times
are the loop's own `sec_*` (docs/metrics.md); CPU seconds of the same steps stand beside wall
seconds: they hardly depend on what else the machine does. `absorb` updates as `none2r` does and is
the reference of part b. Part c runs on bases with random weights, which seldom end a completion
before its limit; demonstrations give their groups variance. Part a needs TRL.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, Literal

import tyro
from scripts.analysis.bench_turns import take_turns
from scripts.view.output import table

from vgrout.config import PRESETS
from vgrout.core import UserError, run_main
from vgrout.run.provenance import now, provenance
from vgrout.run.records import load_metrics

TIMED = ("sample", "grade", "score", "update")
PHASES = (*TIMED, "refresh", "other")
BASE, OURS, THEIRS = "data/organism/base", "vGROUT none2r", "TRL GRPOTrainer"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_TRL = "part a needs TRL: run `uv run --group bench just bench`, or leave it out with --only b c"
ARMS = (
    "absorb",
    "none2r",
    "routeV",
    "routeA",
    "routeL",
    "routeQ",
    "absorbQ",
    "placebo",
    "oracle",
)
Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Args:
    """Measure the parts, write out/bench.json, print the tables."""

    only: tuple[Literal["a", "b", "c"], ...] = ()  # parts; () for all, a where TRL is installed
    rounds: int = 10  # steps of every run
    arms: tuple[str, ...] = ARMS  # of part b; the first is the reference
    threads: int = 1  # torch threads of every process
    quick: bool = False  # one round at tiny size, two arms: does the script run?
    measure: Annotated[bool, tyro.conf.arg(help="--no-measure: the tables of --out")] = True
    out: Path = Path("out/bench.json")
    write: Path | None = None  # a page whose block between the bench marks becomes the tables


# ── runs that take turns ─────────────────────────────────────────────────────────────────────────


def command(arm: str, folder: Path, args: Args, *flags: str) -> list[str]:
    """A run that never reaches its end: demonstrations and a gate at work in every step."""
    steps = str(args.rounds + 2)
    options = {
        "--intervention": arm,
        "--out-dir": str(folder),
        "--threads": str(args.threads),
        "--steps": steps,
        "--teacher-until": steps,
        "--eval-every": "0",
        "--save-every": "0",
        "--final-draws": "4",
        "--quarantine-first": "0",
        "--refresh-every": str(min(4, args.rounds)),
    }
    small = ["--num-prompts", "2", "--max-completion-length", "64"] if args.quick else []
    words = [word for pair in options.items() for word in pair]
    return ["scripts/analysis/bench_turns.py", "organism", *words, *small, *flags]


def spent(row: dict[str, Any], refresh: float) -> dict[str, float]:
    """A step's seconds by phase, its own refresh replaced by `refresh`, the mean over steps."""
    took = {phase: row[f"sec_{phase}"] for phase in TIMED}
    refreshed = row.get("sec_refresh") or 0.0
    took |= {
        "refresh": refresh,
        "other": row["sec_step"] - sum(took.values()) - refreshed,
    }
    return took | {
        "step": sum(took.values()),
        "refreshed": refreshed,
        "tokens": row["n_students"] * row["completion_length"],
        "tokens_per_second": row["tokens_per_second"],
        "groups_skipped": row["groups_skipped"],
    }


def phases(run: Path) -> Steps:
    """A run's steps but the first. A refresh is spread over the preset's cadence."""
    rows, every = load_metrics(run)[1:], PRESETS["organism"].score.refresh_every
    refreshes = [row["sec_refresh"] for row in rows if row.get("sec_refresh")]
    return [spent(row, mean(refreshes) / every if refreshes else 0.0) for row in rows]


def measured(runs: dict[str, tuple[str, list[str]]], args: Args, folder: Path) -> dict[str, Any]:
    """name → (arm, flags) as runs that take turns: resident size, CPU seconds, steps by phase."""
    commands = {}
    for i, (name, (arm, flags)) in enumerate(runs.items()):
        commands[name] = command(arm, folder / str(i), args, *flags)
    resident, cpu = take_turns(commands, args.rounds, args.threads)
    steps = {name: phases(folder / str(i)) for i, name in enumerate(runs)}
    for name, own in steps.items():
        for i, row in enumerate(own):
            as_it_was = row["step"] - row["refresh"] + row["refreshed"]
            cpu[name][i] *= row["step"] / as_it_was  # refreshes spread, as in `step`
    return {"resident": resident, "cpu": cpu, "runs": steps}


def against_trl(args: Args, folder: Path) -> dict[str, Any]:
    """The same steps without demonstrations by both.

    `update` is all that is neither sampling nor grading.
    """
    log_file = folder / "trl.json"
    trl = [str(log_file), str(args.rounds + 2), str(args.threads)]
    commands = {
        OURS: command("none2r", folder / "ours", args, "--teacher-pool", ""),
        THEIRS: ["scripts/analysis/bench_trl.py", *trl],
    }
    resident, cpu = take_turns(commands, args.rounds, args.threads)
    log, theirs = json.loads(log_file.read_text()), []
    for i in range(1, args.rounds + 1):
        row = {key: values[i] for key, values in log.items()}
        theirs.append(row | {"tokens_per_second": row["tokens"] / row["sample"]})
    runs = {OURS: phases(folder / "ours"), THEIRS: theirs}
    for row in (row for own in runs.values() for row in own):
        row["update"] = row["step"] - row["sample"] - row["grade"]
    versions = {name: importlib.metadata.version(name) for name in ("trl", "peft", "accelerate")}
    return {"versions": versions, "resident": resident, "cpu": cpu, "runs": runs}


def by_arm(args: Args, folder: Path) -> dict[str, Any]:
    names = ("absorb", "routeV") if args.quick else args.arms
    return measured({name: (name, []) for name in names}, args, folder)


def random_base(folder: Path, factor: int) -> float:
    """The organism's architecture with all widths times `factor`; returns its Linears' weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(BASE)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        setattr(config, key, factor * getattr(config, key))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    return float(sum(m.weight.numel() for m in linears))


def growth(args: Args, folder: Path) -> dict[str, Any]:
    """Runs that have more of one thing than a run of their arm, and by which factor."""
    small, large = folder / "small", folder / "large"
    weights = [random_base(base, factor) for base, factor in ((small, 1), (large, 2))]
    size = {
        "--model": str(small),
        "--num-generations": "8",
        "--max-completion-length": "48",
        "--pair-modes": "run_tests",
        "--refresh-every": "1",
    }
    pairs = {"--pair-modes": "run_tests sentinel stdout_marker file_marker"}
    step = ["sample", "score", "update"]
    cases = {  # name → arm, what it changes, factor, phases
        "group size × 2": ("routeV", {"--num-generations": "16"}, 2, step),
        "completion length × 2": (
            "routeV",
            {"--max-completion-length": "96"},
            2,
            step,
        ),
        "model": ("routeV", {"--model": str(large)}, weights[1] / weights[0], step),
        "pairs × 4, v_grad": ("routeV", pairs, 4, ["refresh"]),
        "pairs × 4, likelihood ratio": ("routeL", pairs, 4, ["refresh"]),
    }
    runs, grown = {}, {}
    for name, (arm, changes, factor, timed) in cases.items():
        for key, options in ((arm, size), (name, size | changes)):
            runs[key] = (
                arm,
                [word for pair in options.items() for word in " ".join(pair).split()],
            )
        grown[name] = {"arm": arm, "factor": factor, "phases": timed}
    return {"grown": grown} | measured(runs, args, folder)


def exponent(before: float, after: float, factor: float) -> float:
    """log(t2 / t1) / log(factor): 1 where the time grows as the work does."""
    return math.log(after / before) / math.log(factor)


def machine(threads: int) -> dict[str, Any]:
    """CPU, cores, versions and load: what a figure depends on."""
    cpu, source = Path("/proc/cpuinfo"), provenance()
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        **{key: source[key] for key in ("commit", "dirty", "argv", "versions")},
    }


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float], digits: int = 2) -> str:
    """`median [low, high]` of the repeats; a bare value where there is one."""
    text = f"{median(values):.{digits}f}"
    low, high = (f"{f(values):.{digits}f}" for f in (min, max))
    return text if len(values) == 1 else f"{text} [{low}, {high}]"


def ratios(values: list[float], reference: list[float]) -> list[float]:
    """Each repeat's ratio to the reference of the same repeat."""
    return [a / b for a, b in zip(values, reference, strict=True)]


def column(steps: Steps, key: str) -> list[float]:
    return [row[key] for row in steps]


def table_a(found: dict[str, Any]) -> str:
    runs, cpu, size = found["runs"], found["cpu"], found["resident"]
    labels = {
        "sample": "sampling, s",
        "grade": "grading, s",
        "update": "update and the rest, s",
        "step": "**step, s**",
        "tokens": "tokens sampled",
        "tokens_per_second": "tokens/s while sampling",
    }
    sides = {label: [column(runs[s], key) for s in (OURS, THEIRS)] for key, label in labels.items()}
    sides["**CPU of the trainer, s**"] = [cpu[OURS], cpu[THEIRS]]
    sides["peak RSS, GiB"] = [[size[OURS]], [size[THEIRS]]]
    rows = []
    for label, (ours, theirs) in sides.items():
        digits = 0 if label.startswith("tokens") else 2
        pair = [spread(ours, digits), spread(theirs, digits)]
        rows.append([label, *pair, spread(ratios(theirs, ours))])
    skipped = mean(column(runs[OURS], "groups_skipped"))
    note = f"vGROUT skips groups without variance, {skipped:.1f} of 6 here, which TRL trains on."
    headers = ["a step of 6 × 8 rollouts", OURS, THEIRS, "TRL / vGROUT"]
    return f"{table(rows, headers, 'github')}\n\n{listed(found['versions'])}. {note}"


def table_b(found: dict[str, Any]) -> str:
    runs, cpu, rows = found["runs"], found["cpu"], []
    reference = next(iter(runs))
    for name, own in runs.items():
        times = ratios(column(own, "step"), column(runs[reference], "step"))
        row = [
            f"`{name}`",
            *(f"{median(column(own, phase)):.2f}" for phase in PHASES),
        ]
        row += [
            spread(column(own, "step")),
            spread(times),
            f"{mean(cpu[name]):.2f}",
        ]
        row += [f"{mean(cpu[name]) / mean(cpu[reference]):.2f}"]
        row += [f"{median(column(own, key)):.0f}" for key in ("tokens", "tokens_per_second")]
        rows.append([*row, f"{found['resident'][name]:.2f}"])
    times = f"× `{reference}`"
    headers = [
        "arm",
        *PHASES,
        "step, s",
        times,
        "CPU, s",
        times,
        "tokens",
        "tokens/s",
        "RSS, GiB",
    ]
    return table(rows, headers, "github")


def table_c(found: dict[str, Any]) -> str:
    runs, rows = found["runs"], []
    for name, case in found["grown"].items():
        for phase in case["phases"]:
            before, after = (
                column(runs[case["arm"]], phase),
                column(runs[name], phase),
            )
            grows = [exponent(a, b, case["factor"]) for a, b in zip(before, after, strict=True)]
            times = f"{case['factor']:.1f}"
            row = [
                name,
                times,
                phase,
                spread(before, 3),
                spread(after, 3),
                spread(grows),
            ]
            rows.append(row)
    headers = ["what grows", "×", "phase", "s before", "s after", "exponent"]
    return table(rows, headers, "github")


PARTS = {
    "a": ("Against TRL", against_trl, table_a),
    "b": (
        "Each arm against `absorb` (seconds of a step by phase)",
        by_arm,
        table_b,
    ),
    "c": ("Growth", growth, table_c),
}


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def render(found: dict[str, Any]) -> str:
    """Every part as a section; one without figures says TODO."""
    sections = []
    for part, (title, _, tabulated) in PARTS.items():
        body = "TODO: not measured yet."
        if part in found:
            m = found[part]["machine"]
            versions = {name: m["versions"][name] for name in ("python", "torch", "transformers")}
            where = f"{m['cpu']}, {m['cores']} cores, {m['threads']} torch threads"
            commit = f"commit {m['commit'][:12]}{' with changes' if m['dirty'] else ''}"
            made = f"{found[part]['made']}, {commit}, load {m['load']} at its start"
            body = f"{where}; {listed(versions)}; {made}.\n\n{tabulated(found[part])}"
        sections.append(f"### {title}\n\n{body}")
    return "\n\n".join(sections)


def replaced(page: str, text: str) -> str:
    """The page with the block between the marks replaced."""
    parts = re.fullmatch(rf"(.*{BEGIN}\n).*(\n{END}.*)", page, re.DOTALL)
    if not parts or page.count(BEGIN) != 1 or page.count(END) != 1:
        raise UserError(f"--write: the page needs one line {BEGIN} and, after it, one {END}")
    return parts[1] + text + parts[2]


def chosen(args: Args) -> tuple[str, ...]:
    trl = importlib.util.find_spec("trl") is not None
    if "a" in args.only and not trl:
        raise UserError(NO_TRL)
    if args.only:
        return args.only
    if not (trl or args.quick):
        print(NO_TRL)
    return ("a", "b", "c") if trl and not args.quick else ("b", "c")


def main(args: Args) -> None:
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in chosen(args) if args.measure else ():
        print(f"part {part} …", flush=True)
        head = {"machine": machine(args.threads), "made": now()}
        with tempfile.TemporaryDirectory() as folder:
            found[part] = head | PARTS[part][1](args, Path(folder))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))
    if not found:
        remedy = "run `just bench` without --no-measure"
        raise UserError(f"nothing to show: {args.out} does not exist; {remedy}")
    print(render(found))
    if args.write:
        args.write.write_text(replaced(args.write.read_text(), render(found)))


if __name__ == "__main__":
    run_main(main, tyro.cli(Args))
