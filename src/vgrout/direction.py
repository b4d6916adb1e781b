"""Per-rollout gradients of the c-probe, the hack direction from pairs, and its Haar-random placebo.

g_i = ∂L_i/∂c_i [m, r]: one number for each rank of the deployed bottleneck of each Linear. See docs/method.md, "Direction".
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vgrout.grpo import scored_loss
from vgrout.policy import Policy, logps
from vgrout.tensors import Batch
from vgrout.tokens import micro_batches, select


def probe_gradients(
    policy: Policy, batch: Batch, *, max_completion_length: int, temperature: float, token_budget: int, state: str = "as_trained"
) -> tuple[Float[Tensor, "g m r"], Float[Tensor, "g t"]]:
    """g_i of every row at its own advantage, and the log-probs that pass 1 computed on the way.

    `state` "deployed" probes with the quarantine ablated. Uses `autograd.grad`, so no `.grad` is touched.
    """
    adapter = policy.adapter
    gradients: list[Tensor] = [torch.empty(0)] * len(batch.advantages)
    scored = torch.zeros_like(batch.completion_mask, dtype=torch.float32)
    for rows in micro_batches(batch, token_budget):
        part = select(batch, rows)
        masks = adapter.ablated() if state == "deployed" else adapter._state()
        with torch.enable_grad(), policy.training(), masks, adapter.probing(len(rows)) as c:
            lp = logps(policy, part, temperature)
            loss = scored_loss(lp, part.completion_mask, part.advantages, max_completion_length).sum()
            grads = torch.autograd.grad(loss, list(c.values()))
        stacked = rearrange(list(grads), "m g 1 r -> g m r")
        scored[rows, : lp.shape[1]] = lp.detach()
        for i, g in zip(rows.tolist(), stacked):
            gradients[i] = g
    return torch.stack(gradients), scored


def unit_per_module(v: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Unit norm for each module; a module without signal keeps its zero row."""
    return torch.nn.functional.normalize(v, dim=-1)


def v_grad(hack: Float[Tensor, "p m r"], clean: Float[Tensor, "p m r"]) -> Float[Tensor, "m r"]:
    """unit( mean over pairs of g(hack, A=+1) + g(clean, A=−1) ); both arguments at A = +1, so the clean side is subtracted."""
    return unit_per_module((hack - clean).mean(0))


def haar(m: int, r: int, seed: int) -> Float[Tensor, "m r"]:
    """A Haar-random unit vector for every module: the normalised Gaussian, by a generator of its own."""
    return unit_per_module(torch.randn(m, r, generator=torch.Generator().manual_seed(seed)))


def cosine_score(gradients: Float[Tensor, "g m r"], v: Float[Tensor, "m r"]) -> Float[Tensor, " g"]:
    """Unweighted mean over modules of cos(g_i, v); a zero row of v or of a gradient counts as 0."""
    return torch.nn.functional.cosine_similarity(gradients, v.to(gradients)[None], dim=-1).mean(-1)


def out_of_sample_scores(
    hack: Float[Tensor, "p m r"], clean: Float[Tensor, "p m r"], prompt: Int[Tensor, " p"]
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Scores of both sides at A = +1, each pair by a v that was built without any pair on its prompt.

    With a single prompt nothing can be left out; the scores are then NaN, and a band made of them routes nothing.
    """
    scores = hack.new_full((2, len(hack)), float("nan"))
    for i in range(len(hack)):
        others = prompt != prompt[i]
        if others.any():
            v = v_grad(hack[others], clean[others])
            scores[0, i], scores[1, i] = cosine_score(hack[i][None], v)[0], cosine_score(clean[i][None], v)[0]
    return scores[0], scores[1]
