"""Speed: a against TRL's GRPOTrainer, b each arm against `absorb`.

All sides are short real runs of the organism's preset, each in a process of its own. In every
round each side runs once, one after the other, and a ratio is of one round, so that a machine
that is busy for a while slows both. A round's figure is the median over a run's steps but the
first; tables show the median over rounds with its range. Times are the loop's own `sec_*`
(docs/reference/metrics.md). `absorb` updates as `none2r` does and is the reference of part b.
Part a needs TRL.

Run: python -m scripts.analysis.bench [--only b] [--rounds 5]     (writes out/bench.json, prints it)
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from scripts.view.output import OUT, parser, table

from vgrout.config import PRESETS
from vgrout.core import UserError, at_least, run_main
from vgrout.run.provenance import now, provenance
from vgrout.run.records import load_metrics

TIMED = ("sample", "grade", "score", "update")
PHASES = (*TIMED, "refresh", "other")
COUNTED = ("tokens_per_second", "groups_skipped")
OURS, THEIRS = "vGROUT none2r", "TRL GRPOTrainer"
NO_TRL = "part a needs TRL: run `uv run --group bench just bench`, or leave it out with --only b"
ARMS = "absorb none2r routeV routeA routeL routeQ absorbQ placebo oracle".split()
TITLES = {
    "a": "Against TRL, a step of 6 × 8 rollouts",
    "b": "Each arm against `absorb`, a step by phase",
}
Row = dict[str, float]
Round = dict[str, Row]  # side → its figures; the first side is the reference


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def python(*words: str) -> None:
    """Run a Python program to its end; its last words where it fails."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=one_thread, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")


def spent(
    row: dict,
    refresh: float,
) -> Row:
    """A step's seconds by phase, its own refresh replaced by `refresh`, the mean over steps."""
    took = {phase: row[f"sec_{phase}"] for phase in TIMED}
    own = row.get("sec_refresh") or 0.0
    other = row["sec_step"] - sum(took.values()) - own
    took |= {"refresh": refresh, "other": other}
    tokens = row["n_students"] * row["completion_length"]
    counts = {key: row[key] for key in COUNTED}
    return took | {"step": sum(took.values()), "tokens": tokens} | counts


def medians(rows: list[Row]) -> Row:
    return {key: median(row[key] for row in rows) for key in rows[0]}


def one_run(arm: str, steps: int, *flags: str) -> Row:
    """A run with demonstrations and a gate at work in every step: a step's medians."""
    count = str(steps + 1)
    usual = f"organism --intervention {arm} --threads 1 --steps {count} --teacher-until {count} "
    usual += "--quarantine-first 0 --eval-every 0 --save-every 0 --final-draws 4"
    with tempfile.TemporaryDirectory() as folder:
        words = [*usual.split(), "--out-dir", folder, *flags]
        python("-m", "vgrout.train", *words)
        rows = load_metrics(folder)
    refresh = rows[0].get("sec_refresh") or 0.0
    refresh /= PRESETS["organism"].score.refresh_every
    return medians([spent(row, refresh) for row in rows[1:]])


def trl_run(steps: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trl.json"
        python("-m", "scripts.analysis.bench_trl", str(log), str(steps + 1))
        rows = json.loads(log.read_text())[1:]
    for row in rows:
        row["tokens_per_second"] = row["tokens"] / row["sample"]
    return medians(rows)


def against_trl(options: Namespace) -> Round:
    """The same steps without demonstrations by both; `update` is all but sampling and grading."""
    steps = options.steps
    sides = {
        OURS: one_run("none2r", steps, "--teacher-pool", ""),
        THEIRS: trl_run(steps),
    }
    for row in sides.values():
        row["update"] = row["step"] - row["sample"] - row["grade"]
    return sides


def by_arm(options: Namespace) -> Round:
    return {arm: one_run(arm, options.steps) for arm in options.arms}


def machine() -> dict:
    """CPU, cores, versions and load: what a figure depends on."""
    cpu, source = Path("/proc/cpuinfo"), provenance()
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "made": now(),
    } | {key: source[key] for key in ("commit", "dirty", "versions")}


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median [low, high]` over rounds; a bare value where there is one."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (median, min, max))
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def ratios(rounds: list[Round], side: str, key: str = "step") -> list[float]:
    """A side over the reference, of each round by itself."""
    reference = next(iter(rounds[0]))
    return [sides[side][key] / sides[reference][key] for sides in rounds]


def side_by_side(rounds: list[Round]) -> str:
    """A line for each side: what it has of the phases and counts, and its step's ratio."""
    known = (*PHASES, "tokens", *COUNTED)
    keys = [key for key in known if all(key in row for row in rounds[0].values())]
    rows = []
    for side in rounds[0]:
        own = {key: [sides[side][key] for sides in rounds] for key in ["step", *keys]}
        digits = {key: 0 if key.startswith("tokens") else 2 for key in keys}
        row = [f"{median(own[key]):.{digits[key]}f}" for key in keys]
        rows.append(
            [
                side,
                *row,
                spread(own["step"], 3),
                spread(ratios(rounds, side)),
            ]
        )
    return table(rows, ["", *keys, "step, s", "× the first"], "github")


def render(found: dict) -> str:
    """Every part as a section; one without figures says TODO."""
    sections = []
    for part, title in TITLES.items():
        body = "TODO: not measured yet."
        if part in found:
            at = found[part]["machine"]
            versions = ", ".join(f"{name} {at['versions'][name]}" for name in ("python", "torch"))
            commit = at["commit"][:12] + " with changes" * at["dirty"]
            where = f"{at['cpu']}, {at['cores']} cores, one torch thread; {versions}; {at['made']}"
            load = f"commit {commit}, load {at['load']} at its start"
            body = f"{where}, {load}.\n\n{side_by_side(found[part]['rounds'])}"
        sections.append(f"### {title}\n\n{body}")
    return "\n\n".join(sections)


MEASURED = {"a": against_trl, "b": by_arm}


def main(argv: list[str]) -> None:
    command = parser(__doc__)
    command.add_argument("--only", nargs="+", choices=MEASURED, help="parts (default: all)")
    command.add_argument("--rounds", type=at_least(1), default=5)
    command.add_argument("--steps", type=at_least(1), default=5, help="timed steps of a run")
    command.add_argument("--arms", nargs="+", default=ARMS, help="the first is the reference")
    command.add_argument("--out", type=Path, default=OUT / "bench.json")
    options = command.parse_args(argv)
    parts = options.only or [*MEASURED]
    if "a" in parts and importlib.util.find_spec("trl") is None:
        if options.only:
            raise UserError(NO_TRL)
        parts.remove("a")
        print(NO_TRL)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in parts:
        print(f"part {part} …", flush=True)
        head = machine()
        rounds = [MEASURED[part](options) for _ in range(options.rounds)]
        found[part] = {"machine": head, "rounds": rounds}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1))
    print(render(found))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
