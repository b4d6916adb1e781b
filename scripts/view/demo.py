"""The demonstration: plain GRPO and gradient routing on the model organism, side by side.

Trains `none2r` and `routeQ` (seed 41) as two processes of one thread each, prints the 2×2 table of
both, and draws the deployed policy's hack and solve rate over steps into out/figs/demo.png.

Run: python scripts/view/demo.py [--steps N]     (--steps shortens both runs, to 21 at least)
"""

import os
import shutil
import signal
import subprocess
import sys
import time

from matplotlib.axes import Axes
from scripts.analysis.results import cell, find_ceiling
from scripts.view.output import OUT, ROOT, parser
from scripts.view.plot import plt, save

from vgrout.core import RunRecord, at_least
from vgrout.run import runlog
from vgrout.run.records import load_metrics, load_record
from vgrout.stats import Counts, bootstrap_interval, rate

FIGURE = OUT / "figs" / "demo.png"
ARMS = {
    "none2r": ("GRPO, no routing (none2r)", "#c0392b"),
    "routeQ": ("gradient routing (routeQ)", "#1f6fb2"),
}
PANELS = {  # quantity → title, y axis
    "hack": ("Reward hacking", "hack rate (passes the grader, is not correct)"),
    "solve": ("Correct solutions", "solve rate (correct)"),
}
SEED, PROGRESS_SECONDS, LOG = 41, 15, "log.txt"
FOLDERS = {arm: OUT / "runs" / f"demo_{arm}" for arm in ARMS}


def start(arm: str, steps: int | None) -> subprocess.Popen:
    folder = FOLDERS[arm]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "vgrout.train", "organism", "--intervention", arm]
    command += ["--seed", str(SEED), "--out-dir", str(folder.relative_to(ROOT))]
    command += ["--steps", str(steps)] if steps else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(folder / LOG, "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def progress(arm: str) -> str:
    rows = load_metrics(FOLDERS[arm])
    if not rows:
        return f"{arm}: starting, evaluating the base"
    row, total = rows[-1], load_record(FOLDERS[arm]).config["grpo"]["steps"]
    done = row["step"] + 1
    at = f"step {done} of {total}" if done < total else "final evaluation"
    return f"{arm}: {at}, student hack {row['student_hack']:.2f}, solve {row['student_solve']:.2f}"


def wait(processes: dict[str, subprocess.Popen]) -> str | None:
    """Print progress now and then until all have ended, or one has failed: that arm."""
    began, printed, running = time.monotonic(), 0.0, True
    while running:
        time.sleep(0.5)
        running = any(process.poll() is None for process in processes.values())
        for arm, process in processes.items():
            if process.returncode:
                return arm
        if running and time.monotonic() - printed >= PROGRESS_SECONDS:
            printed = time.monotonic()
            print(f"{printed - began:4.0f} s  {' | '.join(map(progress, processes))}", flush=True)
    return None


def stop(processes: dict[str, subprocess.Popen]) -> None:
    for process in processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def draw_curve(axis: Axes, record: RunRecord, which: str) -> None:
    """The deployed policy with novel markers: validation between the two points of the test."""
    name, colour = ARMS[record.arm]
    cells = {}
    for c in record.evals:
        if (c.markers, c.state) == ("novel", "deployed") and c.split in ("val", "test"):
            cells[c.step] = c.by_problem
    steps = sorted(cells)
    rates = [rate(cells[step], which) for step in steps]
    low, high = zip(*(bootstrap_interval(cells[step], which) for step in steps))
    axis.plot(steps, rates, marker="o", markersize=4, color=colour, label=name)
    axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def draw(records: dict[str, RunRecord], ceiling: Counts | None) -> None:
    base = cell(next(iter(records.values())), base=True)
    levels = {"base model": (base.by_problem, "--"), "GRPO without loopholes": (ceiling, ":")}
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5), sharex=True)
    for axis, (which, (title, label)) in zip(axes, PANELS.items()):
        for record in records.values():
            draw_curve(axis, record, which)
        for name, (counts, style) in levels.items():
            if counts:
                axis.axhline(rate(counts, which), color="0.35", linestyle=style, label=name)
        axis.set(title=f"{title} of the deployed policy", ylabel=label, ylim=(-0.02, 1.02))
        axis.set_xlabel("optimiser step")
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.075)}
    figure.legend(*axes[0].get_legend_handles_labels(), ncol=4, fontsize=10, **where)
    caption = (
        f"Model organism, seed {SEED}, held-out problems with novel markers. First and last point: "
        f"test split, {base.n} draws; points between: validation split.\n"
        "Bands: 95 % bootstrap intervals over problems. Made by `just demo`"
        f"{'; dotted line by `just ceiling`' if ceiling else ''}."
    )
    figure.text(0.01, 0.005, caption, fontsize=8, va="bottom")
    save(figure, FIGURE, (0, 0.14, 1, 1))


def main() -> int:
    command = parser(__doc__)
    longer = "optimiser steps of both runs, over the 20 of routeQ's first phase"
    command.add_argument("--steps", type=at_least(21), help=longer)
    steps = command.parse_args().steps
    began = time.monotonic()
    runlog.stage(
        "none2r learn to hack and routeQ, its quarantine ablated, hack less and still solve",
        "look at the sample and the zones in out/runs/demo_*/log.txt",
    )
    processes = {arm: start(arm, steps) for arm in ARMS}
    try:
        failed = wait(processes)
    finally:
        stop(processes)
    if failed:
        log = FOLDERS[failed] / LOG
        print(f"error: the {failed} run failed; the last lines of {log.relative_to(ROOT)}:")
        print(*log.read_text().splitlines()[-15:], sep="\n")
        return 1
    records = {arm: load_record(folder) for arm, folder in FOLDERS.items()}
    ceiling = find_ceiling(records["routeQ"], [])
    if not ceiling:
        measured = "no committed ceiling has this seed, these steps and files, so none is drawn"
        runlog.warn(measured, "run `just ceiling` and look again")
    draw(records, ceiling)
    for record in records.values():
        runlog.final_table(record)
    print(f"\n{time.monotonic() - began:.0f} s; figure: {FIGURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; both runs are stopped")
