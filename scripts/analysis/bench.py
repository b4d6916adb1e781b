"""Speed and memory: a against TRL's GRPOTrainer, b each arm against plain GRPO, c how the cost grows, d Qwen3-4B on one GPU.

    python scripts/analysis/bench.py                       parts a, b and c on this machine's CPU (at most 15 minutes on two quiet cores)
    python scripts/analysis/bench.py --only b --rounds 40  part b over more steps of each run
    python scripts/analysis/bench.py --gpu                 part d on a CUDA device; --gpu-config tiny --only d runs the same code on a CPU
    python scripts/analysis/bench.py --no-measure --write docs/performance.md         the tables of out/bench.json into the page

What is compared takes turns, A B A B …, and a ratio is of neighbours, so that a machine that is busy for a while slows both sides.
Every figure is a median over repeats with its range. Parts a and b are real runs, in processes that stay up and take turns step by
step, the first step dropped; a repeat is a step, and times are the loop's own `sec_*` (docs/metrics.md). CPU seconds of the same steps
stand beside wall seconds: they hardly depend on what else the machine does. Part a needs TRL.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, Literal

import tyro
from scripts.analysis.bench_turns import take_turns
from tabulate import tabulate

from vgrout.config import PRESETS
from vgrout.core import UserError, run_main
from vgrout.run.provenance import now, provenance
from vgrout.run.records import load_metrics

PHASES = ("sample", "grade", "score", "update", "refresh", "other")
PADDING = ("padding", "padding_by_prompt", "padding_by_length")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_TRL = "part a needs TRL: run `uv run --group bench just bench`, or leave it out with --only b c"
Part = Literal["a", "b", "c", "d"]


@dataclass(frozen=True)
class Args:
    """Measure the parts, write out/bench.json, print the tables."""

    only: tuple[
        Part, ...
    ] = ()  # parts; () for a (where TRL is installed), b and c, with --gpu for d
    repeats: int = 4  # of parts c and d
    rounds: int = 10  # steps of every run in parts a and b
    arms: tuple[str, ...] = (
        "none2r",
        "absorb",
        "routeV",
        "routeA",
        "routeL",
        "routeQ",
        "placebo",
        "oracle",
        "filterV",
        "advmodV",
    )
    threads: int = 1  # torch threads of every process
    gpu: bool = False  # part d on a CUDA device
    gpu_config: Literal["qwen3-4b", "tiny"] = "qwen3-4b"
    workloads: tuple[Literal["8x8", "16x16", "worst"], ...] = ("8x8", "16x16", "worst")
    quick: bool = False  # one repeat at tiny size, without TRL: does the script run?
    measure: Annotated[bool, tyro.conf.arg(help="--no-measure: the tables of what --out holds")] = (
        True
    )
    out: Path = Path("out/bench.json")
    write: Path | None = (
        None  # a page whose block between the bench marks is replaced by the tables
    )


def main(args: Args) -> None:
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in parts(args) if args.measure else ():
        print(f"part {part} …", flush=True)
        found[part] = {"machine": machine(args.threads), "made": now(), **measure(part, args)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))
    if not found:
        raise UserError(
            f"nothing to show: {args.out} does not exist; run `just bench` without --no-measure"
        )
    print(render(found))
    if args.write:
        args.write.write_text(
            replaced(
                args.write.read_text(),
                render({k: v for k, v in found.items() if k != "d" or v["machine"]["gpu"]}),
            )
        )


def parts(args: Args) -> tuple[str, ...]:
    trl = importlib.util.find_spec("trl") is not None
    if "a" in args.only and not trl:
        raise UserError(NO_TRL)
    if args.only or args.gpu:
        return args.only or ("d",)
    if not (trl or args.quick):
        print(NO_TRL)
    return ("b", "c", "d") if args.quick else ("a", "b", "c") if trl else ("b", "c")


def measure(part: str, args: Args) -> dict[str, Any]:
    if part == "a":
        return against_trl(args)
    if part == "b":
        return arms(args)
    return synthetic(part, args)


# ── a and b: real runs that take turns ───────────────────────────────────────────────────────────────────────────


def command(arm: str, folder: Path, args: Args, rounds: int, *flags: str) -> list[str]:
    """A run of the organism that never reaches its end: no evaluation but the base's; demonstrations and a gate at work in every step."""
    steps = str(rounds + 2)
    small = ("--num-prompts", "2", "--max-completion-length", "64") if args.quick else ()
    return ["scripts/analysis/bench_turns.py", "organism", "--intervention", arm, "--out-dir", str(folder / arm), "--threads", str(args.threads),
            "--steps", steps, "--teacher-until", steps, "--eval-every", "0", "--save-every", "0", "--final-draws", "4",
            "--quarantine-first", "0", "--refresh-every", str(min(4, rounds)), *small, *flags]  # fmt: skip


def phases(run: Path) -> list[dict[str, float]]:
    """A run's steps but the first as seconds by phase, tokens and speed. A refresh is measured more often than the preset has it, and what
    it took is spread over the preset's cadence."""
    rows, every = load_metrics(run)[1:], PRESETS["organism"].score.refresh_every
    refreshes = [r["sec_refresh"] for r in rows if r.get("sec_refresh")]
    return [spent(r, mean(refreshes) / every if refreshes else 0.0) for r in rows]


def spent(row: dict[str, Any], refresh: float) -> dict[str, float]:
    took, refreshed = {p: row[f"sec_{p}"] for p in PHASES[:4]}, row.get("sec_refresh") or 0.0
    other = row["sec_step"] - sum(took.values()) - refreshed
    took |= {"refresh": refresh, "other": other}
    return took | {"step": sum(took.values()), "refreshed": refreshed, "tokens": row["n_students"] * row["completion_length"],
                   "tokens_per_second": row["tokens_per_second"], "groups_skipped": row["groups_skipped"]}  # fmt: skip


def arms(args: Args) -> dict[str, Any]:
    names, rounds = (args.arms, args.rounds) if not args.quick else (("routeV",), 1)
    with tempfile.TemporaryDirectory() as folder:
        resident, cpu = take_turns(
            {name: command(name, Path(folder), args, rounds) for name in names},
            rounds,
            args.threads,
        )
        runs = {name: phases(Path(folder, name)) for name in names}
    usual = lambda row: row["step"] / (row["step"] - row["refresh"] + row["refreshed"])  # noqa: E731  of a step's seconds, refreshes spread
    cpu = {
        name: [c * usual(row) for c, row in zip(cpu[name], runs[name], strict=True)]
        for name in names
    }
    return {"resident": resident, "cpu": cpu, "runs": runs}


def against_trl(args: Args) -> dict[str, Any]:
    """The same steps without demonstrations by both; `update` is all that is neither sampling nor grading."""
    ours, theirs = "vGROUT none2r", "TRL GRPOTrainer"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trl = [
            "scripts/analysis/bench_trl.py",
            str(folder / "trl.json"),
            "--steps",
            str(args.rounds + 2),
            "--threads",
            str(args.threads),
        ]
        commands = {
            ours: command("none2r", folder, args, args.rounds, "--teacher-pool", ""),
            theirs: trl,
        }
        resident, cpu = take_turns(commands, args.rounds, args.threads)
        runs = {ours: phases(folder / "none2r")}
        log = json.loads((folder / "trl.json").read_text())
    steps = [dict(zip(("sample", "grade", "step", "tokens"), row))
             for row in zip(*(log[k][1:] for k in ("sec_sample", "sec_grade", "sec_step", "tokens")))]  # fmt: skip
    runs[theirs] = [row | {"tokens_per_second": row["tokens"] / row["sample"]} for row in steps]
    for row in (r for own in runs.values() for r in own):
        row["update"] = row["step"] - row["sample"] - row["grade"]
    versions = {name: importlib.metadata.version(name) for name in ("trl", "peft", "accelerate")}
    return {"versions": versions, "resident": resident, "cpu": cpu, "runs": runs}


# ── c and d: synthetic work in this process ──────────────────────────────────────────────────────────────────────


def synthetic(part: str, args: Args) -> dict[str, Any]:
    import torch
    from scripts.analysis import bench_synthetic as work

    torch.set_num_threads(args.threads)
    config, repeats = PRESETS["organism"], 1 if args.quick else args.repeats
    if part == "d":
        if args.gpu and not torch.cuda.is_available():
            raise UserError(
                "--gpu: torch sees no CUDA GPU here; leave it out, or exercise the code with --only d --gpu-config tiny"
            )
        name, workloads = (
            ("tiny", args.workloads[:1]) if args.quick else (args.gpu_config, args.workloads)
        )
        return {
            "config": name,
            "rows": work.large("cuda" if args.gpu else "cpu", name, workloads, repeats),
        }
    if args.quick:
        small = replace(config, grpo=replace(config.grpo, num_prompts=1, max_completion_length=32))
        return {
            "growth": work.growth(1, work.Size(1, 3, 8, 8, 2, 8, 8), config),
            "budgets": work.token_budgets(1, (64, 8192), small),
        }
    return {"growth": work.growth(repeats, work.Size(6, 8, 48, 64), config),
            "budgets": work.token_budgets(repeats, (1024, 2048, 4096, 8192, 16384), config)}  # fmt: skip


def machine(threads: int) -> dict[str, Any]:
    """CPU, cores, GPU, versions and load: what a figure depends on."""
    import torch

    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    source = provenance()
    return {
        "cpu": model.group(1) if model else platform.processor(), "cores": len(os.sched_getaffinity(0)), "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "", "load": round(os.getloadavg()[0], 1),
        **{k: source[k] for k in ("commit", "dirty", "argv", "versions")},
    }  # fmt: skip


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float], digits: int = 2) -> str:
    """`median [low, high]` of the repeats; a bare value where there is one."""
    text = f"{median(values):.{digits}f}"
    return (
        text if len(values) == 1 else f"{text} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
    )


def of(figure: dict[str, float], digits: int = 2) -> str:
    return spread(
        [figure["median"], figure["low"], figure["high"]][: 1 if figure["n"] == 1 else 3], digits
    )


def ratios(
    runs: dict[str, list[dict[str, float]]], key: str, name: str, reference: str
) -> list[float]:
    """Each repeat's ratio to the reference of the same repeat."""
    return [a[key] / b[key] for a, b in zip(runs[name], runs[reference], strict=True)]


def versions_of(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def table_a(found: dict[str, Any]) -> str:
    runs, (ours, theirs) = found["runs"], found["runs"]
    rows = [[label, *(spread([r[key] for r in runs[name]], d) for name in runs), spread(ratios(runs, key, theirs, ours))]
            for label, key, d in (("sampling, s", "sample", 2), ("grading, s", "grade", 2), ("update and the rest, s", "update", 2),
                                  ("**step, s**", "step", 2), ("tokens sampled", "tokens", 0),
                                  ("tokens/s while sampling", "tokens_per_second", 0))]  # fmt: skip
    cpu, size = found["cpu"], found["resident"]
    paired = [a / b for a, b in zip(cpu[theirs], cpu[ours], strict=True)]
    rows.append(
        ["**CPU of the trainer, s**", spread(cpu[ours]), spread(cpu[theirs]), spread(paired)]
    )
    rows.append(
        [
            "peak RSS, GiB",
            f"{size[ours]:.2f}",
            f"{size[theirs]:.2f}",
            f"{size[theirs] / size[ours]:.2f}",
        ]
    )
    skipped = mean(r["groups_skipped"] for r in runs[ours])
    note = f"{versions_of(found['versions'])}. vGROUT skips groups without variance, {skipped:.1f} of 6 here, which TRL trains on."
    return f"{table(rows, ['a step of 6 × 8 rollouts', ours, theirs, 'TRL / vGROUT'])}\n\n{note}"


def table_b(found: dict[str, Any]) -> str:
    runs = found["runs"]
    reference = "none2r" if "none2r" in runs else next(iter(runs))
    middle = lambda own, key: median(r[key] for r in own)  # noqa: E731
    cpu = {name: mean(values) for name, values in found["cpu"].items()}
    rows = [[f"`{name}`", *(f"{middle(own, p):.2f}" for p in PHASES), spread([r["step"] for r in own]),
             spread(ratios(runs, "step", name, reference)), f"{cpu[name]:.2f}", f"{cpu[name] / cpu[reference]:.2f}",
             f"{middle(own, 'tokens'):.0f}", f"{middle(own, 'tokens_per_second'):.0f}", f"{found['resident'][name]:.2f}"]
            for name, own in runs.items()]  # fmt: skip
    return table(
        rows,
        [
            "arm",
            *PHASES,
            "step, s",
            f"× `{reference}`",
            "CPU, s",
            f"× `{reference}`",
            "tokens",
            "tokens/s",
            "RSS, GiB",
        ],
    )


def table_c(found: dict[str, Any]) -> str:
    rows = [
        [r["what"], r["phase"], of(r["before"], 3), of(r["after"], 3), of(r["exponent"])]
        for r in found["growth"]
    ]
    share = lambda x: f"{100 * x:.0f} %"  # noqa: E731
    budgets = [[r["budget"], r["micro_batches"], *(share(r[k]) for k in PADDING), of(r["update"]), of(r["update_ratio"]),
                of(r["score"]), of(r["score_ratio"])] for r in found["budgets"]]  # fmt: skip
    last = found["budgets"][-1]["budget"]
    return "\n\n".join([
        table(rows, ["what grows", "phase", "s before", "s after", "exponent"]),
        table(budgets, ["token budget", "micro-batches", "padding, organism", "benchmark-like, by prompt", "by length",
                        "update, s", f"× {last}", "scoring, s", f"× {last}"]),
    ])  # fmt: skip


def table_d(found: dict[str, Any]) -> str:
    rows = []
    for r in found["rows"]:
        new = r["prompts"] * r["generations"] * r["completion"]
        speed = f"{new / r['seconds']['median']:.0f}" if r["phase"] == "sample" else ""
        share = f"{100 * r['bound'] / r['seconds']['median']:.0f} %" if r["bound"] else "–"
        bound = f"{r['bound']:.2f}" if r["bound"] else "–"
        rows.append([r["workload"], f"`{r['arm']}`", r["phase"], of(r["seconds"]), speed, bound, share, f"{r['peak_gib']:.1f}",
                     f"{r['reserved_gib']:.1f}"])  # fmt: skip
    return f"Configuration: {found['config']}.\n\n" + table(
        rows,
        [
            "workload",
            "arm",
            "phase",
            "s",
            "tokens/s",
            "bound, s",
            "of the bound",
            "peak, GiB",
            "reserved, GiB",
        ],
    )


TITLES = {
    "a": "Against TRL", "b": "Each arm against plain GRPO (seconds of a step by phase)", "c": "Growth, padding and token budget",
    "d": "Qwen3-4B on one GPU",
}  # fmt: skip
TABLES = {"a": table_a, "b": table_b, "c": table_c, "d": table_d}


def table(rows: list[list[Any]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def render(found: dict[str, Any]) -> str:
    """Every part as a section; one without figures says TODO."""
    sections = []
    for part, title in TITLES.items():
        body = (
            "TODO: not measured yet."
            if part != "d"
            else "TODO: not measured on a GPU yet (`python scripts/analysis/bench.py --gpu`)."
        )
        if part in found:
            m = found[part]["machine"]
            device = (
                m["gpu"]
                if part == "d" and m["gpu"]
                else f"{m['cpu']}, {m['cores']} cores, {m['threads']} torch threads"
            )
            versions = versions_of(
                {k: m["versions"][k] for k in ("python", "torch", "transformers")}
            )
            body = f"{device}; {versions}; {found[part]['made']}, commit {m['commit'][:12]}{' with changes' if m['dirty'] else ''}, " \
                   f"load {m['load']} at its start.\n\n{TABLES[part](found[part])}"  # fmt: skip
        sections.append(f"### {title}\n\n{body}")
    return "\n\n".join(sections)


def replaced(page: str, text: str) -> str:
    """The page with the block between the marks replaced."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"--write: the page needs one line {BEGIN} and, after it, one {END}")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    run_main(main, tyro.cli(Args))
