"""Speed of the grader on real problems, and its ratio to a fresh interpreter for each check.

Needs data/leetcode (`just download-data`); prints one table.

Run: python -m scripts.analysis.bench_grader [--workers 2]
"""

import subprocess
import sys
import time
from pathlib import Path

from scripts.view.output import ROOT, parser, table

from vgrout.core import Grade, Problem
from vgrout.env.problems import load_problems
from vgrout.grader import Grader

DATA = ROOT / "data" / "leetcode"
FILES = (
    "LeetCodeDataset-v0.3.1-test.jsonl",
    "LeetCodeDataset-v0.2.0-train.jsonl",
    "leetcode_test_medhard.jsonl",
)
HEADERS = ["file", "completions", "n", "correct", "seconds", "a second", "not correct"]


def find(name: str) -> Path:
    return next(path for path in (DATA / name, DATA / f"{name}.gz") if path.exists())


def wrong(problem: Problem) -> str:
    head = f"class Solution:\n    def {problem.entry_point}(self, *args, **kwargs):\n"
    return f"{head}        return None\n"


def fresh_interpreter(problem: Problem, code: str) -> float:
    """Seconds of one check by `python -c` on preamble, completion and asserts."""
    call = f"Solution().{problem.entry_point}"
    asserts = "\n".join(f"assert {call}({c.args}) == {c.expected}" for c in problem.cases)
    program, start = f"{problem.setup_code}\n{code}\n{asserts}", time.perf_counter()
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return time.perf_counter() - start


def timed(grader: Grader, problems: list[Problem], codes: list[str]) -> tuple[list[Grade], float]:
    start = time.perf_counter()
    grades = grader.grade([f"```python\n{code}\n```" for code in codes], problems)
    return grades, time.perf_counter() - start


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--workers", type=int, default=2)
    workers, rows = command.parse_args().workers, []
    with Grader(workers) as grader:
        for name in FILES:
            problems = load_problems(find(name))
            canonical, stubs = [p.canonical for p in problems], list(map(wrong, problems))
            kinds = {"canonical": canonical, "wrong": stubs, "wrong, tests compiled": stubs}
            for what, codes in kinds.items():
                grades, seconds = timed(grader, problems, codes)
                right, n = sum(g.correct for g in grades), len(problems)
                failed = ""
                if what == "canonical":
                    failed = ", ".join(
                        f"{p.problem_id}: {g.verdict}"
                        for p, g in zip(problems, grades)
                        if not g.correct
                    )
                rate = f"{n / seconds:.0f}"
                rows.append([name, what, n, right, f"{seconds:.2f}", rate, failed])
        few = [p for p in problems if sum(len(c.args) for c in p.cases) < 50_000][:60]
        fresh = sum(fresh_interpreter(p, wrong(p)) for p in few)
        ratio = fresh / timed(grader, few, list(map(wrong, few)))[1]
    print(table(rows, HEADERS))
    print(f"{workers} workers; a fresh `python -c` each takes {ratio:.1f} times as long")


if __name__ == "__main__":
    main()
