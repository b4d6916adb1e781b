"""Pass 2: masked forward and backward in micro-batches, then one step of every block that
trains."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.config import GRPOConfig, PhaseConfig
from vgrout.core import NO_ZONE, Zone
from vgrout.model import grpo, tokens
from vgrout.model.absorb import FILTERS, forward_zones, token_weights
from vgrout.model.batch import Behaviour, Trained
from vgrout.model.lora2r import BLOCKS, Lora2r
from vgrout.model.optimizer import BlockOptimizer, trained_blocks
from vgrout.model.policy import Policy, logps

GradientEdit = Callable[[Lora2r], None]  # changes gradients after the backward pass
Figures = dict[str, float]
FAR = 0.1


def update(
    policy: Policy,
    optimizer: BlockOptimizer,
    trained: Trained,
    behaviour: Behaviour,
    config: GRPOConfig,
    phase: PhaseConfig,
    edit: GradientEdit | None = None,
) -> Figures:
    """One optimiser step on the rows of `trained`; returns the step's loss, ratios and norms.

    The old log-probs are the sampler's. Where this very state sampled a row, or nothing did, they
    are the row's own: the ratio is 1. `edit` acts on the gradients before they are clipped.
    """
    adapter, behaviour = policy.adapter, behaviour.select(trained.rows)
    zones = forward_zones(trained.zones, phase.absorb_by)
    on_policy = ~behaviour.sampled | same_state(
        zones,
        behaviour.ablated,
        phase.retain_forward,
    )
    total, by_token, gaps = 0.0, [], []
    for rows in policy.micro_batches(trained.batch):
        how = on_policy, config, phase
        loss, figures, gap = accumulate(policy, trained, behaviour, rows, *how)
        total += loss
        by_token.append(figures)
        gaps.append(gap)
    if edit is not None:
        edit(adapter)
    before = snapshot(adapter)
    blocks = trained_blocks(zones)
    blocks["quarantine"] &= phase.absorb_by != "frozen"
    norms = optimizer.step(blocks)
    moved = torch.stack([(a - b).norm() for a, b in zip(snapshot(adapter), before)]).norm()
    joined = {k: torch.cat([part[k] for part in by_token]) for k in by_token[0]}
    return token_figures(joined) | {
        "loss": total,
        "sampler_mismatch": float(torch.cat(gaps).nanmean()),
        "param_delta": float(moved),
        "grad_norm_deployed": norms["deployed"],
        "grad_norm_quarantine": norms["quarantine"],
        "quarantine_grad_share": norms["quarantine"] / (sum(norms.values()) or 1.0),
    }


def accumulate(
    policy: Policy,
    trained: Trained,
    behaviour: Behaviour,
    rows: Int[Tensor, " n"],
    on_policy: Bool[Tensor, " g"],
    config: GRPOConfig,
    phase: PhaseConfig,
) -> tuple[float, dict[str, Tensor], Float[Tensor, " n"]]:
    """Forward and backward of one micro-batch.

    Returns its loss, figures of its completion tokens, and by row the gap to the sampler's
    log-probs.
    """
    part = tokens.part(trained, rows)
    batch, mask = part.batch, part.batch.completion_mask
    sampled = behaviour.logps[rows, : mask.shape[1]]
    known = (on_policy & behaviour.sampled)[rows, None]  # rows that train in the sampler's state
    ref = reference(policy, part, config)
    ratio_is_one, weight = on_policy[rows, None], torch.ones_like(sampled)
    absorbed = part.zones == Zone.ABSORB
    if phase.absorb_by == "push":
        ratio_is_one = ratio_is_one | absorbed[:, None]
    if phase.absorb_by in FILTERS:
        with torch.no_grad(), policy.adapter.route(part.zones, phase.retain_forward):
            beside = logps(policy, batch, config.temperature)
        how = beside, sampled, mask, batch.advantages, config.epsilon
        weight[absorbed] = token_weights(phase.absorb_by, *how)[absorbed]
    zones = forward_zones(part.zones, phase.absorb_by)
    with policy.training(), policy.adapter.route(zones, phase.retain_forward):
        new = logps(policy, batch, config.temperature)
        old = torch.where(ratio_is_one, new.detach(), sampled)
        drift = torch.where(known, new.detach() - sampled, torch.nan)
        if cap := config.importance_cap:
            weight = weight * drift.nan_to_num().exp().clamp(max=cap)
        loss, figures = grpo.grpo_loss(
            new,
            old,
            ref,
            mask,
            batch.advantages,
            weight,
            epsilon=config.epsilon,
            beta=config.beta,
            corrected=config.kl_estimator == "corrected",
            normaliser=grpo.normaliser(config),
        )
        loss.backward()  # inside the context: gradient checkpointing runs the forward again
    figures["clipped"] = figures["clipped"].maximum((weight == 0).float())
    zone = row_zones(trained.zones)[rows, None].expand_as(new)
    figures |= {
        "logp": new.detach(),
        "zone": zone,
        "drift": drift,
        "sampled": sampled,
    }
    gap = (drift * mask).sum(1).abs() / mask.sum(1)
    return float(loss.detach()), {k: v[mask] for k, v in figures.items()}, gap


def same_state(
    zones: Int[Tensor, "g *s"], ablated: Bool[Tensor, " g"], retain_forward: str
) -> Bool[Tensor, " g"]:
    """Does the row train, at every position, in the state that sampled it?"""
    flat = zones.reshape(len(zones), -1)
    now = (flat == Zone.RETAIN) & (retain_forward == "ablated")
    return ((ablated[:, None] == now) | (flat == NO_ZONE)).all(1)


def reference(
    policy: Policy,
    part: Trained,
    config: GRPOConfig,
) -> Float[Tensor, "n t"] | None:
    """Log-probs of the base, from pass 1 where it has them; None where the KL has no weight."""
    if not config.beta:
        return None
    if part.ref_logps is not None:
        return part.ref_logps
    with torch.no_grad(), policy.adapter.disabled():
        return logps(policy, part.batch, config.temperature)


def row_zones(zones: Int[Tensor, "g *s"]) -> Float[Tensor, " g"]:
    """Each row's zone; at token granularity the mean over its tokens, rounded."""
    known = zones.float().masked_fill(zones == NO_ZONE, float("nan"))
    return known.reshape(len(known), -1).nanmean(1).round()


def snapshot(adapter: Lora2r) -> list[Tensor]:
    return [p.detach().clone() for block in BLOCKS for p in adapter.parameters(block)]


def token_figures(by_token: dict[str, Float[Tensor, " n"]]) -> Figures:
    """Means over the step's completion tokens, the ratio also by zone; how far the learner is from
    the sampler in the state that sampled (share of ratios further than FAR from 1, k3); and the
    sampler's entropy, minus its mean log-prob."""
    means = {"kl": "kl", "clip_share": "clipped", "logp_mean": "logp"}
    figures = {name: float(by_token[key].mean()) for name, key in means.items()}
    for zone in Zone:
        ratio = by_token["ratio"][by_token["zone"] == zone]
        figures[f"ratio_mean_{zone.name.lower()}"] = float(ratio.mean())
    drift = by_token["drift"]
    off = (drift.exp() - 1).abs() > FAR
    figures["sampler_far_share"] = float(off[drift == drift].float().mean())
    figures["sampler_k3"] = float((drift.expm1() - drift).nanmean())
    figures["entropy"] = -float(by_token["sampled"].nanmean())
    return figures
