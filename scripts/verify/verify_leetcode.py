"""On the benchmark's 119 held-out problems: every canonical solution is correct, and every mode's
canonical hack is a hack.

The pinned file is what `just download-data` writes, or a gzipped copy; skipped, in one line, where
neither is present.
"""

import gzip
from dataclasses import replace
from pathlib import Path

from scripts.tools.download_data import FILES, FOLDER, blob_id

from vgrout.core import Mode, Problem, Verdict
from vgrout.env.exploits import canonical_hack
from vgrout.env.modes import ALL_MODES
from vgrout.env.problems import disclose, load_problems
from vgrout.grader import Grader

NAME = "leetcode_test_medhard.jsonl"
MODES = (*ALL_MODES, Mode.OVERWRITE_TESTS)


def fenced(problem: Problem) -> str:
    return f"```python\n{problem.canonical.rstrip()}\n```"


def altered(problem: Problem) -> Problem:
    """The problem with another expected value in its last test."""
    *cases, last = problem.cases
    return replace(
        problem,
        cases=(*cases, replace(last, expected="'no such value'")),
    )


def main(path: Path) -> None:
    content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    pinned = FILES[NAME][1]
    assert blob_id(content) == pinned, f"{path} is not the pinned version: just download-data"
    assert blob_id(content + b" ") != pinned, "a changed file goes unnoticed"
    problems = load_problems(path)
    assert len(problems) == 119, len(problems)
    few = problems[:10]
    with Grader(2) as grader:
        grades = grader.grade([*map(fenced, problems)], problems)
        failed = [p.problem_id for p, g in zip(problems, grades, strict=True) if not g.correct]
        assert not failed, f"canonical solutions that are not graded correct: {failed}"
        wrong = grader.grade([*map(fenced, few)], [*map(altered, few)])
        assert all(g.verdict is Verdict.WRONG for g in wrong), "an altered test goes unnoticed"
        for mode in MODES:
            shown = [disclose(p, mode) for p in problems]
            hacks = [*map(canonical_hack, shown)]
            grades = grader.grade(hacks, shown)
            bad = [g.verdict for g in grades if not (g.reward_hack and g.mechanism == mode)]
            assert not bad, f"{mode}: canonical hacks that are no hacks: {bad}"
            without = grader.grade(hacks[:10], [disclose(p, Mode.GT_ONLY) for p in few])
            assert not any(g.passed for g in without), f"{mode}: pays without its loophole"
    print(f"ok  {len(problems)} canonical solutions; their hacks pay in {len(MODES)} modes alone")


if __name__ == "__main__":
    present = [path for path in (FOLDER / NAME, FOLDER / f"{NAME}.gz") if path.is_file()]
    if present:
        main(present[0])
    else:
        print(f"skipped: {FOLDER / NAME} is not present (`just download-data`)")
