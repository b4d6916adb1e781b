"""The compact record of a run, small enough to commit.

Run: python -m scripts.experiments.compact RUN FILE.jsonl     (one more line of FILE)
"""

from pathlib import Path
from statistics import mean

from scripts.experiments import records
from scripts.view.output import ROOT, parser

from vgrout.core import RunRecord, UserError, run_main
from vgrout.run.records import load_metrics, load_record

WINDOW = 5  # steps of a running mean
EMERGED = 0.5  # student hack rate at which hacks have emerged


def training_notes(rows: list[dict]) -> dict[str, float | int | None]:
    """What tables need of metrics.jsonl: the mean share of routed rows, and the emergence step."""
    routed = [row.get("share_route") for row in rows]
    known = [share for share in routed if share is not None]
    hack = [row["student_hack"] for row in rows]
    recent = (mean(hack[max(0, step - WINDOW) : step]) for step in range(1, len(hack) + 1))
    emerged = (step for step, rate in enumerate(recent, 1) if rate >= EMERGED)
    return {
        "share_route": round(mean(known), 4) if known else None,
        "emerged": next(emerged, None),
    }


def compact(run: Path) -> RunRecord:
    """The record of a run that has ended, with `training_notes`.

    It is without counts by problem where no table needs them, and names its directory below out/.
    UserError for a run that has neither finished nor diverged.
    """
    record = load_record(run)
    if record.status != "finished" and not record.status.startswith(records.DIVERGED):
        why = "only a run that finished, or diverged, is evidence"
        raise UserError(f"{run} is {record.status}: {why}")
    for c in record.evals:
        if (c.split, c.markers) != ("test", "novel") or c.state == "as_trained":
            c.by_problem = {}
    record.notes |= training_notes(load_metrics(run))
    folder = run.resolve()
    inside = folder.is_relative_to(ROOT)
    now = str(folder.relative_to(ROOT)) if inside else f"out/runs/{folder.name}"
    was = record.config["run"]["out_dir"]
    record.config["run"]["out_dir"] = now
    record.argv = [now if was and word == was else word for word in record.argv]
    return record


def main() -> None:
    command = parser(__doc__)
    command.add_argument("run", type=Path)
    command.add_argument("file", type=Path)
    options = command.parse_args()
    record = compact(options.run)
    records.append(options.file, record.arm, record)
    print(f"{options.file}: {record.arm} seed {record.seed}")


if __name__ == "__main__":
    run_main(main)
