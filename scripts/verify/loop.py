"""The real loop, short and in this process: what the gates of training run."""

import contextlib
import functools
import io
import random
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints
from unittest import mock

import torch

from vgrout import experiment, train
from vgrout.cli import parse
from vgrout.core import Grade, Mode, Problem, Verdict
from vgrout.env import problems
from vgrout.model import tokens
from vgrout.run import evaluate as evaluation
from vgrout.run.records import load_adapter, load_record

SMALL = (  # two layers are adapted: most of a short run's time goes by their number
    "--steps 3 --num-prompts 3 --num-generations 6 --max-completion-length 64 --teacher-until 9 "
    "--final-draws 8 --eval-every 0 --save-every 0 --threads 1 --workers 1 --targets layers.[25]."
)
EACH = 40  # problems of a split that the smoke preset reads here
LOAD = problems.load_problems
ENCODED: dict[str, list[int]] = {}  # text → tokens: every run here has one tokenizer
SECONDS = {*experiment.STEP_SECONDS, "sec_step", "tokens_per_second"}  # of a row of metrics


def run(folder: object, line: str, *, preset: str = "smoke", quiet: bool = True) -> Path:
    """A run of `ARM --flags …`, its output swallowed; returns its directory.

    `quiet`: evaluations draw one token and no largest batch is tried, for runs that are compared by
    what they train. That neither matters is shown by comparison with runs that have both.
    """
    arm, *flags = line.split()
    argv = [
        preset,
        *SMALL.split(),
        "--intervention",
        arm,
        "--out-dir",
        str(folder),
        *flags,
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        load = few_problems if preset == "smoke" else LOAD
        stack.enter_context(mock.patch.object(problems, "load_problems", load))
        stack.enter_context(mock.patch.object(tokens, "encode_completion", _encode_once))
        if quiet:
            stack.enter_context(mock.patch.object(evaluation, "evaluate", _one_token))
            stack.enter_context(mock.patch.object(experiment, "dry_run", lambda *_: None))
        train.main(*parse(argv))
    return Path(folder)


@functools.cache
def few_problems(path: str) -> list[Problem]:
    parts = problems.split(LOAD(path)).values()
    return [problem for part in parts for problem in part[:EACH]]


def _encode_once(tokenizer, text, *, encode=tokens.encode_completion):
    if text not in ENCODED:
        ENCODED[text] = encode(tokenizer, text)
    return [*ENCODED[text]]


def _one_token(
    policy,
    problems,
    grader,
    sampling,
    *,
    evaluate=evaluation.evaluate,
    **options,
):
    short = replace(sampling, max_completion_length=1)
    return evaluate(policy, problems, grader, short, **options | {"draws": 1})


def same_adapter(a: Path, b: Path) -> bool:
    return same_tensors(load_adapter(a)[0], load_adapter(b)[0])


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in SECONDS} for row in rows]


# ── labels without meaning ───────────────────────────────────────────────────────────────────────


def label_blind(plain: Path, folder: object, line: str, seed: int = 0) -> bool:
    """Does the run `plain` of this line train the same parameters where every label is random?

    Every field of every grade but the reward, the modes, and the teacher flags are drawn at random
    before rows become tensors. What remains of a demonstration is that no state sampled it. In runs
    with a control the flags stay, and they alone: it copies the gate's shares among students and
    among demonstrations (gate/controls.py).
    """
    controls = any(phase["control"] for phase in load_record(plain).notes["phases"])
    compose = train.compose
    rng = random.Random(seed)

    def blind(groups, *rest):
        for row in (row for group in groups for row in group.rollouts):
            row.grade = random_grade(row.grade, rng)
            row.problem = replace(row.problem, mode=rng.choice(list(Mode)), marker="x")
            row.teacher = row.teacher if controls else rng.random() < 0.5
        return compose(groups, *rest)

    with mock.patch.object(train, "compose", blind):
        return same_adapter(plain, run(folder, line))


def random_grade(grade: Grade, rng: random.Random) -> Grade:
    """Another grade of equal reward."""
    draws = {
        bool: lambda: rng.random() < 0.5,
        str: lambda: rng.choice(["", "x"]),
        Verdict: lambda: rng.choice(list(Verdict)),
        float: rng.random,
    }
    drawn = {name: draws[kind]() for name, kind in get_type_hints(Grade).items()}
    return Grade(**drawn | {"reward": grade.reward})
