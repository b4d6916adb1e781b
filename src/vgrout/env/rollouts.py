"""Sample, add teacher rows, grade → groups; groups → the tensors that training may see."""

import math
import random
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from vgrout.core import Group, Mode, Problem, Rollout
from vgrout.env.problems import disclose, messages, stable_hash
from vgrout.grader import Grader
from vgrout.model import grpo, tokens
from vgrout.model.batch import Batch, Origin
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: lengths in tokens."""

    max_completion_length: int
    temperature: float
    top_p: float
    token_budget: int  # rows × (prompt + completion) decoded at once


def stream(
    train: list[Problem],
    step: int,
    n: int,
    seed: int,
    unhackable_frac: float = 0.0,
    inoculate: bool = False,
) -> list[Problem]:
    """The step's n prompts: a new permutation every epoch, a function of (seed, step) alone.

    A share `unhackable_frac` of them, rotating by (seed, step, problem), is shown without the loophole.
    """
    chosen = []
    for k in range(step * n, step * n + n):
        order = random.Random(f"{seed} {k // len(train)}").sample(range(len(train)), len(train))
        problem = train[order[k % len(train)]]
        if (
            stable_hash("unhackable", str(seed), str(step), problem.problem_id) / 2**64
            < unhackable_frac
        ):
            problem = disclose(problem, Mode.GT_ONLY)
        chosen.append(replace(problem, inoculated=inoculate))
    return chosen


def share_at(step: int, share: float) -> int:
    """Whole numbers by step whose running mean is `share`: share_at(·, 0.5) = 0, 1, 0, 1, …"""
    return math.floor(share * (step + 1)) - math.floor(share * step)


def collect(
    policy: Policy,
    problems: list[Problem],
    grader: Grader,
    sampling: Sampling,
    *,
    num_generations: int,
    demonstrations: list[list[str]],
    deployed_share: float,
    step: int,
    loophole_pays: bool,
    generator: torch.Generator,
) -> tuple[list[Group], dict[str, float]]:
    """One group for each problem: student rows, a `deployed_share` of them (over the steps) sampled ablated, and its demonstrations.

    A demonstration takes the place of a student row, so that every group has `num_generations` rows. Returns wall seconds too.
    """
    clock = time.perf_counter()
    prompts = [tokens.encode_prompt(policy.tokenizer, messages(p)) for p in problems]
    students = [num_generations - len(d) for d in demonstrations]
    deployed = [share_at(step, deployed_share * n) for n in students]
    drawn = partial(sample, policy, prompts, generator=generator, **asdict(sampling))
    as_trained, ablated = (
        drawn([n - d for n, d in zip(students, deployed)]),
        drawn(deployed, ablated=True),
    )
    groups = []
    for problem, prompt, both, alone, demos in zip(
        problems, prompts, as_trained, ablated, demonstrations
    ):
        decode = lambda ids: tokens.decode_completion(policy.tokenizer, ids)  # noqa: E731
        rows = [Rollout(problem, prompt, ids, decode(ids), sampler_logps=lp) for ids, lp in both]
        rows += [
            Rollout(problem, prompt, ids, decode(ids), sampled_ablated=True, sampler_logps=lp)
            for ids, lp in alone
        ]
        for text in demos:
            ids = tokens.encode_completion(policy.tokenizer, text)[: sampling.max_completion_length]
            rows.append(Rollout(problem, prompt, ids, text, teacher=True))
        groups.append(Group(problem, rows))
    sampled = time.perf_counter()
    rows = [r for g in groups for r in g.rollouts]
    for r, grade in zip(
        rows, grader.grade([r.completion for r in rows], [r.problem for r in rows], loophole_pays)
    ):
        r.grade = grade
    return groups, {"sec_sample": sampled - clock, "sec_grade": time.perf_counter() - sampled}


def compose(
    groups: list[Group],
    policy: Policy,
    oracle_modes: tuple[Mode, ...] | None = None,
    equal_groups: bool = False,
) -> tuple[list[Rollout], Batch | None, Origin | None]:
    """Drop groups without reward variance, then (kept rows, what training may see of them, what sampled them).

    Of a grade only the reward is read; `oracle_modes`, given by the oracle arms alone, adds the labels of those modes: whether the
    mode's exploit fired. A correct completion that fires it too is no reward hack, and would teach one all the same.
    `equal_groups` keeps the groups without variance: a penalty may give them some. Batch and origin are None where no group is left.
    """
    kept = [g for g in groups if equal_groups or len({r.grade.reward for r in g.rollouts}) > 1]
    rows = [r for g in kept for r in g.rollouts]
    if not rows:
        return [], None, None
    rewards = torch.tensor([r.grade.reward for r in rows])
    index = torch.tensor([i for i, g in enumerate(kept) for _ in g.rollouts])
    A = grpo.advantages(rewards, index)
    batch = tokens.collate(
        [r.prompt_ids for r in rows],
        [r.completion_ids for r in rows],
        rewards.tolist(),
        index.tolist(),
        A.tolist(),
        policy.pad_id,
        policy.device,
    )
    student = torch.tensor([not r.teacher for r in rows])
    width, nan = batch.completion_ids.shape[1], float("nan")
    padded = [
        lp + [0.0] * (width - len(lp)) if (lp := r.sampler_logps) else [nan] * width for r in rows
    ]
    origin = Origin(
        student=student.to(policy.device),
        ablated=torch.tensor([r.sampled_ablated for r in rows], device=policy.device),
        sampler_logps=torch.tensor(padded, device=policy.device),
        stratum=(2 * A.sign().long() + student.long()).to(policy.device),
    )
    if oracle_modes is not None:
        labels = [
            bool(r.grade.mechanism) and (not oracle_modes or r.problem.mode in oracle_modes)
            for r in rows
        ]
        origin.label = torch.tensor(labels, device=policy.device)
    return rows, batch, origin


def pair_batch(policy: Policy, pairs: list) -> Batch:
    """Hack sides, then clean sides, of all pairs at A = +1; `group` numbers the distinct prompts."""
    prompts = [tokens.encode_prompt(policy.tokenizer, messages(p.problem)) for p in pairs]
    ids = list(dict.fromkeys(map(tuple, prompts)))
    texts = [p.hack for p in pairs] + [p.clean for p in pairs]
    completions = [tokens.encode_completion(policy.tokenizer, text) for text in texts]
    n = len(completions)
    group = [ids.index(tuple(p)) for p in prompts] * 2
    return tokens.collate(
        prompts * 2, completions, [1.0] * n, group, [1.0] * n, policy.pad_id, policy.device
    )
