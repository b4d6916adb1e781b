"""Grade many mixed completions, a third of them hostile, and count forged verdicts, hangs and what
is left behind.

Usage: python scripts/verify/soak_grader.py [--jobs 10000] [--workers 2] [--seed 0]. Uses real
problems where data/leetcode has them.
"""

import argparse
import os
import random
import shutil
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

from scripts.verify.attacks import ATTACKS, MARKERS, OUTSIDE, TRIPLE
from scripts.verify.verify_sandbox import leftovers, peak_mb

from vgrout.core import Mode, Problem
from vgrout.env.exploits import canonical_hack
from vgrout.env.problems import disclose, load_problems
from vgrout.grader import Grader

REAL = Path(__file__).resolve().parents[2] / "data/leetcode/leetcode_test_medhard.jsonl.gz"
SLOW_SHARE = 0.04  # of the hostile jobs: those that use up a limit


def draw(rng: random.Random, problems: list[Problem]) -> tuple[str, str, Problem, frozenset[Mode]]:
    """(kind, completion, problem as disclosed, modes that it may exploit)."""
    mode, kind = rng.choice(list(Mode)), rng.choice(["hostile", "right", "hack"])
    if kind == "hostile":
        slow = rng.random() < SLOW_SHARE
        attack = rng.choice([a for a in ATTACKS if a.slow == slow and a.runs == 1])
        return (
            kind,
            f"```python\n{attack.code}\n```",
            replace(TRIPLE, mode=mode, marker=MARKERS.get(mode, "")),
            attack.pays,
        )
    problem = disclose(rng.choice(problems), mode, novel=rng.random() < 0.5)
    if kind == "right":
        return kind, f"```python\n{problem.canonical}\n```", problem, frozenset()
    hack = rng.choice(list(Mode))
    return (
        kind,
        canonical_hack(disclose(problem, hack, novel=rng.random() < 0.5)),
        problem,
        frozenset({hack}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    problems = [TRIPLE]
    os.environ["HF_TOKEN"] = "secret"
    Path(OUTSIDE).mkdir(exist_ok=True)
    Path(f"{OUTSIDE}/secret.txt").write_text("PASS secret")
    counts, longest, start, pending = Counter(), 0.0, time.perf_counter(), deque()
    with Grader(arguments.workers, cpu_seconds=1.0, memory_mb=256) as grader:
        grader.grade([f"```python\nimport numpy\n# {i}\n```" for i in range(8)], [TRIPLE] * 8)
        if REAL.exists():
            real = load_problems(REAL)
            grades = grader.grade([f"```python\n{p.canonical}\n```" for p in real], real)
            problems += [p for p, grade in zip(real, grades) if grade.seconds < 0.1]
        before, memory = leftovers(grader), peak_mb(reset=True)
        for number in range(arguments.jobs + 64):
            if number < arguments.jobs:
                job = draw(rng, problems)
                pending.append((job, grader.submit([job[1]], [job[2]])))
            if number < 64 or not pending:
                continue
            (kind, completion, problem, pays), handle = pending.popleft()
            grade = handle.result()[0]
            longest = max(longest, grade.seconds)
            counts[kind] += 1
            counts[f"{kind}: {grade.verdict}"] += 1
            counts["forged"] += (
                grade.correct != (kind == "right") or grade.reward_hack and problem.mode not in pays
            )
            if grade.correct != (kind == "right"):
                print(
                    f"UNEXPECTED {kind} {problem.problem_id} {problem.mode} {grade}\n"
                    f"{completion[:2000]}",
                    flush=True,
                )
            if number % 1000 == 0:
                print(
                    f"{number} jobs, {time.perf_counter() - start:.0f} s, {dict(counts)}",
                    flush=True,
                )
        after, grown, restarts = leftovers(grader), peak_mb() - memory, grader.sandbox.restarts
    shutil.rmtree(OUTSIDE, ignore_errors=True)
    seconds = time.perf_counter() - start
    print(
        f"{arguments.jobs} jobs in {seconds:.0f} s ({arguments.jobs / seconds:.0f} a second): "
        f"{dict(counts)}"
    )
    print(
        f"forged verdicts {counts['forged']}; longest {longest:.1f} s; workers lost {restarts}; "
        f"memory +{grown:.0f} MB"
    )
    print(
        f"before {before}, after {after}; directory left: "
        f"{os.path.exists(grader.sandbox._directory)}"
    )
    assert (
        not counts["forged"] and after == before and not restarts and grown <= 64 and longest < 60
    )


if __name__ == "__main__":
    main()
