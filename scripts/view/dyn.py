"""Training curves of every run in one figure, and the same numbers as CSV.

Student rates are running means over five steps; deployed rates are the evaluations with novel markers (validation split on
the way, test split at both ends). Unfinished runs are drawn as far as they got.

Run: python scripts/view/dyn.py [RUN_DIR …] [--out DIR]     (default: every directory in out/runs; DIR/dyn.png and DIR/dyn.csv)
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import polars as pl

from vgrout.core import RunRecord, UserError, run_main
from vgrout.run.records import load_metrics, load_record

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 5
PANELS = (
    ("student_hack", "Hack rate of the student rows", True),
    ("student_solve", "Solve rate of the student rows", True),
    ("deployed_hack", "Hack rate of the deployed policy", False),
    ("deployed_solve", "Solve rate of the deployed policy", False),
    ("share_route", "Share of rows routed to the quarantine", True),
    ("quarantine_grad_share", "Quarantine's share of the gradient norm", True),
    ("kl", "KL to the base model (nats per token)", True),
    ("completion_length", "Completion length (tokens)", True),
)


def frame(name: str, record: RunRecord, rows: list[dict]) -> pl.DataFrame:
    """Return one long table of a run: run, arm, seed, step, key, value."""
    keys = [key for key, _, _ in PANELS if not key.startswith("deployed_")]
    values = [(row["step"], key, row.get(key)) for row in rows for key in keys]
    for cell in record.evals:
        if (cell.markers, cell.state) == ("novel", "deployed"):
            values += [
                (cell.step, f"deployed_{which}", getattr(cell, which) / cell.n)
                for which in ("hack", "solve")
            ]
    long = pl.DataFrame(
        values, schema={"step": pl.Int64, "key": pl.String, "value": pl.Float64}, orient="row"
    )
    return long.select(
        pl.lit(name).alias("run"),
        pl.lit(record.arm).alias("arm"),
        pl.lit(record.seed).alias("seed"),
        pl.all(),
    )


def draw(data: pl.DataFrame, path: Path) -> None:
    arms = data["arm"].unique(maintain_order=True).to_list()
    colours = {arm: plt.get_cmap("tab10")(i % 10) for i, arm in enumerate(arms)}
    styles = {
        seed: ("-", "--", ":", "-.")[i % 4] for i, seed in enumerate(data["seed"].unique().sort())
    }
    figure, axes = plt.subplots(4, 2, figsize=(12, 13))
    for axis, (key, title, smooth) in zip(axes.flat, PANELS):
        for (run,), part in (
            data.filter(pl.col("key") == key)
            .drop_nulls("value")
            .sort("step")
            .group_by("run", maintain_order=True)
        ):
            arm, seed = part["arm"][0], part["seed"][0]
            value = part["value"].rolling_mean(WINDOW, min_samples=1) if smooth else part["value"]
            axis.plot(part["step"], value, color=colours[arm], linestyle=styles[seed], marker=None if smooth else "o", markersize=3,
                      alpha=0.85, label=f"{arm}, seed {seed} ({run})")  # fmt: skip
        axis.set(title=title, xlabel="optimiser step")
        axis.grid(alpha=0.25)
        if not key.startswith(("kl", "completion")):
            axis.set_ylim(-0.02, 1.02)
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes.flat), key=lambda pair: len(pair[0])
    )
    figure.legend(handles, labels, loc="lower center", ncol=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.03 + 0.012 * ((len(labels) + 1) // 2), 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="*", type=Path, help="run directories (default: all of out/runs)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "figs", help="folder of dyn.png and dyn.csv"
    )
    options = parser.parse_args()
    folders = options.runs or [
        path.parent for path in sorted((ROOT / "out" / "runs").glob("*/record.json"))
    ]
    if not folders:
        raise UserError("out/runs holds no run: start with `just demo`, or name run directories")
    data = pl.concat(
        [frame(folder.name, load_record(folder), load_metrics(folder)) for folder in folders]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    data.write_csv(options.out / "dyn.csv")
    draw(data, options.out / "dyn.png")
    print(f"{len(folders)} runs: dyn.png and dyn.csv in {options.out}")


if __name__ == "__main__":
    run_main(main)
