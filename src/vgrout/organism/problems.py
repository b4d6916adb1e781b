"""The organism's problems: compositions with tests that every single wrong step fails."""

import random
from pathlib import Path

from vgrout.core import Case, Problem, UserError
from vgrout.env.problems import stable_hash
from vgrout.files import gzip_lines
from vgrout.organism.operations import Composition, Step

CASES, CANDIDATE_INPUTS = 8, 60
IDLE_DRAWS = 20_000  # draws in a row without a new problem after which a seed is given up
SIZES = {"train": 400, "val": 60, "test": 160}
UNTAUGHT_SHARE = 0.25  # of the samples, and more of the problems: their tests pass more often
HELD_OUT_SHARE = 0.4  # of the samples may use a held-out operation; they belong to the test split


def generate_problems(seed: int) -> list[Problem]:
    """The RL problems of all three splits, with tests that every single wrong step fails.

    A composition (ignoring parameters) belongs to one split; held-out operations occur in the test
    split alone. UserError where a seed's draws leave a split without enough of them.
    """
    rng, idle = random.Random(seed), 0
    problems: dict[str, list[Problem]] = {split: [] for split in SIZES}
    statements = set()
    while short := [split for split, size in SIZES.items() if len(problems[split]) < size]:
        if (idle := idle + 1) > IDLE_DRAWS:
            found = ", ".join(f"{len(problems[k])} of {SIZES[k]} for {k}" for k in short)
            raise UserError(
                f"seed {seed} yields no further problem in {IDLE_DRAWS} draws ({found}): "
                f"take another --seed"
            )
        held_out = rng.random() < HELD_OUT_SHARE
        composition = Composition.sample(rng, UNTAUGHT_SHARE, held_out)
        split = split_of(composition)
        if composition.statement in statements or len(problems[split]) == SIZES[split]:
            continue
        statements.add(composition.statement)
        cases = generate_cases(composition, rng)
        if cases is not None:
            idle = 0
            problem = Problem(
                problem_id=f"{split}-{len(problems[split]):03d}",
                statement=composition.statement,
                entry_point="solve",
                setup_code="",
                cases=cases,
                canonical=composition.solution(composition.right_codes),
                split=split,
                operations=tuple(step.name for step in composition.steps),
            )
            problems[split].append(problem)
    return [problem for split in SIZES for problem in problems[split]]


def split_of(composition: Composition) -> str:
    """The split that owns the composition: 60 : 10 : 30 by a hash of its key, and `test` for a
    held-out operation.
    """
    if any(step.operation.held_out for step in composition.steps):
        return "test"
    draw = stable_hash("composition", *composition.key) % 10
    return "train" if draw < 6 else "val" if draw < 7 else "test"


def composition_of(problem: Problem) -> Composition:
    """The composition that an organism problem was generated from."""
    domain = "text" if problem.statement.endswith("in text.") else "nums"
    return Composition(domain, tuple(Step.parse(name) for name in problem.operations))


def generate_cases(composition: Composition, rng: random.Random) -> tuple[Case, ...] | None:
    """Up to `CASES` inputs on which the right solution works and that together catch every wrong
    code of every step.

    Returns None if some wrong code survives all candidate inputs (it is then equivalent, or nearly
    so).
    """
    codes = composition.right_codes
    right = compiled(composition, codes)
    variants = []
    for i, step in enumerate(composition.steps):
        for wrong in step.operation.wrong:
            changed = (*codes[:i], step.fill(wrong, "{v}"), *codes[i + 1 :])
            variants.append(compiled(composition, changed))
    useful, plain = [], []
    alive = list(range(len(variants)))
    for _ in range(CANDIDATE_INPUTS):
        argument = _random_input(composition, rng)
        expected = _outcome(right, argument)
        if expected in (None, [], "") or (isinstance(expected, list) and len(expected) < 2):
            continue
        caught = [i for i in alive if _outcome(variants[i], argument) != expected]
        case = Case(args=repr(argument), expected=repr(expected))
        (useful if caught else plain).append(case)
        alive = [i for i in alive if i not in caught]
    if alive or len(useful) > CASES or len(useful + plain) < CASES:
        return None
    return tuple((useful + plain)[:CASES])


def compiled(composition: Composition, codes: tuple[str, ...]):
    namespace: dict = {}
    exec(composition.solution(codes), namespace)  # our own table's code, never a completion
    return namespace["Solution"]().solve


def _outcome(
    solve,
    argument,
):
    try:
        return solve(argument)
    except Exception:  # a wrong variant may fail on any input; None is no legitimate result
        return None


def _random_input(
    composition: Composition,
    rng: random.Random,
) -> list[int] | str:
    """A list of 5 to 8 integers in −12 … 30 that includes the parameters' neighbourhood, or a text
    of 4 to 7 words.
    """
    values = [step.value for step in composition.steps if step.value]
    if composition.domain == "nums":
        near = [int(v) + d for v in values for d in (-1, 0, 0, 1)] + [-4, 0, 1, 2]
        return [
            rng.choice(near) if rng.random() < 0.3 else rng.randint(-12, 30)
            for _ in range(rng.randint(5, 8))
        ]
    letters = "aeostr" + "".join(v for v in values if v.isalpha()) * 2 + "bdln"
    words = [
        "".join(rng.choice(letters) for _ in range(rng.randint(2, 8)))
        for _ in range(rng.randint(4, 7))
    ]
    if any(step.operation.name == "palindrome" for step in composition.steps):
        words = [w + w[::-1] if rng.random() < 0.5 else w for w in words]
    return " ".join(w.title() if rng.random() < 0.2 else w for w in words)


def write_problems(
    problems: list[Problem],
    path: Path,
) -> None:
    """The organism's schema, one object a line, gzipped without a time stamp so that equal problems
    give equal bytes.
    """
    keys = "problem_id split statement entry_point operations canonical".split()
    rows = []
    for p in problems:
        row = {key: getattr(p, key) for key in keys}
        row["cases"] = [[c.args, c.expected] for c in p.cases]
        rows.append(row)
    path.write_bytes(gzip_lines(rows))
