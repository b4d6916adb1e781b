"""What a row in ABSORB takes from the quarantine, taken apart.

Such a row has the quarantine in its forward pass, and PPO's ratio between that state and the one
that sampled it. "push" keeps the forward pass alone, with ratio 1. The FILTERS keep the ratio
alone: the row trains as in RETAIN, each token's loss times a weight w_t.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.core import Zone

FILTERS = ("clip", "shuffled", "silence", "ratio")


def forward_zones(zones: Int[Tensor, "g *s"], absorb_by: str) -> Int[Tensor, "g *s"]:
    """The zones that rows train in: the filters leave the quarantine out of every pass."""
    if absorb_by not in FILTERS:
        return zones
    return zones.masked_fill(zones == Zone.ABSORB, int(Zone.RETAIN))


def token_weights(
    absorb_by: str,
    beside: Float[Tensor, "n t"],
    sampled: Float[Tensor, "n t"],
    mask: Bool[Tensor, "n t"],
    advantages: Float[Tensor, " n"],
    epsilon: float,
) -> Float[Tensor, "n t"]:
    """w_t from ρ_t = exp(logp with the quarantine − logp of the sampler); 1 where nothing sampled.

    "clip" is the weight that PPO gives the token's gradient: ρ, or 0 beyond 1 ± ε on the side of
    the advantage's sign. "silence" keeps only which tokens have 0, "ratio" only ρ. "shuffled" deals
    the weights of "clip" to other tokens of the row: its placebo.
    """
    rho = (beside - sampled).nan_to_num().exp()
    silenced = torch.where(advantages[:, None] > 0, rho > 1 + epsilon, rho < 1 - epsilon)
    if absorb_by == "silence":
        return (~silenced).to(rho)
    weights = rho if absorb_by == "ratio" else rho.masked_fill(silenced, 0.0)
    if absorb_by == "shuffled":
        chance = torch.Generator().manual_seed(int(mask.sum()))  # a resumed run deals the same
        for row, own in zip(weights, mask):
            dealt = torch.randperm(int(own.sum()), generator=chance)
            row[own] = row[own][dealt]
    return weights
