"""Measurements that nothing trains on: gradient norms by block and ground-truth label, and the policy with a scaled adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vgrout.core import Rollout
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.grpo import scored_loss
from vgrout.model.lora2r import BLOCKS, Lora2r
from vgrout.model.policy import Policy, logps
from vgrout.model.tokens import micro_batches, select

LABELS = {"hack": True, "clean": False}


def gradient_norms(
    policy: Policy,
    batch: Batch,
    origin: Origin,
    out: GateOutput,
    kept: Sequence[Rollout],
    options: object,
    retain_forward: str,
) -> dict[str, float]:
    """‖∂L/∂block‖ of the student rows that are hacks and of those that are not, each in its zone, by `gradnorm_<block>_<label>`.

    L is the policy-gradient term of the step's loss at ratio 1, without KL: −Σ_i A_i Σ_t logp_t / (G · max_completion_length · P)
    over the rows of one label, as an action left them; `options` has GRPOConfig's fields. After Shilov et al. 2025, section 4.4
    (https://arxiv.org/abs/2512.05648): do hacks update the quarantine, and the rest the deployed block? Logged, never used:
    `autograd.grad` touches no `.grad`, and nothing draws at random. The labels are those of `kept`, the rollouts behind the batch
    before the action; a label without a row has norm 0.
    """
    is_hack = {tuple(r.prompt_ids + r.completion_ids): r.grade.reward_hack for r in kept}
    rows = zip(batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist())
    hack = torch.tensor([is_hack[tuple(ids[:n])] for ids, n in rows], device=origin.student.device)
    normaliser = options.num_generations * options.max_completion_length * options.num_prompts
    params = {block: policy.adapter.parameters(block) for block in BLOCKS}
    every, norms = [p for block in BLOCKS for p in params[block]], {}
    for label, wanted in LABELS.items():
        total = {id(p): torch.zeros_like(p) for p in every}
        chosen = (origin.student & (hack == wanted)).nonzero()[:, 0]
        part = select(batch, chosen) if len(chosen) else None
        for inner in micro_batches(part, options.token_budget) if part else []:
            micro, zones = select(part, inner), out.zones[chosen[inner]]
            zones = zones if zones.ndim == 1 else zones[:, : micro.input_ids.shape[1]]
            with (
                torch.enable_grad(),
                policy.training(),
                policy.adapter.route(zones, retain_forward),
            ):
                lp = logps(policy, micro, options.temperature)
                loss = scored_loss(lp, micro.completion_mask, micro.advantages, normaliser).sum()
                for p, g in zip(every, torch.autograd.grad(loss, every)):
                    total[id(p)] += g
        for block in BLOCKS:
            norms[f"gradnorm_{block}_{label}"] = float(
                torch.stack([total[id(p)].norm() for p in params[block]]).norm()
            )
    return norms


@contextmanager
def scaled(adapter: Lora2r, scale: float, blocks: Sequence[str] = BLOCKS) -> Iterator[None]:
    """Multiply the weight deltas of some blocks by `scale` for a while: 1 is the policy as trained, 0 on the quarantine ablates it.

    A block's delta is B dA + dB A0 with B = B0 + dB, so that scaling B0 and dB scales it exactly. Restored by copy, exactly.
    """
    tensors = [
        x
        for layer in adapter.layers.values()
        for b in blocks
        for x in (getattr(layer, b).B0, getattr(layer, b).dB)
    ]
    before = [x.detach().clone() for x in tensors]
    try:
        for x in tensors:
            x.data.mul_(scale)
        yield
    finally:
        for x, value in zip(tensors, before):
            x.data.copy_(value)
