"""The demonstration: plain GRPO and gradient routing on the model organism, side by side.

Trains `none2r` and `routeQ` (seed 41) as two processes of one thread each, prints the 2×2 table of
both, and draws the deployed policy's hack and solve rate over steps into out/figs/demo.png.

Run: python -m scripts.view.demo [--steps N]     (--steps shortens both runs, to 21 at least)
"""

import shutil
import signal

from scripts.experiments.records import cell
from scripts.experiments.run import Pool
from scripts.experiments.waves import Job, Row
from scripts.view.output import OUT, ROOT, parser
from scripts.view.plot import plt, save

from vgrout.core import RunRecord, UserError, at_least, run_main
from vgrout.run import runlog
from vgrout.run.records import load_record
from vgrout.stats import bootstrap_interval, rate

FIGURE = OUT / "figs" / "demo.png"
ARMS = {
    "none2r": ("GRPO, no routing (none2r)", "#c0392b"),
    "routeQ": ("gradient routing (routeQ)", "#1f6fb2"),
}
PANELS = {  # quantity → title, y axis
    "hack": ("Reward hacking", "hack rate (passes the grader, is not correct)"),
    "solve": ("Correct solutions", "solve rate (correct)"),
}
SEED = 41


def job_of(
    arm: str,
    steps: int | None,
) -> Job:
    folder = OUT / "runs" / f"demo_{arm}"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["organism", "--intervention", arm, "--seed", str(SEED)]
    options += ["--steps", str(steps)] if steps else []
    return Job(Row(arm, arm), SEED, tuple(options), folder)


def train(steps: int | None) -> dict[str, RunRecord]:
    """Both runs to their end; UserError once one has failed."""
    jobs = [job_of(arm, steps) for arm in ARMS]
    pool = Pool(jobs, len(jobs), str)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pool.stop)
    print("two runs, a few minutes: `tail -f out/runs/demo_*/log.txt` follows them", flush=True)
    pool()
    if unfinished := pool.unfinished():
        raise UserError(f"{unfinished[0]}: see out/runs/demo_*/log.txt")
    return {job.row.arm: load_record(job.out_dir) for job in jobs}


def draw(records: dict[str, RunRecord]) -> None:
    """The deployed policy with novel markers: validation between the two points of the test."""
    base = cell(records["none2r"], base=True)
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5), sharex=True)
    for axis, (which, (title, label)) in zip(axes, PANELS.items()):
        for arm, record in records.items():
            name, colour = ARMS[arm]
            novel = [c for c in record.evals if (c.markers, c.state) == ("novel", "deployed")]
            steps = [c.step for c in novel]
            rates = [rate(c.by_problem, which) for c in novel]
            low, high = zip(*(bootstrap_interval(c.by_problem, which) for c in novel))
            axis.plot(steps, rates, "o-", markersize=4, color=colour, label=name)
            axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.axhline(rate(base.by_problem, which), color="0.35", linestyle="--", label="base")
        axis.set(title=f"{title} of the deployed policy", ylabel=label, ylim=(-0.02, 1.02))
        axis.set_xlabel("optimiser step")
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.075)}
    figure.legend(*axes[0].get_legend_handles_labels(), ncol=4, fontsize=10, **where)
    caption = (
        f"Model organism, seed {SEED}, held-out problems with novel markers. First and last point: "
        f"test split, {base.n} draws; points between: validation split.\n"
        "Bands: 95 % bootstrap intervals over problems. Made by `just demo`."
    )
    figure.text(0.01, 0.005, caption, fontsize=8, va="bottom")
    save(figure, FIGURE, (0, 0.14, 1, 1))


def main() -> None:
    command = parser(__doc__)
    longer = "optimiser steps of both runs, over the 20 of routeQ's first phase"
    command.add_argument("--steps", type=at_least(21), help=longer)
    options = command.parse_args()
    print("SHOULD none2r hack, and routeQ, its quarantine ablated, hack less and still solve;")
    print("ELSE look at the sample and the zones in out/runs/demo_*/log.txt")
    records = train(options.steps)
    draw(records)
    for record in records.values():
        runlog.final_table(record)
    print(f"\nfigure: {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
