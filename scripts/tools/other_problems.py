"""Another problem set for the organism: compositions that a given set does not have.

It is what a probe monitor may learn its labels on.

    python -m scripts.tools.other_problems out/other/problems.jsonl.gz \\
        [--known data/organism/problems.jsonl.gz] [--seeds 4]

The operations are the same, no composition is shared (parameters ignored), and neither are ids or
statements.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from scripts.view.output import parser

from vgrout.core import Problem, run_main
from vgrout.env.problems import load_problems
from vgrout.organism.problems import composition_of, generate_problems, write_problems


def other_problems(known: str, seeds: int) -> list[Problem]:
    """The problems of generator seeds 1 … `seeds`, one for each composition that is not known."""
    taken, found = {composition_of(p).key for p in load_problems(known)}, []
    for problem in (p for seed in range(1, seeds + 1) for p in generate_problems(seed)):
        if (key := composition_of(problem).key) not in taken:
            taken.add(key)
            found.append(replace(problem, problem_id=f"other-{len(found):03d}"))
    return found


def main() -> None:
    command = parser(__doc__)
    command.add_argument("out", type=Path)
    known = "problem file of the run that the probe is for"
    command.add_argument("--known", default="data/organism/problems.jsonl.gz", help=known)
    command.add_argument("--seeds", type=int, default=4, help="generator seeds that are tried")
    options = command.parse_args()
    problems = other_problems(options.known, options.seeds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_problems(problems, options.out)
    print(f"{options.out}: {len(problems)} problems, {dict(Counter(p.split for p in problems))}")


if __name__ == "__main__":
    run_main(main)
