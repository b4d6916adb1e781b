"""Advantages and the one loss: pure functions (GRPO: https://arxiv.org/abs/2402.03300).

Dr. GRPO (https://arxiv.org/abs/2503.20783) takes no standard deviation out of the advantage and no
completion length out of the loss.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.config import GRPOConfig
from vgrout.core import Zone

# nats of ref − logp: on a row that another state sampled k3 has no bound, one token can exceed 1e6
KL_LINEAR_FROM = 5.0


def advantages(
    rewards: Float[Tensor, " g"],
    group: Int[Tensor, " g"],
) -> Float[Tensor, " g"]:
    """A_i = r_i − mean of r over i's group."""
    return rewards - _group_mean(rewards, group, torch.ones_like(rewards))


def retained_advantages(
    rewards: Float[Tensor, " g"], group: Int[Tensor, " g"], zones: Int[Tensor, " g"]
) -> Float[Tensor, " g"]:
    """Rows that train the deployed block take their baseline from those rows of their group;
    ROUTE rows keep the full group's."""
    retained = (zones != Zone.ROUTE).float()
    return torch.where(
        zones == Zone.ROUTE,
        advantages(rewards, group),
        rewards - _group_mean(rewards, group, retained),
    )


def _group_mean(
    x: Float[Tensor, " g"],
    group: Int[Tensor, " g"],
    weight: Float[Tensor, " g"],
) -> Float[Tensor, " g"]:
    """Weighted mean of x over each row's group, given back to every row (0 where the group has no
    weight)."""
    n = int(group.max()) + 1
    total = x.new_zeros(n).index_add(0, group, x * weight)
    count = x.new_zeros(n).index_add(0, group, weight)
    return (total / count.clamp(min=1))[group]


def normaliser(config: GRPOConfig) -> float:
    """G · max_completion_length · P, P counting every sampled prompt, skipped groups included."""
    return float(config.num_generations * config.max_completion_length * config.num_prompts)


def scored_loss(
    logps: Float[Tensor, "g t"],
    mask: Bool[Tensor, "g t"],
    advantages: Float[Tensor, " g"],
    max_completion_length: int | float,
) -> Float[Tensor, " g"]:
    """L_i = −A_i · Σ_t logp_t / max_completion_length: the loss of pass 1 (ratio 1, no clip, no
    KL)."""
    return -advantages * (logps * mask).sum(1) / max_completion_length


def grpo_loss(
    logps: Float[Tensor, "g t"],
    old_logps: Float[Tensor, "g t"],
    ref_logps: Float[Tensor, "g t"] | None,
    mask: Bool[Tensor, "g t"],
    advantages: Float[Tensor, " g"],
    weight: Float[Tensor, "g t"] | float = 1.0,
    *,
    epsilon: float,
    beta: float,
    corrected: bool = False,
    normaliser: float,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, "g t"]]]:
    """Σ_i Σ_t [ −w min(ρ A_i, clip(ρ, 1 ± ε) A_i) + β k3 ] · mask / normaliser.

    k3 = exp(ref − logp) − (ref − logp) − 1 (http://joschu.net/blog/kl-approx.html), continued by
    its tangent where ref − logp exceeds KL_LINEAR_FROM: what the policy has all but given up is
    still pulled back, by a bounded force. On policy the gradient of this loss is that of KL(ref‖π),
    the forward KL. `corrected` descends KL(π‖ref): its term ρ (logp − ref), the factor behind ρ
    held, has the gradient of ρ · k3 without its overflow.
    `ref_logps` is None where beta is 0. Returns the loss (summed, so that micro-batches add up) and
    the per-token ratio, clip and KL for logging.
    """
    ratio = torch.exp(logps - old_logps)
    A = advantages[:, None]
    free, bound = ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A
    policy = -weight * torch.minimum(free, bound)
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        gap = ref_logps - logps
        near = gap.clamp(max=KL_LINEAR_FROM)
        kl = torch.exp(near) - near - 1 + (math.exp(KL_LINEAR_FROM) - 1) * (gap - near)
    pull = ratio * (logps - ref_logps).detach() if corrected and ref_logps is not None else kl
    clipped = (free > bound).float()
    loss = ((policy + beta * pull) * mask).sum() / normaliser
    return loss, {"ratio": ratio.detach(), "kl": kl.detach(), "clipped": clipped}
