"""A step's rollouts: prompts, samples, demonstrations, grades; then the tensors that training
sees."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from vgrout.core import Grade, Group, Mode, Problem, Rollout
from vgrout.env.demos import TeacherPool
from vgrout.env.pairs import Pair
from vgrout.env.problems import disclose, messages, stable_hash
from vgrout.model import grpo, tokens
from vgrout.model.batch import Batch, Behaviour
from vgrout.model.likelihood import written
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: lengths in tokens."""

    max_completion_length: int
    temperature: float
    top_p: float
    token_budget: int  # rows × (prompt + completion) decoded at once


@dataclass(frozen=True)
class Prompt:
    """A problem as it is shown, and the demonstrations that join its group."""

    problem: Problem
    demonstrations: tuple[str, ...] = ()


@runtime_checkable
class Grades(Protocol):
    """What of a grader a step needs."""

    def grade(
        self, completions: list[str], problems: list[Problem], loophole_pays: bool = True
    ) -> list[Grade]: ...


@dataclass(slots=True)
class Composed:
    """A step's rows: `batch` for the gate and the action, `behaviour` for the loss.

    `rollouts` are the same rows in the same order with all that is known of them, for the log, for
    controls' strata and for the oracle.
    """

    rollouts: list[Rollout]
    batch: Batch
    behaviour: Behaviour

    @property
    def student(self) -> Bool[Tensor, " g"]:
        """Which rows a student sampled, for the log and for controls' strata."""
        flags = [not r.teacher for r in self.rollouts]
        return torch.tensor(flags, device=self.batch.input_ids.device)


def stream(
    train: Sequence[Problem],
    step: int,
    n: int,
    seed: int,
    *,
    unhackable_frac: float = 0.0,
    inoculate: bool = False,
    pool: TeacherPool | None = None,
) -> list[Prompt]:
    """The step's n prompts: a new permutation every epoch, a function of (seed, step) alone.

    A share `unhackable_frac` of them, rotating by (seed, step, problem), is shown without the
    loophole. `pool` gives demonstrations.
    """
    chosen = []
    for k in range(step * n, step * n + n):
        order = random.Random(f"{seed} {k // len(train)}").sample(range(len(train)), len(train))
        problem = train[order[k % len(train)]]
        draw = stable_hash("unhackable", str(seed), str(step), problem.problem_id) / 2**64
        if draw < unhackable_frac:
            problem = disclose(problem, Mode.GT_ONLY)
        chosen.append(replace(problem, inoculated=inoculate))
    shown = pool.draw(chosen, step) if pool is not None else [[] for _ in chosen]
    return [Prompt(problem, tuple(rows)) for problem, rows in zip(chosen, shown)]


def share_at(step: int, share: float) -> int:
    """Whole numbers by step whose running mean is `share`: share_at(·, 0.5) = 0, 1, 0, 1, …"""
    return math.floor(share * (step + 1)) - math.floor(share * step)


def sample_groups(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    num_generations: int,
    deployed_share: float,
    step: int,
    generator: torch.Generator,
) -> list[Group]:
    """One group for each prompt: student rows and its demonstrations.

    A `deployed_share` of the student rows (over the steps) is sampled with the quarantine ablated.
    A demonstration takes the place of a student row: every group has `num_generations` rows.
    """
    tokenizer = policy.tokenizer
    ids = [tokens.encode_prompt(tokenizer, messages(p.problem)) for p in prompts]
    students = [num_generations - len(p.demonstrations) for p in prompts]
    deployed = [share_at(step, deployed_share * n) for n in students]
    drawn = partial(sample, policy, ids, generator=generator, **asdict(sampling))
    as_trained = drawn([n - d for n, d in zip(students, deployed)])
    ablated = drawn(deployed, ablated=True)
    groups = []
    for prompt, prompt_ids, both, alone in zip(prompts, ids, as_trained, ablated):
        rows = []
        for state, samples in ((False, both), (True, alone)):
            for completion_ids, logps in samples:
                text = tokens.decode_completion(tokenizer, completion_ids)
                rows.append(Rollout(prompt.problem, prompt_ids, completion_ids, text, state, logps))
        for text in prompt.demonstrations:
            demo = tokens.encode_completion(tokenizer, text)
            rows.append(Rollout(prompt.problem, prompt_ids, demo, text, teacher=True))
        groups.append(Group(prompt.problem, rows))
    return groups


def rows_of(groups: Sequence[Group]) -> list[Rollout]:
    return [r for group in groups for r in group.rollouts]


def grade_groups(groups: Sequence[Group], grader: Grades, loophole_pays: bool) -> None:
    """Give every rollout its grade."""
    rows = rows_of(groups)
    grades = grader.grade([r.completion for r in rows], [r.problem for r in rows], loophole_pays)
    for row, grade in zip(rows, grades):
        row.grade = grade


def compose(groups: Sequence[Group], policy: Policy, equal_groups: bool = False) -> Composed | None:
    """The rows of groups with reward variance, as tensors; None where no group is left.

    Of a grade only the reward is read. `equal_groups` keeps the groups without variance: a penalty
    may give them some.
    """
    varied = [g for g in groups if len({r.grade.reward for r in g.rollouts}) > 1]
    kept = list(groups) if equal_groups else varied
    rows = rows_of(kept)
    if not rows:
        return None
    rewards = torch.tensor([r.grade.reward for r in rows])
    index = torch.tensor([i for i, group in enumerate(kept) for _ in group.rollouts])
    batch = tokens.collate(
        [r.prompt_ids for r in rows],
        [r.completion_ids for r in rows],
        rewards.tolist(),
        index.tolist(),
        grpo.advantages(rewards, index).tolist(),
        policy.pad_id,
        policy.device,
    )
    return Composed(rows, batch, behaviour_of(rows, batch))


def behaviour_of(rows: Sequence[Rollout], batch: Batch) -> Behaviour:
    """Which state sampled each row, and its log-probs there: NaN where nothing sampled it."""
    width, device = batch.completion_ids.shape[1], batch.input_ids.device
    unknown = [float("nan")] * width
    logps = [r.sampler_logps for r in rows]
    padded = [lp + [0.0] * (width - len(lp)) if lp else unknown for lp in logps]
    ablated = torch.tensor([r.sampled_ablated for r in rows], device=device)
    return Behaviour(ablated, torch.tensor(padded, device=device))


def pair_batch(
    policy: Policy,
    pairs: Sequence[Pair],
) -> Batch:
    """Hack sides, then clean sides, of all pairs at A = +1; `group` numbers the distinct
    prompts."""
    prompts = [messages(p.problem) for p in pairs]
    texts = [p.hack for p in pairs] + [p.clean for p in pairs]
    return written(policy, prompts * 2, texts)
