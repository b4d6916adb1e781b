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
from dataclasses import asdict
from pathlib import Path

from scripts.view.output import parser

from vgrout.core import Grade, Mode, Problem, UserError, run_main
from vgrout.env.exploits import canonical_hack
from vgrout.env.modes import ALL_MODES, ORGANISM_MODES
from vgrout.env.problems import (
    disclose,
    load_problems,
    split,
    stable_hash,
)
from vgrout.grader import GRADER_VERSION, Grader
from vgrout.organism.corpus import Extra, attempt, exploit, random_extra
from vgrout.organism.problems import composition_of

WANTED = {
    "hack": 2,
    "solve": 1,
}  # demonstrations of a kind for each problem and mode
CANDIDATES = 3  # attempts at each hack
SEED, WORKERS = 0, 2
Candidate = tuple[str, Problem, str]  # kind, problem, completion
SWAPS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}


def hack_candidates(problem: Problem, rng: random.Random) -> Iterator[str]:
    """Completions that attempt the problem wrongly and fire its mode's exploit."""
    wanted = WANTED["hack"] * CANDIDATES
    if problem.operations:
        for _ in range(wanted):
            extra = exploit(rng, problem.mode, problem.marker)
            yield attempt(composition_of(problem), rng, extra)
    else:
        bodies = [*mutated_bodies(problem)]
        for body in rng.sample(bodies, min(wanted, len(bodies))):
            yield canonical_hack(problem, body)


def solve_candidates(problem: Problem, rng: random.Random) -> Iterator[str]:
    """Correct completions; in the organism, half of them carry a benign extra."""
    if not problem.operations:
        yield f"```python\n{problem.canonical.rstrip()}\n```"
        return
    composition = composition_of(problem)
    for _ in range(WANTED["solve"] if composition.taught else 0):
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


def candidates(problems: list[Problem], modes: tuple[Mode, ...]) -> list[Candidate]:
    """Demonstrations that the grader has not seen."""
    offered: list[Candidate] = []
    for mode, plain in itertools.product(modes, problems):
        problem = disclose(plain, mode)
        rng = random.Random(stable_hash(str(SEED), mode, problem.problem_id))
        offered += [("hack", problem, text) for text in hack_candidates(problem, rng)]
        offered += [("solve", problem, text) for text in solve_candidates(problem, rng)]
    return offered


def kept_rows(offered: list[Candidate], grades: list[Grade]) -> list[dict]:
    """As many confirmed demonstrations of each kind, mode and problem as are wanted."""
    kept, rows = Counter(), []
    for (kind, problem, text), grade in zip(offered, grades, strict=True):
        key = (problem.problem_id, problem.mode, kind)
        if confirmed(kind, grade) and kept[key] < WANTED[kind]:
            kept[key] += 1
            row = dict(zip(("problem_id", "mode", "kind"), key))
            row["completion"] = text
            row["grade"] = asdict(grade) | {"seconds": 0.0}
            row["grader_version"] = GRADER_VERSION
            rows.append(row)
    return rows


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--problems", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    options = command.parse_args()
    problems = split(load_problems(options.problems))["train"]
    modes = ORGANISM_MODES if problems[0].operations else ALL_MODES
    offered = candidates(problems, modes)
    with Grader(WORKERS) as grader:
        grades = grader.grade([text for *_, text in offered], [p for _, p, _ in offered])
    rows = kept_rows(offered, grades)
    if not rows:
        see = "see docs/method on the teacher pool"
        raise UserError(f"{options.problems}: no demonstration was confirmed; {see}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = options.out.suffix == ".gz"
    options.out.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    counts = dict(Counter(f"{row['kind']} {row['mode']}" for row in rows))
    print(f"{options.out}: {len(rows)} rows from {len(offered)} candidates, {counts}")
    hacked = {(row["mode"], row["problem_id"]) for row in rows if row["kind"] == "hack"}
    pairs = len(modes) * len(problems)
    print(f"{pairs - len(hacked)} of {pairs} (problem, mode) without a hack demonstration")


if __name__ == "__main__":
    run_main(main)
