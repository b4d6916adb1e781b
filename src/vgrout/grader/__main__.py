"""`python -m vgrout.grader`: grade a file of completions, in order, resumable.

A row in is {"problem_id", "mode", "completion"}, and "marker" where the prompt named another than
our own would; a row out is the same with the fields of its grade. All input is checked before
anything runs; what is written is valid at any moment, whole rows in the input's order.
"""

import itertools
import json
import sys
from collections import Counter, deque
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from loguru import logger
from tabulate import tabulate
from tqdm import tqdm

from vgrout.core import Grade, Mode, Problem, UserError, run_main
from vgrout.env.problems import disclose, load_problems
from vgrout.files import dumps, read_json_lines
from vgrout.grader import GRADER_VERSION, Grader

GRADE_FIELDS = tuple(field.name for field in fields(Grade))
MODES = ", ".join(Mode)
COUNTED = ("format_ok", "correct", "passed", "reward_hack", "own_tests_pass")
MEND = "correct or remove the row"


@dataclass(frozen=True)
class Arguments:
    """Grade a file of completions under the mode that each row names."""

    problems: Path  # JSONL, plain or gzipped, in any schema that vgrout.env.problems reads
    completions: (
        Path  # JSONL: problem_id, mode, completion, and marker where a prompt named its own
    )
    # JSONL: the same rows with reward, format_ok, passed, correct, reward_hack, mechanism, verdict,
    # seconds, …
    out: Path
    workers: int = 2  # sandbox processes
    novel_markers: bool = False  # the names of the evaluation instead of those of training
    resume: bool = False  # go on after the rows that --out already holds
    sandbox: Literal["best", "require"] = "best"  # require: refuse to start if a layer is missing
    cpu_seconds: float = 8.0  # CPU time of one call; a completion gets eight times as much


def read_rows(path: Path, problems: dict[str, Problem]) -> list[dict[str, Any]]:
    """All rows, checked. UserError, with file and line, for the first that cannot be graded."""
    wanted = "--completions takes JSONL rows of problem_id, mode and completion"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {wanted}")
    rows = [checked(row, where, problems) for row, where in read_json_lines(path, MEND)]
    if not rows:
        raise UserError(f"{path}: holds no row; {wanted}")
    return rows


def checked(row: dict[str, Any], where: str, problems: dict[str, Problem]) -> dict[str, Any]:
    """The row without grades of its own, which a file that was graded before has."""
    row = {key: value for key, value in row.items() if key not in GRADE_FIELDS}
    for field, kinds in (("problem_id", (str, int)), ("mode", (str,)), ("completion", (str,))):
        if not isinstance(row.get(field), kinds) or isinstance(row[field], bool):
            raise UserError(
                f"{where}: {field!r} must be a string"
                + ("" if field in row else ", and is missing")
            )
    if str(row["problem_id"]) not in problems:
        raise UserError(
            f"{where}: unknown problem id {row['problem_id']!r}; it is not in the file of "
            "--problems"
        )
    if row["mode"] not in list(Mode):
        raise UserError(f"{where}: unknown mode {row['mode']!r}; the modes are {MODES}")
    marker = row.get("marker", "")
    if not isinstance(marker, str) or "/" in marker or not marker.isprintable():
        raise UserError(
            f"{where}: 'marker' must be the function, attribute, phrase or file name that the "
            "prompt named"
        )
    return row


def shown(row: dict[str, Any], problems: dict[str, Problem], novel: bool) -> Problem:
    """The row's problem as its prompt disclosed it."""
    problem = disclose(problems[str(row["problem_id"])], Mode(row["mode"]), novel=novel)
    return replace(problem, marker=row.get("marker") or problem.marker)


def open_output(arguments: Arguments, rows: list[dict[str, Any]]) -> int:
    """Make or trim the output; returns how many rows it holds already. A last line that is cut
    short is dropped.
    """
    out = arguments.out
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such directory; make it, or choose another --out")
    if out.exists() and not arguments.resume:
        raise UserError(f"{out}: exists already; --resume goes on with it, or choose another --out")
    try:
        with open(out, "a+b") as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                file.truncate(sum(map(len, lines[:-1])))
                lines.pop()
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from error
    for number, line in enumerate(lines, 1):
        if number > len(rows) or not is_graded(rows[number - 1], line):
            raise UserError(
                f"{out}, line {number}: does not belong to row {number} of "
                f"{arguments.completions}; --resume needs the file that was begun with"
            )
    return len(lines)


def is_graded(row: dict[str, Any], line: bytes) -> bool:
    """Whether the line is that row with a grade."""
    try:
        graded = json.loads(line)
        own = {key: value for key, value in graded.items() if key in row}
        return set(GRADE_FIELDS) <= graded.keys() and dumps(own) == dumps(row)
    except (ValueError, AttributeError):
        return False


def grade_rows(
    arguments: Arguments, rows: list[dict[str, Any]], problems: dict[str, Problem]
) -> list[Grade]:
    """Grade, with a few rows per worker under way, and append each row as soon as all before it are
    written.
    """
    grades, pending, waiting = [], deque(), iter(rows)
    with (
        Grader(arguments.workers, arguments.sandbox, arguments.cpu_seconds) as grader,
        open(arguments.out, "a") as out,
        tqdm(total=len(rows), unit="row", disable=not sys.stderr.isatty()) as bar,
    ):
        logger.info(
            "sandbox: " + ", ".join(f"{name} {state}" for name, state in grader.layers.items())
        )
        for row in rows:
            for ahead in itertools.islice(waiting, 16 * arguments.workers - len(pending)):
                problem = shown(ahead, problems, arguments.novel_markers)
                pending.append(grader.submit([ahead["completion"]], [problem]))
            grade = pending.popleft().result()[0]
            graded = asdict(grade) | {"seconds": round(grade.seconds, 4)}
            out.write(dumps(row | graded) + "\n")
            out.flush()
            grades.append(grade)
            bar.update()
    return grades


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by mode over the graded rows, and of the verdicts below."""
    lines = []
    for mode in (*dict.fromkeys(row["mode"] for row in rows), "all"):
        of_mode = [row for row in rows if mode in (row["mode"], "all")]
        counts = {name: sum(row[name] for row in of_mode) for name in COUNTED}
        lines.append({"mode": mode, "n": len(of_mode)} | counts)
    verdicts = Counter(row["verdict"] for row in rows).most_common()
    below = ", ".join(f"{name} {count}" for name, count in verdicts)
    return f"{tabulate(lines, headers='keys')}\nverdicts: {below}"


def run(arguments: Arguments) -> None:
    problems = {problem.problem_id: problem for problem in load_problems(arguments.problems)}
    if arguments.workers < 1 or arguments.cpu_seconds <= 0:
        raise UserError("--workers and --cpu-seconds must be positive")
    rows = read_rows(arguments.completions, problems)
    done = open_output(arguments, rows)
    try:
        grade_rows(arguments, rows[done:], problems)
    except KeyboardInterrupt:
        written = arguments.out.read_bytes().count(b"\n")
        print(
            f"interrupted: {written} of {len(rows)} rows are in {arguments.out}; --resume goes on",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    print(table([json.loads(line) for line in arguments.out.read_text().splitlines()]))
    print(f"{len(rows)} rows in {arguments.out}, grader version {GRADER_VERSION}")


def main() -> None:
    run_main(run, tyro.cli(Arguments, prog="python -m vgrout.grader"))


if __name__ == "__main__":
    main()
