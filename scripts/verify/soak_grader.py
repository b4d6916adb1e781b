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
from dataclasses import replace
from pathlib import Path

from scripts.verify.attacks import ATTACKS, MARKERS, TRIPLE
from scripts.verify.verify_sandbox import fenced, leftovers, make_outside, peak_mb

from vgrout.core import Mode, Problem
from vgrout.env.exploits import canonical_hack
from vgrout.env.problems import disclose, load_problems
from vgrout.grader import Grader

REAL = Path(__file__).resolve().parents[2] / "data/leetcode/leetcode_test_medhard.jsonl.gz"
SLOW_SHARE = 0.04  # of the hostile jobs: those that use up a limit
AT_ONCE = 500
SMALL = 20_000  # characters of test inputs of a real problem
LONGEST = 60.0  # seconds of one completion
GROWTH = 64.0  # MB of this process

Drawn = tuple[str, str, Problem, frozenset[Mode]]


def draw(rng: random.Random, problems: list[Problem]) -> Drawn:
    """(kind, completion, problem as disclosed, modes that it may exploit)."""
    mode, kind = rng.choice(list(Mode)), rng.choice(["hostile", "right", "hack"])
    if kind == "hostile":
        slow = rng.random() < SLOW_SHARE
        attack = rng.choice([a for a in ATTACKS if a.slow == slow and a.runs == 1])
        shown = replace(TRIPLE, mode=mode, marker=MARKERS.get(mode, ""), setup_code=attack.setup)
        return kind, fenced(f"{attack.code}\n"), shown, attack.pays
    problem = disclose(rng.choice(problems), mode, novel=rng.random() < 0.5)
    if kind == "right":
        return kind, fenced(f"{problem.canonical}\n"), problem, frozenset()
    hack = disclose(problem, rng.choice(list(Mode)), novel=rng.random() < 0.5)
    return kind, canonical_hack(hack), problem, frozenset({hack.mode})


def soak(grader: Grader, jobs: int, rng: random.Random) -> Counter:
    """Counts of kinds, verdicts and forgeries."""
    real = load_problems(REAL) if REAL.exists() else []
    problems = [TRIPLE, *(p for p in real if sum(len(c.args) for c in p.cases) < SMALL)]
    counts = Counter()
    for first in range(0, jobs, AT_ONCE):
        drawn = [draw(rng, problems) for _ in range(first, min(first + AT_ONCE, jobs))]
        _, completions, shown, _ = map(list, zip(*drawn))
        grades = grader.grade(completions, shown)
        for (kind, completion, problem, pays), grade in zip(drawn, grades):
            wrong = grade.correct != (kind == "right") or grade.seconds > LONGEST
            wrong |= grade.reward_hack and problem.mode not in pays
            if wrong:
                print(f"UNEXPECTED {kind} {problem.mode} {grade}\n{completion[:2000]}")
            counts.update([kind, f"{kind}: {grade.verdict}"])
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
        memory = peak_mb(reset=True)
        counts = soak(grader, jobs, random.Random(jobs))
        after = leftovers(grader)
        grown = peak_mb() - memory
        restarts = grader.sandbox.restarts
    shutil.rmtree(outside)
    seconds = time.perf_counter() - start
    print(f"{jobs} jobs in {seconds:.0f} s: {dict(counts)}")
    print(f"before {before}, after {after}; workers lost {restarts}; memory +{grown:.0f} MB")
    assert not counts["unexpected"]
    assert after == before and not restarts and grown <= GROWTH
    assert not os.path.exists(grader.sandbox._directory)


if __name__ == "__main__":
    main()
