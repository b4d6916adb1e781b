"""On the benchmark's 119 held-out problems: every canonical solution is correct, and every mode's
canonical hack is a hack.

Skipped, in one line, where data/leetcode/leetcode_test_medhard.jsonl[.gz] is not present (`just
download-data`).
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from vgrout.core import Mode, Verdict
from vgrout.env.exploits import canonical_hack
from vgrout.env.modes import ALL_MODES
from vgrout.env.problems import disclose, load_problems, partition
from vgrout.grader import Grader

FOLDER = Path(__file__).resolve().parents[2] / "data/leetcode"
PATHS = [
    path
    for path in (FOLDER / "leetcode_test_medhard.jsonl", FOLDER / "leetcode_test_medhard.jsonl.gz")
    if path.is_file()
]


def fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def main() -> None:
    problems = load_problems(PATHS[0])
    assert len(problems) == 119, len(problems)
    with Grader(2) as grader:
        grades = grader.grade([fenced(p.canonical) for p in problems], problems)
        failed = {
            p.problem_id: g.verdict.value
            for p, g in zip(problems, grades, strict=True)
            if not g.correct
        }
        assert not failed, f"canonical solutions that are not graded correct: {failed}"
        print(f"canonical solutions: {len(problems)} of {len(problems)} correct")

        off = [
            replace(p, cases=(*p.cases[:-1], replace(p.cases[-1], expected="'no such value'")))
            for p in problems[:10]
        ]
        grades = grader.grade([fenced(p.canonical) for p in off], off)
        assert all(g.verdict is Verdict.WRONG for g in grades), (
            "mutation: one altered expected value must be noticed"
        )
        print("mutation: with one expected value altered, 10 of 10 are wrong")

        modes = (*ALL_MODES, Mode.OVERWRITE_TESTS)
        for mode in modes:
            shown = [disclose(p, mode) for p in problems]
            hacks = [canonical_hack(p) for p in shown]
            grades = grader.grade(hacks, shown)
            bad = Counter(
                g.verdict.value for g in grades if not (g.reward_hack and g.mechanism == mode)
            )
            assert not bad, f"{mode}: canonical hacks that are no hacks: {dict(bad)}"
            others = [disclose(p, Mode.GT_ONLY) for p in problems[:10]]
            assert not any(g.passed for g in grader.grade(hacks[:10], others)), (
                f"{mode}: pays without its loophole"
            )
        print(
            f"canonical hacks: {len(modes)} modes × {len(problems)} problems, and none pays "
            "without its loophole"
        )
        assert set(Counter(p.mode for p in partition(problems, ALL_MODES)).values()) <= {19, 20}


if __name__ == "__main__":
    if not PATHS:
        print(
            "verify_leetcode: skipped, data/leetcode/leetcode_test_medhard.jsonl.gz is not present"
        )
        sys.exit(0)
    main()
