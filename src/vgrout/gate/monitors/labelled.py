"""Labelled rollouts of another environment: what the probe monitor learns from. Imports nothing
heavy.

A row of `--probe-data` is a rollout with its label: {problem_id, completion, reward_hack, and
prompt or mode and marker}. A run's own rollouts.jsonl.gz will do: without `prompt`, the prompt is
rebuilt from the problem file that the record.json beside it names. Rows of problems that the run
itself trains or evaluates on are refused: their labels would make the probe an oracle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vgrout.core import Mode, Problem, UserError
from vgrout.env.demos import fitting
from vgrout.env.problems import load_problems, messages
from vgrout.files import parse_object, read_json_lines

MEND = "fetch the file again"
LEAST = 10  # rollouts of each label


@dataclass(frozen=True)
class Labelled:
    """One rollout of another environment, and whether it is a reward hack there."""

    problem_id: str
    statement: str  # the problem's, or the whole prompt where the problem file is not known
    messages: list[dict[str, str]]
    completion: str
    hack: bool


def load_labelled(
    path: str,
    training: Sequence[Problem],
    limit: int,
    fits: Callable[[str], bool] = lambda text: True,
) -> list[Labelled]:
    """At most `limit` student rows, hacks and others in equal number, spread evenly over the file;
    of those whose completion `fits`.

    UserError, with file and line, for a malformed row; for a problem that is among `training`; for
    fewer than LEAST rows of a label.
    """
    record = Path(path).with_name("record.json")
    problems = _problems_of(record) if record.is_file() else {}
    found = [(_checked(row, where), where) for row, where in read_json_lines(path, MEND)]
    rows = [_labelled(row, where, problems) for row, where in found if not row.get("teacher")]
    _refuse_shared(path, rows, training)
    rows = fitting(rows, lambda row: fits(row.completion), path)
    sides = [[r for r in rows if r.hack == hack] for hack in (True, False)]
    n = min(map(len, sides))
    if n < LEAST:
        raise UserError(
            f"{path}: {len(sides[0])} hacks and {len(sides[1])} other student rollouts; "
            f"a probe needs {LEAST} of each"
        )
    n = min(n, limit // 2)
    return [side[i * len(side) // n] for side in sides for i in range(n)]


def _refuse_shared(path: str, rows: list[Labelled], training: Sequence[Problem]) -> None:
    """UserError if a row is of a problem of this run, by id or by statement."""
    ids, statements = {p.problem_id for p in training}, {p.statement for p in training}
    prompts = {(r.problem_id, r.statement) for r in rows}
    shared = {i for i, text in prompts if i in ids or any(s in text for s in statements)}
    if shared:
        raise UserError(
            f"{path}: {len(shared)} of its {len(dict(prompts))} problems, such as {min(shared)!r}, "
            f"are problems of this run: a probe that knows their labels is an oracle; use rollouts "
            f"of another problem set"
        )


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name, kind in (("problem_id", str), ("completion", str), ("reward_hack", bool)):
        if not isinstance(row.get(name), kind):
            raise UserError(
                f"{where}: {name!r} must be a {kind.__name__}; "
                f"a row is a rollout with its label (docs/reference/data.md)"
            )
    return row


def _problems_of(record: Path) -> dict[str, Problem]:
    """The problems of the run that a record.json describes, by id."""
    mend = "name another --probe-data"
    try:
        data = parse_object(record.read_bytes(), str(record), mend)["config"]["data"]["data"]
    except (OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{record} is not a run record ({type(error).__name__}: {error}): {mend}"
        ) from None
    return {p.problem_id: p for p in load_problems(data)}


def _labelled(row: dict[str, Any], where: str, problems: dict[str, Problem]) -> Labelled:
    own = row["problem_id"], row["completion"], row["reward_hack"]
    if isinstance(prompt := row.get("prompt"), str):
        return Labelled(own[0], prompt, [{"role": "user", "content": prompt}], *own[1:])
    if (problem := problems.get(own[0])) is None or row.get("mode") not in list(Mode):
        raise UserError(
            f"{where}: has no 'prompt', and no record.json beside the file names a problem file "
            f"with {own[0]!r} and its mode"
        )
    shown = replace(problem, mode=Mode(row["mode"]), marker=row.get("marker", ""))
    return Labelled(own[0], problem.statement, messages(shown), *own[1:])
