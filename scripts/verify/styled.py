"""Batches with a planted style, pairs of it, rollouts behind a batch: for the gates of scores."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from scripts.verify.tiny import EOS, PAD

from vgrout.core import Grade, Mode, Problem, Rollout, Verdict
from vgrout.env.rollouts import Composed
from vgrout.gate.scores import ProbeOptions
from vgrout.model.batch import Batch, Behaviour
from vgrout.model.policy import Policy
from vgrout.model.tokens import collate
from vgrout.stats import auroc

PROBE = ProbeOptions(max_completion_length=8, temperature=1.0)
PROBLEM = Problem("p", "Return 1.", "solve", "", (), "", mode=Mode.SENTINEL)
GRADE = Grade(0.5, True, False, False, False, "", False, Verdict.WRONG, 0.0)
Refreshed = TypeVar("Refreshed")


def refreshed(owner: Refreshed, policy: Policy) -> Refreshed:
    owner.refresh(policy)
    return owner


def area(scores: torch.Tensor, label: torch.Tensor) -> float:
    """AUROC of scores against labels."""
    return auroc(scores.numpy(), label.numpy())


def drawn(rows: int, length: int, low: int, high: int, g: torch.Generator) -> list[list[int]]:
    return torch.randint(low, high, (rows, length), generator=g).tolist()


def styled(rows: int, seed: int, style: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and completions that draw from six low (style) or six high tokens."""
    g = torch.Generator().manual_seed(seed)
    prompts = drawn(rows, 4, 2, 64, g)
    low, high = (2, 8) if style else (32, 38)
    completions = drawn(rows, 7, low, high, g)
    return prompts, [ids + [EOS] for ids in completions]


def styled_batch(rows: int, seed: int) -> tuple[Batch, torch.Tensor]:
    """A batch in the pairs' layout, in the style and then not, at A = +1; which rows have it."""
    n = rows // 2
    prompts, hack = styled(n, seed, True)
    clean = styled(n, seed + 100, False)[1]
    return paired(prompts, hack, clean), torch.arange(rows) < n


def paired(prompts: list[list[int]], hack: list[list[int]], clean: list[list[int]]) -> Batch:
    """Hack sides, then clean sides, of pairs on prompts of their own."""
    n = len(prompts)
    ones = [1.0] * (2 * n)
    return collate(
        prompts * 2,
        hack + clean,
        ones,
        [*range(n)] * 2,
        ones,
        PAD,
        "cpu",
    )


def pairs_of(batch: Batch) -> Batch:
    """Any batch as pairs: its first half as hack sides, its second as clean sides."""
    n = len(batch.group)
    return replace(
        batch,
        advantages=torch.ones(n),
        group=torch.arange(n // 2).repeat(2),
    )


def behind(batch: Batch, hacks: Sequence[bool] = (), teachers: int = 0) -> Composed:
    """The batch with rollouts: which are hacks, and how many of the first are demonstrations."""
    n = len(batch.group)
    rollouts = []
    for i, hack in enumerate(hacks or [False] * n):
        grade = replace(GRADE, mechanism="x" if hack else "", reward_hack=bool(hack))
        rollouts.append(
            Rollout(
                PROBLEM,
                [],
                [],
                "",
                teacher=i < teachers,
                grade=grade,
            )
        )
    g = torch.Generator().manual_seed(0)
    logps = torch.randn(batch.completion_ids.shape, generator=g)
    logps[:teachers] = float("nan")
    return Composed(
        rollouts,
        batch,
        Behaviour(torch.zeros(n, dtype=torch.bool), logps),
    )
