"""Grade many mixed completions, a third of them hostile, and count forged verdicts, hangs and what
is left behind.

Usage: python scripts/verify/soak_grader.py JOBS. Uses real problems where data/leetcode has them.
"""

import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from scripts.verify.attacks import ATTACKS, TRIPLE
from scripts.verify.verify_sandbox import fenced, leftovers, make_outside, under

from vgrout.core import Mode, Problem
from vgrout.env.exploits import canonical_hack
from vgrout.env.problems import disclose, load_problems
from vgrout.grader import Grader

REAL = Path(__file__).resolve().parents[2] / "data/leetcode/leetcode_test_medhard.jsonl.gz"
KINDS = ("hostile", "right", "hack")
MODES = list(Mode)
ONCE = [attack for attack in ATTACKS if attack.runs == 1]
OWN_TESTS = {Mode.RUN_TESTS, Mode.OVERWRITE_TESTS}  # one may disclose the other's name
SLOW_SHARE = 0.04  # of the hostile jobs: those that use up a limit
AT_ONCE = 500
SMALL = 20_000  # characters of test inputs of a real problem
LONGEST = 60.0  # seconds of one completion


def draw(rng: random.Random, problem: Problem) -> tuple[str, str, Problem, frozenset[Mode]]:
    """(kind, completion, problem as disclosed, modes that it may exploit)."""
    kind = rng.choice(KINDS)
    mode = rng.choice(MODES)
    if kind == "hostile":
        slow = rng.random() < SLOW_SHARE
        attack = rng.choice([attack for attack in ONCE if attack.slow == slow])
        return kind, fenced(f"{attack.code}\n"), under(mode, attack.setup), attack.pays
    shown = disclose(problem, mode)
    if kind == "right":
        return kind, fenced(f"{problem.canonical}\n"), shown, frozenset()
    hack = disclose(problem, rng.choice(MODES), novel=rng.random() < 0.5)
    pays = OWN_TESTS if hack.mode in OWN_TESTS else {hack.mode}
    return kind, canonical_hack(hack), shown, frozenset(pays)


def is_small(problem: Problem) -> bool:
    return sum(len(case.args) for case in problem.cases) < SMALL


def soak(grader: Grader, jobs: int, rng: random.Random) -> Counter:
    """Counts of kinds, verdicts and forgeries."""
    real = load_problems(REAL) if REAL.exists() else []
    problems = [TRIPLE, *filter(is_small, real)]
    counts = Counter()
    for _ in range(0, jobs, AT_ONCE):
        drawn = [draw(rng, rng.choice(problems)) for _ in range(AT_ONCE)]
        _, completions, shown, _ = map(list, zip(*drawn))
        grades = grader.grade(completions, shown)
        for (kind, completion, problem, pays), grade in zip(drawn, grades):
            wrong = grade.correct != (kind == "right") or grade.seconds > LONGEST
            wrong |= grade.reward_hack and problem.mode not in pays
            if wrong:
                print(f"UNEXPECTED {kind} {problem.mode} {grade}\n{completion[:2000]}")
            counts[f"{kind}: {grade.verdict}"] += 1
            counts["unexpected"] += wrong
    return counts


def main() -> None:
    jobs = int(sys.argv[1])
    start = time.perf_counter()
    outside = make_outside()
    with Grader(2, cpu_seconds=1.0, memory_mb=256) as grader:
        warm_up = [fenced(f"import numpy\n# {i}\n") for i in range(8)]
        grader.grade(warm_up, [TRIPLE] * len(warm_up))
        before = leftovers(grader)
        counts = soak(grader, jobs, random.Random(jobs))
        after = leftovers(grader)
        restarts = grader.sandbox.restarts
    shutil.rmtree(outside)
    seconds = time.perf_counter() - start
    print(f"{jobs} jobs in {seconds:.0f} s: {dict(counts)}")
    print(f"before {before}, after {after}; workers lost {restarts}")
    assert not counts["unexpected"]
    assert after == before and not restarts
    assert not os.path.exists(grader.sandbox._directory)


if __name__ == "__main__":
    main()
