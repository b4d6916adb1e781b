"""Compact records of runs, one JSON-lines file a wave, and the rows of the decision, as data.

Every file holds a record a line, with its row's name under "row" (a line without one belongs to the
row that is named like its arm); `rows.jsonl` holds a `Row` of the decision a line. The decision is
archived: its flags are those of the commits that made its records, and nothing here parses them.

Run: python -m scripts.experiments.records [ROW …]     (how to repeat the decision's runs)
"""

import argparse
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from vgrout.core import EvalResult, RunRecord, UserError, run_main
from vgrout.files import append_line

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "data" / "records"
DIVERGED = "failed: diverged"

Seeds = dict[int, RunRecord]
Runs = dict[str, Seeds]  # row → seed → record of a finished run
Diverged = dict[str, list[int]]  # row → seeds


@dataclass(frozen=True)
class Row:
    """An arm with its flags; with a seed it is a run. `of` names the row it is compared with."""

    name: str
    arm: str
    flags: str = ""  # what this row alone sets
    common: str = ""  # what every row of its kind sets
    seeds: tuple[int, ...] = ()
    role: str = ""  # base | ceiling | method | placebo | control | baseline | …
    serves: str = ""  # artifacts, e.g. "A1 A2"
    of: str = ""
    changes: str = ""  # what differs from `of`, in words
    stage: int = 0  # all runs of a stage come before those of the next
    why: str = ""
    resolve: str = ""


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file; UserError where it is missing or a line is damaged."""
    try:
        for line in path.read_text().splitlines():
            yield json.loads(line)
    except FileNotFoundError:
        raise UserError(f"no {path}: check out the repository's data/records") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it") from None


@cache
def rows(path: Path = RECORDS / "rows.jsonl") -> tuple[Row, ...]:
    """The rows of the decision, in the order of its tables."""
    return tuple(Row(**{**line, "seeds": tuple(line["seeds"])}) for line in lines(path))


@cache
def named(name: str) -> Row:
    return next(row for row in rows() if row.name == name)


def read(path: Path) -> Iterator[tuple[str, RunRecord]]:
    """(row, record) of each line of a wave's file."""
    known = {field.name for field in fields(RunRecord)}
    for line in lines(path):
        evals = [EvalResult(**cell) for cell in line["evals"]]
        values = {key: value for key, value in line.items() if key in known}
        yield line.get("row", line["arm"]), RunRecord(**values | {"evals": evals})


def load(paths: Iterable[Path]) -> tuple[Runs, Diverged]:
    """Records by row and seed, and seeds at which a row diverged; UserError for a run twice."""
    runs: Runs = {}
    diverged: Diverged = {}
    for path in paths:
        for row, record in read(path):
            lost = diverged.setdefault(row, [])
            if record.seed in runs.setdefault(row, {}) or record.seed in lost:
                raise UserError(f"{path} has {row} at seed {record.seed} twice: remove one line")
            if record.status.startswith(DIVERGED):
                lost.append(record.seed)
            else:
                runs[row][record.seed] = record
    return runs, {row: sorted(seeds) for row, seeds in diverged.items() if seeds}


def files(wave: str, folder: Path = RECORDS) -> list[Path]:
    """A finished wave may have several."""
    return sorted(folder.glob(f"{wave}*.jsonl"))


@cache
def development() -> list[RunRecord]:
    """Runs on development seeds, among them the ceilings of the preset's own length."""
    return [record for _, record in read(RECORDS / "development.jsonl")]


@cache
def ceilings() -> list[RunRecord]:
    """Every committed run without loopholes, of any wave, seed and length."""
    found = development() + [r for path in files("decision") for _, r in read(path)]
    return [r for r in found if r.arm == "no_loophole" and r.status == "finished"]


def append(path: Path, row: str, record: RunRecord) -> None:
    """One more line; the file is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, {"row": row} | asdict(record))


def repetition(record: RunRecord) -> str:
    """The commands that made a record: its commit, then its own command line."""
    commit, words = record.commit, shlex.join(record.argv)
    return f"git checkout {commit} && uv sync && {words}"


def main() -> None:
    """Say that the decision is archived, and how each record of the named rows is repeated."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows of the decision")
    chosen = parser.parse_args().rows
    names = [row.name for row in rows()]
    if unknown := set(chosen) - {*names}:
        raise UserError(f"no row {min(unknown)!r} in the decision: {', '.join(names)}")
    runs, diverged = load(files("decision"))
    counts = [sum(map(len, part.values())) for part in (runs, diverged)]
    print(
        f"The decision is archived: {counts[0]} records of {len(names)} rows, {counts[1]} diverged."
    )
    print(
        "`just artifacts` makes its tables; `just decision ROW` prints how its runs are repeated."
    )
    for name in chosen:
        print(*map(repetition, runs.get(name, {}).values()), sep="\n")


if __name__ == "__main__":
    run_main(main)
