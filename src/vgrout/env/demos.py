"""The teacher pool: demonstrations on disk that join the groups of the first steps. Imports nothing
heavy.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from loguru import logger

from vgrout.core import Mode, Problem, UserError
from vgrout.files import read_json_lines

MEND = "rebuild the pool with scripts/tools/make_teacher.py or correct the row"
T = TypeVar("T")


def fitting(rows: Iterable[T], fits: Callable[[T], bool], name: str) -> list[T]:
    """The rows that fit the limit on completions. The others are left out, and counted in one
    warning, never cut: their label or reward is that of the whole text.
    """
    rows = list(rows)
    short = [row for row in rows if fits(row)]
    if len(short) < len(rows):
        logger.warning(
            f"{name}: {len(rows) - len(short)} of {len(rows)} rows left out, they are longer than "
            f"--max-completion-length"
        )
    return short


class TeacherPool:
    """A fixed set of demonstrations, `(problem_id, mode) → completions`; the same pool and schedule
    serve every arm."""

    def __init__(
        self,
        path: str,
        modes: tuple[Mode, ...],
        per_group: int,
        until: int,
    ):
        """Read JSONL rows {problem_id, mode, kind, completion, …}; only hacks of `modes` (() for
        all) are kept.

        `per_group` demonstrations join every group until step `until`. UserError, with file and
        line, for a malformed row.
        """
        self.path, self.per_group, self.until = path, per_group, until
        self.rows: dict[tuple[str, str], list[str]] = {}
        for row, where in read_json_lines(path, MEND):
            _check(row, where)
            if row.get("kind", "hack") == "hack" and (not modes or row["mode"] in modes):
                key = str(row["problem_id"]), Mode(row["mode"])
                self.rows.setdefault(key, []).append(row["completion"])
        if not self.rows:
            raise UserError(
                f"{path}: no hack demonstration for the modes {', '.join(modes) or '(any)'}: "
                f"change --teacher-modes"
            )

    def leave_out_long(self, fits: Callable[[str], bool]) -> None:
        """Keep the demonstrations that fit, with their end token; UserError if none does."""
        every = [(key, text) for key, texts in self.rows.items() for text in texts]
        self.rows = {}
        for key, text in fitting(every, lambda row: fits(row[1]), self.path):
            self.rows.setdefault(key, []).append(text)
        if not self.rows:
            raise UserError(
                f"{self.path}: every demonstration is longer than --max-completion-length: raise it"
            )

    def draw(self, problems: Sequence[Problem], step: int) -> list[list[str]]:
        """Each problem's demonstrations of this step, rotating by step; none where the pool has
        none, none from `until` on.
        """
        n = self.per_group if step < self.until else 0
        pools = [self.rows.get((p.problem_id, p.mode), []) for p in problems]
        return [[rows[(step + i) % len(rows)] for i in range(n)] if rows else [] for rows in pools]

    def check_covers(self, problems: Sequence[Problem]) -> None:
        """UserError where none of the problems, as disclosed, has a demonstration."""
        if not any((p.problem_id, p.mode) in self.rows for p in problems):
            raise UserError(
                f"{self.path}: no demonstration fits a training problem and its mode: rebuild "
                "the pool"
            )


def _check(row: dict[str, Any], where: str) -> None:
    for name, kinds in (("problem_id", str | int), ("mode", str), ("completion", str)):
        if not isinstance(row.get(name), kinds) or not str(row[name]):
            missing = "" if name in row else ", and is missing"
            raise UserError(f"{where}: {name!r} must be a non-empty string{missing}; {MEND}")
    if row["mode"] not in list(Mode):
        raise UserError(f"{where}: unknown mode {row['mode']!r}; the modes are {', '.join(Mode)}")
