"""The demonstration: plain GRPO and gradient routing on the model organism, side by side, in a few minutes.

Trains `none2r` and `routeQ` (seed 41) as two processes of one thread each, prints the 2×2 table of both, and draws the
deployed policy's hack and solve rate over steps into out/figs/demo.png.

Run: python scripts/view/demo.py [--steps N]     (--steps shortens both runs, to 21 at least)
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vgrout.core import EvalResult, RunRecord, at_least
from vgrout.run import runlog
from vgrout.run.records import load_metrics, load_record
from vgrout.stats import bootstrap_interval, rate

ROOT = Path(__file__).resolve().parents[2]
RUNS, FIGURE = ROOT / "out" / "runs", ROOT / "out" / "figs" / "demo.png"
CEILING = ROOT / "docs" / "results" / "no_loophole_s41.json"
ARMS = {
    "none2r": ("GRPO, no routing (none2r)", "#c0392b"),
    "routeQ": ("gradient routing (routeQ)", "#1f6fb2"),
}
SEED, PROGRESS_SECONDS, LOG = 41, 15, "log.txt"


def start(arm: str, steps: int | None) -> subprocess.Popen:
    folder = RUNS / f"demo_{arm}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "vgrout.train",
        "organism",
        "--intervention",
        arm,
        "--seed",
        str(SEED),
    ]
    command += ["--out-dir", str(folder.relative_to(ROOT))] + (
        ["--steps", str(steps)] if steps else []
    )
    log = open(folder / LOG, "w")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def progress(arm: str) -> str:
    rows = load_metrics(RUNS / f"demo_{arm}")
    if not rows:
        return f"{arm}: starting, evaluating the base"
    row, total = rows[-1], load_record(RUNS / f"demo_{arm}").config["grpo"]["steps"]
    at = f"step {row['step'] + 1} of {total}" if row["step"] + 1 < total else "final evaluation"
    return f"{arm}: {at}, student hack {row['student_hack']:.2f}, solve {row['student_solve']:.2f}"


def wait(processes: dict[str, subprocess.Popen]) -> str | None:
    """Print one line of progress now and then; return the arm that failed, after stopping the other, or None."""
    began, shown = time.monotonic(), 0.0
    while any(process.poll() is None for process in processes.values()):
        time.sleep(0.5)
        failed = next(
            (arm for arm, process in processes.items() if process.poll() not in (None, 0)), None
        )
        if failed:
            return failed
        if time.monotonic() - shown >= PROGRESS_SECONDS:
            shown = time.monotonic()
            print(
                f"{shown - began:4.0f} s  " + " | ".join(progress(arm) for arm in processes),
                flush=True,
            )
    return next((arm for arm, process in processes.items() if process.returncode), None)


def stop(processes: dict[str, subprocess.Popen]) -> None:
    for process in processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def curve(record: RunRecord, which: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, rates, and interval edges of the deployed policy with novel markers: validation problems on the way."""
    cells = [
        c
        for c in record.evals
        if (c.markers, c.state) == ("novel", "deployed") and c.split in ("val", "test")
    ]
    cells = sorted({c.step: c for c in cells}.values(), key=lambda c: c.step)
    edges = [bootstrap_interval(c.by_problem, which) for c in cells]
    return (
        [c.step for c in cells],
        [rate(c.by_problem, which) for c in cells],
        *map(list, zip(*edges)),
    )


def final_cell(record: RunRecord, step: int) -> EvalResult:
    """Return the test cell of the deployed policy with novel markers at a step."""
    return next(
        c
        for c in record.evals
        if (c.split, c.markers, c.state, c.step) == ("test", "novel", "deployed", step)
    )


def ceiling_cell(record: RunRecord) -> EvalResult | None:
    """Return the committed ceiling, if it was measured on the same data; otherwise say what to do."""
    remedy = "run `just ceiling` and look again"
    if not CEILING.exists():
        runlog.warn(f"{CEILING.relative_to(ROOT)} is missing, so no ceiling is drawn", remedy)
        return None
    ceiling = load_record(CEILING)
    if any(
        ceiling.data_hashes[file] != record.data_hashes[file]
        for file in ceiling.data_hashes.keys() & record.data_hashes.keys()
    ):
        runlog.warn("the committed ceiling was measured on other files, so it is not drawn", remedy)
        return None
    return final_cell(ceiling, ceiling.steps_done)


def draw(records: dict[str, RunRecord]) -> None:
    base = final_cell(next(iter(records.values())), 0)
    ceiling = ceiling_cell(records["routeQ"])
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5), sharex=True)
    titles = {
        "hack": "Reward hacking of the deployed policy",
        "solve": "Correct solutions of the deployed policy",
    }
    labels = {
        "hack": "hack rate (passes the grader, is not correct)",
        "solve": "solve rate (correct)",
    }
    for axis, which in zip(axes, ("hack", "solve")):
        for arm, record in records.items():
            name, colour = ARMS[arm]
            steps, rates, low, high = curve(record, which)
            axis.plot(steps, rates, marker="o", markersize=4, color=colour, label=name)
            axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.axhline(rate(base.by_problem, which), color="0.35", linestyle="--", label="base model")
        if ceiling:
            axis.axhline(
                rate(ceiling.by_problem, which),
                color="0.35",
                linestyle=":",
                label="GRPO without loopholes",
            )
        axis.set(
            title=titles[which], xlabel="optimiser step", ylabel=labels[which], ylim=(-0.02, 1.02)
        )
        axis.grid(alpha=0.25)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="lower center",
        ncol=4,
        frameon=False,
        bbox_to_anchor=(0.5, 0.075),
    )
    caption = (
        f"Model organism, seed {SEED}, held-out problems with novel markers. First and last point: test split, {base.n} draws; "
        "points between: validation split.\nBands: 95 % bootstrap intervals over problems. Made by `just demo`"
    )
    figure.text(
        0.01,
        0.005,
        caption + ("; dotted line by `just ceiling`." if ceiling else "."),
        fontsize=8,
        va="bottom",
    )
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=140)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps",
        type=at_least(21),
        help="optimiser steps of both runs, over the 20 of routeQ's first phase",
    )
    steps = parser.parse_args().steps
    began = time.monotonic()
    runlog.stage("none2r learn to hack and routeQ, once its quarantine is ablated, hack less and still solve",
                 "look at the sample and the zones in out/runs/demo_*/log.txt")  # fmt: skip
    processes = {arm: start(arm, steps) for arm in ARMS}
    try:
        failed = wait(processes)
    finally:
        stop(processes)
    if failed:
        log = RUNS / f"demo_{failed}" / LOG
        print(f"error: the {failed} run failed; the last lines of {log.relative_to(ROOT)}:")
        print(*log.read_text().splitlines()[-15:], sep="\n")
        return 1
    records = {arm: load_record(RUNS / f"demo_{arm}") for arm in ARMS}
    draw(records)
    for record in records.values():
        runlog.final_table(record)
    print(f"\n{time.monotonic() - began:.0f} s; figure: {FIGURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; both runs are stopped")
