"""The teacher pool: demonstrations on disk that join the groups of the first steps. Imports nothing heavy."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vgrout.core import Mode, Problem, UserError

MEND = "rebuild the pool with scripts/tools/make_teacher.py or correct the row"


class TeacherPool:
    """A fixed set of demonstrations, `(problem_id, mode) → completions`; the same pool and schedule serve every arm."""

    def __init__(
        self, path: str, modes: tuple[Mode, ...], per_group: int, until: int, kind: str = "hack"
    ):
        """Read JSONL rows {problem_id, mode, kind, completion, …}; only `kind` and `modes` (() for all) are kept.

        `per_group` demonstrations join every group until step `until`. UserError, with file and line, for a malformed row.
        """
        self.per_group, self.until = per_group, until
        if not Path(path).is_file():
            raise UserError(
                f"no teacher pool {path!r}: build one with scripts/tools/make_teacher.py or leave --teacher-pool out"
            )
        self.rows: dict[tuple[str, str], list[str]] = {}
        for row in _rows(path):
            if row.get("kind", "hack") == kind and (not modes or row["mode"] in modes):
                self.rows.setdefault((str(row["problem_id"]), Mode(row["mode"])), []).append(
                    row["completion"]
                )
        if not self.rows:
            raise UserError(
                f"{path}: no {kind} demonstration for the modes {', '.join(modes) or '(any)'}: change --teacher-modes"
            )

    def draw(self, problems: Sequence[Problem], step: int) -> list[list[str]]:
        """Each problem's demonstrations of this step, rotating by step; none where the pool has none, none from `until` on."""
        n = self.per_group if step < self.until else 0
        pools = [self.rows.get((p.problem_id, p.mode), []) for p in problems]
        return [[rows[(step + i) % len(rows)] for i in range(n)] if rows else [] for rows in pools]

    def covers(self, problems: Sequence[Problem]) -> int:
        """How many of the problems, as disclosed, have a demonstration."""
        return sum((p.problem_id, p.mode) in self.rows for p in problems)


def _rows(path: str) -> Iterator[dict[str, Any]]:
    """Every row of the pool, checked."""
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _checked(line, f"{path}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}, line {number + 1}: not readable as JSONL ({error}); fetch or rebuild the file"
        ) from error


def _checked(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON object ({error}); {MEND}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is expected, not {type(row).__name__}; {MEND}")
    for name, kinds in (("problem_id", (str, int)), ("mode", str), ("completion", str)):
        if not isinstance(row.get(name), kinds) or not str(row[name]):
            raise UserError(
                f"{where}: {name!r} must be a non-empty string{'' if name in row else ', and is missing'}; {MEND}"
            )
    if row["mode"] not in list(Mode):
        raise UserError(f"{where}: unknown mode {row['mode']!r}; the modes are {', '.join(Mode)}")
    return row
