"""What is done with the rows that a gate flagged: route, filter, penalise, deduct.

An action takes a batch and the gate's output and returns the rows that pass 2 trains, each in its
zone; None where nothing is left to train. Pure functions; the rows' order is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.core import Zone
from vgrout.gate.gate import Gated
from vgrout.model import grpo
from vgrout.model.batch import Batch, Trained
from vgrout.model.tokens import part


@dataclass(frozen=True)
class Options:
    """What the actions can be told."""

    retained_advantages: bool = False  # route: rows that train the deployed block share a baseline
    alpha: float = 2.0  # penalise
    penalty: float = 3.0  # deduct
    zone: Zone = Zone.ABSORB  # of the rows that the other three leave to train


Action = Callable[[Batch, Gated, Options], Trained | None]


def route(batch: Batch, gated: Gated, options: Options) -> Trained:
    """Zones as they are."""
    if options.retained_advantages:
        own = grpo.retained_advantages(batch.rewards, batch.group, gated.zones)
        batch = replace(batch, advantages=own)
    return _whole(batch, gated.zones, gated)


def drop(batch: Batch, gated: Gated, options: Options) -> Trained | None:
    """Rows in ROUTE leave the batch; the baseline is that of the remaining rows of a group.

    None where every row was flagged: there is nothing to train, not even by the KL or by moments.
    """
    trained = _only(batch, gated, gated.zones != Zone.ROUTE, options.zone)
    if trained is not None:
        left = trained.batch
        left.advantages = grpo.advantages(left.rewards, left.group)
    return trained


def penalise(
    batch: Batch,
    gated: Gated,
    options: Options,
) -> Trained:
    """r' = r (1 − α σ(z) [z > 0]) before the group baseline, z the score's z-score in the group.

    Advantage modification after Wu & Tang 2026 (https://arxiv.org/abs/2604.01476). Rows without a
    score are not penalised, and no row is routed.
    """
    z = group_z(gated.scores, batch.group)
    rewards = batch.rewards * (1 - options.alpha * torch.sigmoid(z) * (z > 0))
    batch = replace(batch, advantages=grpo.advantages(rewards, batch.group))
    return _only(batch, gated, torch.ones_like(z, dtype=torch.bool), options.zone)


def deduct(
    batch: Batch,
    gated: Gated,
    options: Options,
) -> Trained | None:
    """r' = r − penalty · [ROUTE] before the group baseline; no row is routed.

    The penalty intervention of Ariahw, Engels & Nanda 2025, whose penalty is the reward of passing.
    A row without a score (NaN) is not in ROUTE. Groups whose penalised rewards are all equal train
    nothing and leave the batch; None where that is every group.
    """
    rewards = batch.rewards - options.penalty * (gated.zones == Zone.ROUTE)
    batch = replace(batch, advantages=grpo.advantages(rewards, batch.group))
    varied = torch.zeros_like(gated.scores, dtype=torch.bool)
    for g in batch.group.unique():
        rows = batch.group == g
        varied[rows] = rewards[rows].max() > rewards[rows].min()
    return _only(batch, gated, varied, options.zone)


def group_z(
    scores: Float[Tensor, " g"],
    group: Int[Tensor, " g"],
) -> Float[Tensor, " g"]:
    """(score − group mean) / group standard deviation over the scored rows; 0 where undefined."""
    z = torch.zeros_like(scores)
    for g in group.unique():
        rows = (group == g) & ~scores.isnan()
        if rows.sum() > 1 and scores[rows].std() > 0:
            z[rows] = (scores[rows] - scores[rows].mean()) / scores[rows].std()
    return z


def _only(
    batch: Batch,
    gated: Gated,
    keep: Bool[Tensor, " g"],
    zone: Zone,
) -> Trained | None:
    """The rows to keep, all in one zone; None where there is none."""
    rows = keep.nonzero()[:, 0]
    whole = _whole(batch, torch.full_like(batch.group, int(zone)), gated)
    return part(whole, rows) if len(rows) else None


def _whole(batch: Batch, zones: Int[Tensor, "g *s"], gated: Gated) -> Trained:
    rows = torch.arange(len(batch.group), device=batch.group.device)
    return Trained(batch, zones, rows, gated.ref_logps)


ACTIONS: dict[str, Action] = {
    "route": route,
    "filter": drop,
    "penalise": penalise,
    "deduct": deduct,
}
