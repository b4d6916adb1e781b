"""Speed and memory: a against TRL's GRPOTrainer, b each arm against `absorb`.

All sides are short real runs of the organism's preset, each in a process of its own. In every round
each side runs once, one after the other, and a ratio is of one round, so that a machine that is
busy for a while slows both. A round's figure is the median over a run's steps but the first;
tables show the median over rounds with its range. Times are the loop's own `sec_*`
(docs/reference/metrics.md). `absorb` updates as `none2r` does and is the reference of part b. Part
a needs TRL.

Run: python -m scripts.analysis.bench [--only b] [--rounds 5]
     python -m scripts.analysis.bench --no-measure --write docs/reference/performance.md
                                          (the tables of out/bench.json, in the page)
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, Literal

import tyro
from scripts.view.output import table

from vgrout.config import PRESETS
from vgrout.core import UserError, run_main
from vgrout.run.provenance import now, provenance
from vgrout.run.records import load_metrics

TIMED = ("sample", "grade", "score", "update")
PHASES = (*TIMED, "refresh", "other")
OURS, THEIRS = "vGROUT none2r", "TRL GRPOTrainer"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_TRL = "part a needs TRL: run `uv run --group bench just bench`, or leave it out with --only b"
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
TITLES = {"a": "Against TRL", "b": "Each arm against `absorb` (seconds of a step by phase)"}
ROWS_A = {
    "sample": "sampling, s",
    "grade": "grading, s",
    "update": "update and the rest, s",
    "step": "**step, s**",
    "tokens": "tokens sampled",
    "tokens_per_second": "tokens/s while sampling",
    "resident": "peak RSS, GiB",
}
Row = dict[str, float]


@dataclass(frozen=True)
class Args:
    """Measure the parts, write out/bench.json, print the tables."""

    only: tuple[Literal["a", "b"], ...] = ()  # parts; () for both, a where TRL is installed
    rounds: int = 5
    steps: int = 5  # timed steps of a run
    arms: tuple[str, ...] = ARMS  # of part b; the first is the reference
    threads: int = 1  # torch threads of every process
    measure: Annotated[bool, tyro.conf.arg(help="--no-measure: the tables of --out")] = True
    out: Path = Path("out/bench.json")
    write: Path | None = None  # a page whose block between the bench marks becomes the tables


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def resident(command: list[str], threads: int) -> float:
    """Run a Python command to its end; returns its peak resident size in GiB."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        how = {"env": environment, "stdout": log, "stderr": log}
        process = subprocess.Popen([sys.executable, *command], **how)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
    return usage.ru_maxrss / 2**20


def spent(row: dict[str, Any], refresh: float) -> Row:
    """A step's seconds by phase, its own refresh replaced by `refresh`, the mean over steps."""
    took = {phase: row[f"sec_{phase}"] for phase in TIMED}
    own = row.get("sec_refresh") or 0.0
    took |= {"refresh": refresh, "other": row["sec_step"] - sum(took.values()) - own}
    counts = ("tokens_per_second", "groups_skipped")
    tokens = row["n_students"] * row["completion_length"]
    return took | {"step": sum(took.values()), "tokens": tokens} | {key: row[key] for key in counts}


def medians(rows: list[Row]) -> Row:
    return {key: median(row[key] for row in rows) for key in rows[0]}


def one_run(arm: str, args: Args, *flags: str) -> Row:
    """A run with demonstrations and a gate at work in every step: a step's medians."""
    steps = str(args.steps + 1)
    options = {
        "--intervention": arm,
        "--threads": str(args.threads),
        "--steps": steps,
        "--teacher-until": steps,
        "--quarantine-first": "0",
        "--eval-every": "0",
        "--save-every": "0",
        "--final-draws": "4",
    }
    words = [word for pair in options.items() for word in pair]
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "vgrout.train", "organism", *words, "--out-dir", folder, *flags]
        size, rows = resident(command, args.threads), load_metrics(folder)
    every = PRESETS["organism"].score.refresh_every
    refresh = rows[0].get("sec_refresh") or 0.0
    return medians([spent(row, refresh / every) for row in rows[1:]]) | {"resident": size}


def trl_run(args: Args) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trl.json"
        words = [str(log), str(args.steps + 1), str(args.threads)]
        size = resident(["-m", "scripts.analysis.bench_trl", *words], args.threads)
        columns = json.loads(log.read_text())
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())][1:]
    for row in rows:
        row["tokens_per_second"] = row["tokens"] / row["sample"]
    return medians(rows) | {"resident": size}


def against_trl(args: Args) -> dict[str, Row]:
    """The same steps without demonstrations by both; `update` is all but sampling and grading."""
    sides = {OURS: one_run("none2r", args, "--teacher-pool", ""), THEIRS: trl_run(args)}
    for row in sides.values():
        row["update"] = row["step"] - row["sample"] - row["grade"]
    return sides


def by_arm(args: Args) -> dict[str, Row]:
    return {arm: one_run(arm, args) for arm in args.arms}


def machine(threads: int) -> dict[str, Any]:
    """CPU, cores, versions and load: what a figure depends on."""
    cpu, source = Path("/proc/cpuinfo"), provenance()
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "made": now(),
    } | {key: source[key] for key in ("commit", "dirty", "versions")}


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float], digits: int = 2) -> str:
    """`median [low, high]` over rounds; a bare value where there is one."""
    text = f"{median(values):.{digits}f}"
    low, high = (f"{f(values):.{digits}f}" for f in (min, max))
    return text if len(values) == 1 else f"{text} [{low}, {high}]"


def column(rounds: list[dict[str, Row]], side: str, key: str) -> list[float]:
    return [sides[side][key] for sides in rounds]


def ratios(rounds: list[dict[str, Row]], side: str, reference: str, key: str) -> list[float]:
    """Of each round by itself."""
    return [sides[side][key] / sides[reference][key] for sides in rounds]


def table_a(rounds: list[dict[str, Row]]) -> str:
    rows = []
    for key, label in ROWS_A.items():
        digits = 0 if label.startswith("tokens") else 2
        pair = [spread(column(rounds, side, key), digits) for side in (OURS, THEIRS)]
        rows.append([label, *pair, spread(ratios(rounds, THEIRS, OURS, key))])
    skipped = mean(column(rounds, OURS, "groups_skipped"))
    note = f"vGROUT skips groups without variance, {skipped:.1f} of 6 here, which TRL trains on."
    headers = ["a step of 6 × 8 rollouts", OURS, THEIRS, "TRL / vGROUT"]
    return f"{table(rows, headers, 'github')}\n\n{note}"


def table_b(rounds: list[dict[str, Row]]) -> str:
    reference, rows = next(iter(rounds[0])), []
    for arm in rounds[0]:
        row = [f"`{arm}`", *(f"{median(column(rounds, arm, phase)):.2f}" for phase in PHASES)]
        row += [
            spread(column(rounds, arm, "step")),
            spread(ratios(rounds, arm, reference, "step")),
        ]
        row += [
            f"{median(column(rounds, arm, key)):.0f}" for key in ("tokens", "tokens_per_second")
        ]
        rows.append([*row, f"{max(column(rounds, arm, 'resident')):.2f}"])
    rest = ["step, s", f"× `{reference}`", "tokens", "tokens/s", "RSS, GiB"]
    return table(rows, ["arm", *PHASES, *rest], "github")


MEASURED = {"a": against_trl, "b": by_arm}
TABLES = {"a": table_a, "b": table_b}


def render(found: dict[str, Any]) -> str:
    """Every part as a section; one without figures says TODO."""
    sections = []
    for part, title in TITLES.items():
        body = "TODO: not measured yet."
        if part in found:
            m = found[part]["machine"]
            versions = ", ".join(f"{k} {m['versions'][k]}" for k in ("python", "torch"))
            where = f"{m['cpu']}, {m['cores']} cores, {m['threads']} torch threads; {versions}"
            commit = f"commit {m['commit'][:12]}{' with changes' if m['dirty'] else ''}"
            made = f"{m['made']}, {commit}, load {m['load']} at its start"
            body = f"{where}; {made}.\n\n{TABLES[part](found[part]['rounds'])}"
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
    if not (args.only or trl):
        print(NO_TRL)
    return args.only or (("a", "b") if trl else ("b",))


def main(args: Args) -> None:
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in chosen(args) if args.measure else ():
        print(f"part {part} …", flush=True)
        head = machine(args.threads)
        rounds = [MEASURED[part](args) for _ in range(args.rounds)]
        found[part] = {"machine": head, "rounds": rounds}
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
