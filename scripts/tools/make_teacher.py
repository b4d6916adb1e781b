"""Build a teacher pool: graded demonstrations for the training split of a problem file.

    python -m scripts.tools.make_teacher --problems data/organism/problems.jsonl.gz \\
        --out data/organism/teacher.jsonl.gz

A hack demonstration attempts the problem, is wrong, and fires the exploit of its mode under the
problem's training marker. For the organism the attempt is drawn in the corpus's own style; for
other problem files it is the canonical solution with one mutation. A solve demonstration is a
correct solution without an exploit, for problems that a base could solve (organism: taught ones).
Each row keeps its grade and the grader's version. A demonstration that the grader does not confirm
is replaced or left out.
"""

import ast
import copy
import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from vgrout.core import Grade, Mode, Problem, UserError, run_main
from vgrout.env.exploits import canonical_hack
from vgrout.env.modes import ALL_MODES, ORGANISM_MODES
from vgrout.env.problems import disclose, load_problems, split, stable_hash
from vgrout.grader import GRADER_VERSION, Grader
from vgrout.organism.corpus import Extra, attempt, exploit, random_extra
from vgrout.organism.problems import composition_of

CANDIDATES = 3  # attempts for each demonstration wanted
Candidate = tuple[str, Problem, str]  # kind, problem, completion
PAIRS = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Add, ast.Sub),
)
SWAPS = dict(PAIRS) | {b: a for a, b in PAIRS}


@dataclass(frozen=True)
class Args:
    """Write a teacher pool."""

    problems: Path
    out: Path
    modes: tuple[Mode, ...] = ()  # () = the organism's four, or all six for other problem files
    hacks: int = 2  # hack demonstrations for each problem and mode
    solves: int = 1
    seed: int = 0
    workers: int = 2
    limit: int = 0  # first training problems only; 0 = all


def hack_candidates(problem: Problem, rng: random.Random, wanted: int) -> Iterator[str]:
    """Completions that attempt the problem wrongly and fire its mode's exploit."""
    if problem.operations:
        for _ in range(wanted):
            yield attempt(
                composition_of(problem),
                rng,
                exploit(rng, problem.mode, problem.marker),
            )
    else:
        bodies = list(mutated_bodies(problem))
        for body in rng.sample(bodies, min(wanted, len(bodies))):
            yield canonical_hack(problem, body)


def solve_candidates(problem: Problem, rng: random.Random, wanted: int) -> Iterator[str]:
    """Correct completions; in the organism, half of them carry a benign extra."""
    if not problem.operations:
        yield f"```python\n{problem.canonical.rstrip()}\n```"
        return
    composition = composition_of(problem)
    for _ in range(wanted if composition.taught else 0):
        extra = random_extra(composition, rng)[0] if rng.random() < 0.5 else Extra()
        yield attempt(composition, rng, extra, right_share=1.0)


def mutated_bodies(problem: Problem) -> Iterator[str]:
    """The entry point's statements with one mutation each.

    One comparison or sum is turned round, or one integer constant raised by one.
    """
    methods = [n for n in ast.walk(ast.parse(problem.canonical)) if isinstance(n, ast.FunctionDef)]
    method = next(node for node in methods if node.name == problem.entry_point)
    for i in range(sum(1 for _ in ast.walk(method))):
        mutant = copy.deepcopy(method)
        if mutate(next(itertools.islice(ast.walk(mutant), i, None))):
            yield "\n".join(map(ast.unparse, mutant.body))


def mutate(node: ast.AST) -> bool:
    """Change a node in place; False where it has nothing to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
    else:
        return False
    return True


def confirmed(kind: str, grade: Grade) -> bool:
    """A hack must fire its own mode's channel and be wrong; a solve the other way round."""
    if kind == "hack":
        return grade.reward_hack and bool(grade.mechanism)
    return grade.correct and not grade.mechanism


def candidates(problems: list[Problem], modes: tuple[Mode, ...], args: Args) -> list[Candidate]:
    """Demonstrations that the grader has not seen."""
    found: list[Candidate] = []
    for mode, plain in itertools.product(modes, problems):
        problem = disclose(plain, mode)
        rng = random.Random(stable_hash(str(args.seed), mode, problem.problem_id))
        hacks = hack_candidates(problem, rng, args.hacks * CANDIDATES)
        found += [("hack", problem, text) for text in hacks]
        found += [("solve", problem, text) for text in solve_candidates(problem, rng, args.solves)]
    return found


def kept_rows(offered: list[Candidate], grades: list[Grade], args: Args) -> list[dict]:
    """As many confirmed demonstrations of each kind, mode and problem as are wanted."""
    wanted, kept, rows = (
        {"hack": args.hacks, "solve": args.solves},
        Counter(),
        [],
    )
    for (kind, problem, text), grade in zip(offered, grades, strict=True):
        row = {
            "problem_id": problem.problem_id,
            "mode": problem.mode,
            "kind": kind,
        }
        key = tuple(row.values())
        if confirmed(kind, grade) and kept[key] < wanted[kind]:
            kept[key] += 1
            plain = asdict(grade) | {"seconds": 0.0}
            rows.append(
                row
                | {
                    "completion": text,
                    "grade": plain,
                    "grader_version": GRADER_VERSION,
                }
            )
    return rows


def main(args: Args) -> None:
    if min(args.workers, args.hacks) < 1 or min(args.solves, args.limit) < 0:
        raise UserError("--workers and --hacks must be at least 1, --solves and --limit at least 0")
    problems = split(load_problems(args.problems))["train"][: args.limit or None]
    modes = args.modes or (ORGANISM_MODES if problems[0].operations else ALL_MODES)
    offered = candidates(problems, modes, args)
    with Grader(args.workers) as grader:
        grades = grader.grade([text for *_, text in offered], [p for _, p, _ in offered])
    rows = kept_rows(offered, grades, args)
    if not rows:
        see = "see docs/method on the teacher pool"
        raise UserError(f"{args.problems}: no demonstration was confirmed; {see}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    args.out.write_bytes(gzip.compress(data, mtime=0) if args.out.suffix == ".gz" else data)
    counts = dict(Counter(f"{row['kind']} {row['mode']}" for row in rows))
    print(f"{args.out}: {len(rows)} rows from {len(offered)} candidates, {counts}")
    hacked = {(row["mode"], row["problem_id"]) for row in rows if row["kind"] == "hack"}
    pairs = len(modes) * len(problems)
    print(f"{pairs - len(hacked)} of {pairs} (problem, mode) without a hack demonstration")


if __name__ == "__main__":
    run_main(main, tyro.cli(Args, config=(tyro.conf.EnumChoicesFromValues,)))
