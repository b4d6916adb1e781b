"""Speed of the grader on real problems: completions a second, and its ratio to a fresh interpreter
for each check.

Usage: python scripts/analysis/bench_grader.py [--workers 2]. Needs data/leetcode (`just
download-data`). Prints one table.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from vgrout.core import Problem
from vgrout.env.problems import load_problems
from vgrout.grader import Grader

DATA = Path(__file__).resolve().parents[2] / "data/leetcode"


def find(name: str) -> Path:
    return next(path for path in (DATA / name, DATA / f"{name}.gz") if path.exists())


def wrong(problem: Problem) -> str:
    head = f"class Solution:\n    def {problem.entry_point}(self, *args, **kwargs):\n"
    return f"{head}        return None\n"


def fresh_interpreter(problem: Problem, code: str) -> float:
    """Seconds for one check by `python -c` on preamble, completion and asserts: verdict by exit
    status.
    """
    asserts = "\n".join(
        f"assert Solution().{problem.entry_point}({c.args}) == {c.expected}" for c in problem.cases
    )
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"{problem.setup_code}\n{code}\n{asserts}"],
        capture_output=True,
        check=False,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    rows = []
    for name in (
        "leetcode_test_medhard.jsonl",
        "LeetCodeDataset-v0.3.1-test.jsonl",
        "LeetCodeDataset-v0.2.0-train.jsonl",
    ):
        problems = load_problems(find(name))
        with Grader(workers) as grader:
            for what, codes in (
                ("canonical", [p.canonical for p in problems]),
                ("wrong", list(map(wrong, problems))),
                ("wrong, tests compiled", list(map(wrong, problems))),
            ):
                start = time.perf_counter()
                grades = grader.grade([f"```python\n{code}\n```" for code in codes], problems)
                seconds = time.perf_counter() - start
                failed = [
                    f"{p.problem_id}: {g.verdict}"
                    for p, g in zip(problems, grades)
                    if not g.correct
                ]
                rows.append(
                    [
                        name,
                        what,
                        len(problems),
                        sum(g.correct for g in grades),
                        f"{seconds:.2f}",
                        f"{len(problems) / seconds:.0f}",
                        ", ".join(failed) if what == "canonical" else "",
                    ]
                )
            if name.startswith("leetcode"):
                few = [p for p in problems if sum(len(c.args) for c in p.cases) < 50_000][:60]
                fresh = sum(fresh_interpreter(p, wrong(p)) for p in few)
                start = time.perf_counter()
                grader.grade([f"```python\n{wrong(p)}\n```" for p in few], few)
                ratio = fresh / (time.perf_counter() - start)
    print(
        tabulate(
            rows,
            headers=["file", "completions", "n", "correct", "seconds", "a second", "not correct"],
        )
    )
    print(
        f"{workers} workers; one fresh `python -c` at a time takes {ratio:.1f} times as long on "
        f"{len(few)} wrong completions"
    )


if __name__ == "__main__":
    main()
