"""The demonstration: plain GRPO and gradient routing on the model organism, side by side.

Trains `none2r` and `routeQ` (seed 41) as two processes of one thread each, prints the 2×2 table of
both, and draws the deployed policy's hack and solve rate over steps into out/figs/demo.png.

Run: python -m scripts.view.demo [--steps N]     (--steps shortens both runs, to 21 at least)
"""

import os
import shutil
import signal
import subprocess
import sys
import time

from scripts.analysis.results import cell, find_ceiling
from scripts.view.output import OUT, ROOT, parser
from scripts.view.plot import plt, save

from vgrout.core import RunRecord, UserError, at_least, run_main, warn
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
Processes = dict[str, subprocess.Popen]


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
    last = rows[-1]
    rates = f"student hack {last['student_hack']:.2f}, solve {last['student_solve']:.2f}"
    return f"{arm}: step {last['step'] + 1}, {rates}"


def wait(processes: Processes) -> None:
    """Print progress now and then until all have ended; UserError once one has failed."""
    began = printed = time.monotonic()
    while any(process.poll() is None for process in processes.values()):
        time.sleep(0.5)
        if time.monotonic() - printed >= PROGRESS_SECONDS:
            printed = time.monotonic()
            print(f"{printed - began:4.0f} s  {' | '.join(map(progress, processes))}", flush=True)
        if any(process.poll() for process in processes.values()):
            break
    for arm, process in processes.items():
        if process.returncode:
            log = FOLDERS[arm] / LOG
            print(*log.read_text().splitlines()[-15:], sep="\n")
            raise UserError(f"the {arm} run failed: see {log.relative_to(ROOT)}")


def stop(processes: Processes) -> None:
    for process in processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it stops at the end of its step
            process.wait()


def draw(records: dict[str, RunRecord], ceiling: Counts | None) -> None:
    """The deployed policy with novel markers: validation between the two points of the test."""
    base = cell(records["none2r"], base=True)
    levels = {"base model": (base.by_problem, "--"), "GRPO without loopholes": (ceiling, ":")}
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5), sharex=True)
    for axis, (which, (title, label)) in zip(axes, PANELS.items()):
        for arm, record in records.items():
            name, colour = ARMS[arm]
            novel = [c for c in record.evals if (c.markers, c.state) == ("novel", "deployed")]
            cells = {c.step: c.by_problem for c in novel}
            rates = [rate(counts, which) for counts in cells.values()]
            low, high = zip(*(bootstrap_interval(counts, which) for counts in cells.values()))
            axis.plot(list(cells), rates, "o-", markersize=4, color=colour, label=name)
            axis.fill_between(list(cells), low, high, color=colour, alpha=0.18, linewidth=0)
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


def main() -> None:
    command = parser(__doc__)
    longer = "optimiser steps of both runs, over the 20 of routeQ's first phase"
    command.add_argument("--steps", type=at_least(21), help=longer)
    steps = command.parse_args().steps
    runlog.stage(
        "none2r learn to hack and routeQ, its quarantine ablated, hack less and still solve",
        "look at the sample and the zones in out/runs/demo_*/log.txt",
    )
    processes = {arm: start(arm, steps) for arm in ARMS}
    try:
        wait(processes)
    finally:
        stop(processes)
    records = {arm: load_record(folder) for arm, folder in FOLDERS.items()}
    ceiling = find_ceiling(records["routeQ"], [])
    if not ceiling:
        missing = "no committed ceiling has this seed, these steps and files, so none is drawn"
        warn(missing, "run `just ceiling` and look again")
    draw(records, ceiling)
    for record in records.values():
        runlog.final_table(record)
    print(f"\nfigure: {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
