"""Training curves of every run in one figure, and the same numbers as CSV.

Student rates are running means over five steps; deployed rates are the evaluations with novel
markers (validation split on the way, test split at both ends). Unfinished runs are drawn as far as
they got.

Run: python -m scripts.view.dyn [RUN_DIR …] [--out DIR]     (default: every directory in out/runs;
DIR/dyn.png and DIR/dyn.csv)
"""

import polars as pl
from matplotlib.figure import Figure
from scripts.experiments.records import BOTH, share
from scripts.view.output import OUT, add_runs, parser, run_folders
from scripts.view.plot import colour_of, plt, save

from vgrout.core import RunRecord, run_main
from vgrout.run.records import load_metrics, load_record

WINDOW = 5  # steps
EVALUATED = "deployed_"  # begins the keys of evaluations; the others are those of metrics.jsonl
PANELS = {
    "student_hack": "Hack rate of the student rows",
    "student_solve": "Solve rate of the student rows",
    "deployed_hack": "Hack rate of the deployed policy",
    "deployed_solve": "Solve rate of the deployed policy",
    "share_route": "Share of rows routed to the quarantine",
    "quarantine_grad_share": "Quarantine's share of the gradient norm",
    "kl": "KL to the base model (nats per token)",
    "completion_length": "Completion length (tokens)",
}
UNBOUNDED = ("kl", "completion_length")
STYLES = ("-", "--", ":", "-.")
COLUMNS = {
    "run": pl.String,
    "arm": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    "key": pl.String,
    "value": pl.Float64,
}


def frame(name: str, record: RunRecord, rows: list[dict]) -> pl.DataFrame:
    """One long table of a run, with the columns COLUMNS."""
    head, values = (name, record.arm, record.seed), []
    for row in rows:
        for key in PANELS:
            if not key.startswith(EVALUATED):
                values.append((*head, row["step"], key, row.get(key)))
    for cell in record.evals:
        if (cell.markers, cell.state) == ("novel", "deployed"):
            for which in BOTH:
                values.append((*head, cell.step, EVALUATED + which, share(cell, which)))
    return pl.DataFrame(values, schema=COLUMNS, orient="row")


def draw(data: pl.DataFrame) -> Figure:
    """A panel for each quantity; colours are arms, line styles are seeds."""
    arms = data["arm"].unique(maintain_order=True).to_list()
    seeds = data["seed"].unique().sort().to_list()
    runs = data.select("run", "arm", "seed").unique(maintain_order=True).rows()
    figure, axes = plt.subplots(4, 2, figsize=(12, 13))
    for axis, (key, title) in zip(axes.flat, PANELS.items()):
        evaluated = key.startswith(EVALUATED)
        for run, arm, seed in runs:
            part = data.filter(run=run, key=key).drop_nulls("value").sort("step")
            values = part["value"]
            axis.plot(
                part["step"],
                values if evaluated else values.rolling_mean(WINDOW, min_samples=1),
                color=colour_of(arms.index(arm)),
                linestyle=STYLES[seeds.index(seed) % len(STYLES)],
                marker="o" if evaluated else None,
                markersize=3,
                alpha=0.85,
                label=f"{arm}, seed {seed} ({run})",
            )
        axis.set(title=title, xlabel="optimiser step")
        if key not in UNBOUNDED:
            axis.set_ylim(-0.02, 1.02)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=2)
    return figure


def main() -> None:
    command = parser(__doc__)
    add_runs(command, OUT / "figs", every=True)
    options = command.parse_args()
    folders = run_folders(options.runs)
    data = pl.concat([frame(f.name, load_record(f), load_metrics(f)) for f in folders])
    legend = 0.03 + 0.012 * ((len(folders) + 1) // 2)  # of the height: two runs stand on a line
    save(draw(data), options.out / "dyn.png", (0, legend, 1, 1))
    data.write_csv(options.out / "dyn.csv")
    print(f"{len(folders)} runs: dyn.png and dyn.csv in {options.out}")


if __name__ == "__main__":
    run_main(main)
