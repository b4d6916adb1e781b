"""Compact records of runs, one JSON-lines file a wave, and the archived decision.

A line is a record with its row's name under "row"; without one it belongs to the row that is named
like its arm. `rows.jsonl` holds the rows of the decision, which is archived: their flags are those
of the commits that made the records, and nothing here parses them.

Run: python -m scripts.experiments.records            (the decision's table: means ± SEM over seeds)
     python -m scripts.experiments.records ROW …      (how the runs of these rows are repeated, and
                                                       out/figs/decision.png: their hack and solve)
"""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

from scripts.view.output import OUT, ROOT, parser, table
from scripts.view.plot import draw_rows

from vgrout.core import EvalResult, RunRecord, UserError, run_main
from vgrout.files import append_line, read_json_lines
from vgrout.stats import mean_sem

RECORDS = ROOT / "data" / "records"
DIVERGED = "failed: diverged"
BOTH = ("hack", "solve")

Runs = dict[str, dict[int, RunRecord]]  # row → seed → record


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> Iterator[tuple[str, RunRecord]]:
    """(row, record) of each line of a wave's file."""
    known = {field.name for field in fields(RunRecord)}
    for line, _ in read_json_lines(path, "restore the file"):
        evals = [EvalResult(**cell) for cell in line["evals"]]
        values = {key: value for key, value in line.items() if key in known}
        yield (
            line.get("row", line["arm"]),
            RunRecord(**values | {"evals": evals}),
        )


def load(paths: Iterable[Path]) -> tuple[Runs, Runs]:
    """Records of runs that finished, and of those that diverged; UserError for a run twice."""
    finished: Runs = defaultdict(dict)
    diverged: Runs = defaultdict(dict)
    for path in paths:
        for row, record in read(path):
            seed = record.seed
            if seed in finished[row] or seed in diverged[row]:
                raise UserError(f"{path} has {row} at seed {seed} twice: remove one line")
            lost = record.status.startswith(DIVERGED)
            runs = diverged if lost else finished
            runs[row][seed] = record
    return finished, diverged


def files(wave: str, folder: Path = RECORDS) -> list[Path]:
    """A finished wave may have several."""
    return sorted(folder.glob(f"{wave}*.jsonl"))


@cache
def ceilings() -> list[RunRecord]:
    """Every committed run without loopholes of the decision and of development seeds."""
    finished, _ = load(files("decision"))
    every = [record for _, record in read(RECORDS / "development.jsonl")]
    for seeds in finished.values():
        every += seeds.values()
    return [record for record in every if record.arm == "no_loophole"]


def append(path: Path, row: str, record: RunRecord) -> None:
    """One more line; the file is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, {"row": row} | asdict(record))


# ── rates ────────────────────────────────────────────────────────────────────────────────────────


def cells(record: RunRecord, split: str, state: str = "deployed") -> list[EvalResult]:
    """The cells of a state on a split, novel markers."""
    wanted = split, "novel", state
    return [c for c in record.evals if (c.split, c.markers, c.state) == wanted]


def cell(record: RunRecord, base: bool = False, state: str = "deployed") -> EvalResult:
    """The test cell with novel markers of the last step, or of the base."""
    pick = min if base else max
    return pick(cells(record, "test", state), key=lambda c: c.step)


def share(result: EvalResult, which: str) -> float:
    """Hack or solve rate of a cell."""
    return getattr(result, which) / result.n


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± SEM` over seeds."""
    mean, sem = mean_sem(values)
    return f"{mean:.{digits}f} ± {sem:.{digits}f}"


# ── the decision ─────────────────────────────────────────────────────────────────────────────────


def decided(runs: Runs) -> dict[str, list[EvalResult]]:
    """Row → its deployed cells, in the order of the archived tables.

    The runs of `none2r` speak for the base and for `absorb`, too.
    """
    plain = runs["none2r"].values()
    found = {
        "base": [cell(r, base=True) for r in plain],
        "absorb": [cell(r, state="ablated") for r in plain],
    }
    for line, _ in read_json_lines(RECORDS / "rows.jsonl"):
        name = line["name"]
        own = runs.get(name)
        if own:
            found[name] = [cell(r) for r in own.values()]
    return found


def summary(runs: Runs, diverged: Runs) -> str:
    """A line for each row of the decision."""
    rows = []
    for name, results in decided(runs).items():
        row = [name, len(results)]
        for which in BOTH:
            rates = [share(c, which) for c in results]
            row.append(spread(rates))
        lost = diverged.get(name, [])
        rows.append([*row, len(lost)])
    note = "deployed policy, novel markers; `just decision ROW` says how a row is repeated"
    headers = ["row", "runs", *BOTH, "diverged"]
    return f"{table(rows, headers)}\n{note}"


def repetition(record: RunRecord) -> str:
    """The commands that made a record: its commit, then its own command line."""
    return f"git checkout {record.commit} && uv sync && {shlex.join(record.argv)}"


def main() -> None:
    command = parser(__doc__)
    command.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help="rows of the decision",
    )
    chosen = command.parse_args().rows
    runs, diverged = load(files("decision"))
    found = decided(runs)
    if unknown := set(chosen) - found.keys():
        raise UserError(f"no row {min(unknown)!r} in the decision: {', '.join(found)}")
    for name in chosen:
        for record in runs.get(name, {}).values():
            print(repetition(record))
    if chosen:
        own = {row: {w: [share(c, w) for c in found[row]] for w in BOTH} for row in chosen}
        draw_rows(own, OUT / "figs" / "decision.png")
    else:
        print(summary(runs, diverged))


if __name__ == "__main__":
    run_main(main)
