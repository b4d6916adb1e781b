"""Compact records of runs, and the rows of finished waves, as data: one JSON-lines file a wave.

`data/records/rows.jsonl` holds a `Row` a line; every other file holds a compact record a line, with
its row's name under "row" (a line without one belongs to the row that is named like its arm). A row
that is `archived` names an arm that exists no more: its records stay readable, nothing parses it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from vgrout.core import EvalResult, RunRecord, UserError
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
    archived: bool = False
    why: str = ""
    resolve: str = ""

    @property
    def words(self) -> set[str]:
        """What may choose this row."""
        return {self.name, self.arm, *self.serves.split()}


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
    return tuple(Row(**line | {"seeds": tuple(line["seeds"])}) for line in lines(path))


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
