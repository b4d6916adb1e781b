"""What is done with the rows that a gate flagged: route (masks), filter (drop), penalise (advantage modification), deduct (penalty).

An action takes (batch, origin, gate output) and returns those that the update uses. Pure functions; the rows' order is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.core import Zone
from vgrout.model import grpo
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.tokens import select

Acted = tuple[Batch, Origin, GateOutput]


@dataclass(frozen=True)
class Options:
    """What the actions can be told."""

    retained_advantages: bool = (
        False  # route: rows that train the deployed block share a baseline of their own
    )
    alpha: float = 2.0  # penalise
    penalty: float = 3.0  # deduct
    zone: Zone = Zone.ABSORB  # of the rows that the other three leave to train: ABSORB where both blocks are deployed, RETAIN where one is


def route(batch: Batch, origin: Origin, out: GateOutput, options: Options) -> Acted:
    """Zones as they are."""
    if options.retained_advantages:
        batch = replace(
            batch, advantages=grpo.retained_advantages(batch.rewards, batch.group, out.zones)
        )
    return batch, origin, out


def drop(batch: Batch, origin: Origin, out: GateOutput, options: Options) -> Acted:
    """Rows in ROUTE leave the batch, and the baseline is that of the remaining rows of a group.

    Where every row was flagged the first one stays, with advantage 0, so that the step is defined and moves nothing.
    """
    batch, origin, out = _only(batch, origin, out, out.zones != Zone.ROUTE, options.zone)
    batch.advantages = grpo.advantages(batch.rewards, batch.group)
    return batch, origin, out


def penalise(batch: Batch, origin: Origin, out: GateOutput, options: Options) -> Acted:
    """r' = r (1 − α σ(z) [z > 0]) before the group baseline, z the score's z-score within the group; no row is routed.

    Advantage modification after Wu & Tang 2026 (https://arxiv.org/abs/2604.01476). Rows without a score are not penalised.
    """
    z = group_z(out.scores, batch.group)
    rewards = batch.rewards * (1 - options.alpha * torch.sigmoid(z) * (z > 0))
    out = replace(out, zones=torch.full_like(out.zones, int(options.zone)))
    return replace(batch, advantages=grpo.advantages(rewards, batch.group)), origin, out


def deduct(batch: Batch, origin: Origin, out: GateOutput, options: Options) -> Acted:
    """r' = r − penalty · [ROUTE] before the group baseline; no row is routed.

    The penalty intervention of Ariahw, Engels & Nanda 2025 (docs/papers/ariahw2025.md), whose penalty is the reward of passing.
    A row without a score (NaN) is not in ROUTE. Groups whose penalised rewards are all equal train nothing and leave the batch; where
    that is every group the first row stays, with advantage 0.
    """
    rewards = batch.rewards - options.penalty * (out.zones == Zone.ROUTE)
    batch = replace(batch, advantages=grpo.advantages(rewards, batch.group))
    varied = torch.zeros_like(out.scores, dtype=torch.bool)
    for g in batch.group.unique():
        rows = batch.group == g
        varied[rows] = rewards[rows].max() > rewards[rows].min()
    return _only(batch, origin, out, varied, options.zone)


def group_z(scores: Float[Tensor, " g"], group: Int[Tensor, " g"]) -> Float[Tensor, " g"]:
    """(score − group mean) / group standard deviation over the scored rows; 0 where undefined."""
    z = torch.zeros_like(scores)
    for g in group.unique():
        rows = (group == g) & ~scores.isnan()
        if rows.sum() > 1 and scores[rows].std() > 0:
            z[rows] = (scores[rows] - scores[rows].mean()) / scores[rows].std()
    return z


def _only(
    batch: Batch, origin: Origin, out: GateOutput, keep: Bool[Tensor, " g"], zone: Zone
) -> Acted:
    """The rows to keep, all in one zone; the first one where there is none."""
    rows = keep.nonzero()[:, 0]
    if not len(rows):
        rows = torch.zeros(1, dtype=torch.long, device=keep.device)
    origin = Origin(
        *(None if (x := getattr(origin, f.name)) is None else x[rows] for f in fields(origin))
    )
    zones, ref = (
        torch.full_like(rows, int(zone)),
        None if out.ref_logps is None else out.ref_logps[rows],
    )
    return (
        select(batch, rows),
        origin,
        replace(out, zones=zones, scores=out.scores[rows], ref_logps=ref),
    )


ACTIONS: dict[str, Callable[..., Acted]] = {
    "route": route,
    "filter": drop,
    "penalise": penalise,
    "deduct": deduct,
}
