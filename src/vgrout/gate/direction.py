"""What a direction is made of: features of a rollout [m, k], the pairs' hack-minus-clean direction, and the cosine with it.

Features: the c-probe gradient ∂L/∂c (one number for each rank of the deployed bottleneck of each Linear), the bottleneck
activation A x itself, or the residual stream. See docs/method.md, "Scores".
"""

from contextlib import nullcontext

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vgrout.core import UserError
from vgrout.model.batch import Batch
from vgrout.model.grpo import scored_loss
from vgrout.model.policy import Policy, completion_states, logps, predicting
from vgrout.model.tokens import micro_batches, select


def probe_gradients(
    policy: Policy,
    batch: Batch,
    *,
    max_completion_length: int,
    temperature: float,
    token_budget: int,
    state: str = "as_trained",
    positions: str = "completion",
    by_token: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "g s m r"]:
    """∂L_i/∂c of every row at A = 1, L_i = −Σ_t logp_t / max_completion_length.

    The gradient at another advantage is A times this one. c multiplies the bottleneck at the positions that predict the
    completion, so that rows of one prompt share its keys and values, or with `positions` "all" the prompt's too. s is 1, or with
    `by_token` the sequence (all positions; a token's gradient includes its effect on later tokens; padding is 0). `state`
    "deployed" probes with the quarantine ablated; `dtype` is that of the products of an fp32 model. No `.grad` is touched.
    """
    adapter, length = policy.adapter, batch.input_ids.shape[1] if by_token else 1
    everywhere = by_token or positions == "all"
    gradients: Tensor | None = None
    for rows in micro_batches(
        batch, token_budget, by_prompt=policy.share_prompts and not everywhere
    ):
        part = select(batch, rows)
        s = part.input_ids.shape[1] if by_token else 1
        column = torch.arange(part.input_ids.shape[1], device=rows.device)
        where = None if everywhere else column >= part.completion_start[:, None] - 1
        masks = adapter.ablated() if state == "deployed" else nullcontext()
        with (
            torch.enable_grad(),
            policy.training(),
            adapter.rounded(dtype),
            masks,
            adapter.probing(len(rows), s, where) as c,
        ):
            lp = logps(policy, part, temperature, share=not everywhere, prompt_grad=False)
            loss = scored_loss(
                lp, part.completion_mask, torch.ones_like(part.advantages), max_completion_length
            ).sum()
            grads = torch.autograd.grad(loss, list(c.values()))
        stacked = rearrange(list(grads), "m g s r -> g s m r")
        if gradients is None:
            gradients = stacked.new_zeros(len(batch.advantages), length, *stacked.shape[2:])
        gradients[rows, :s] = stacked
    return gradients


@torch.no_grad()
def activations(
    policy: Policy, batch: Batch, *, space: str, token_budget: int, layer: int | None = None
) -> Float[Tensor, "g 1 m k"]:
    """Mean over the completion's tokens but its last (no token is predicted there) of the deployed bottleneck A x (space "bottleneck",
    m = Linears, k = r) or of the residual stream after each layer ("residual", m = layers or 1, k = width; the last one behind the
    final norm, as transformers gives it). Both blocks on, unmasked.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in micro_batches(batch, token_budget, by_prompt=policy.share_prompts):
        part = select(batch, rows)
        inside = part.completion_mask.clone()
        inside[:, 0] &= (
            part.completion_mask.sum(1) == 1
        )  # the prompt's last token, unless it is all there is
        weight = inside / inside.sum(1, keepdim=True)
        with policy.adapter.recording() as seen:
            states = completion_states(policy, part, layers=True)
        if space == "bottleneck":  # a forward pass over whole rows has recorded them whole
            streams = [
                x if x.shape[1] == weight.shape[1] else predicting(part, x) for x in seen.values()
            ]
        elif layer is not None and not 0 <= layer < len(states):
            raise UserError(
                f"--act-layer {layer} is no layer of this model: they are 0 to {len(states) - 1}"
            )
        else:
            streams = states if layer is None else states[layer : layer + 1]
        pooled = [torch.einsum("gtk,gt->gk", x.float(), weight) for x in streams]
        parts.append((rows, rearrange(pooled, "m g k -> g 1 m k")))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([x for _, x in parts])[order]


def unit_per_module(v: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Unit norm for each module; a module without signal keeps its zero row."""
    return torch.nn.functional.normalize(v, dim=-1)


def contrast(
    hack: Float[Tensor, "p m k"], clean: Float[Tensor, "p m k"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m k"]]:
    """(direction, midpoint) of the pairs' features at A = +1.

    For c-probe gradients the direction is v_grad = unit( mean over pairs of g(hack, A=+1) + g(clean, A=−1) ).
    """
    return unit_per_module((hack - clean).mean(0)), (hack + clean).mean(0) / 2


def haar(m: int, k: int, seed: int) -> Float[Tensor, "m k"]:
    """A Haar-random unit vector for every module: the normalised Gaussian, by a generator of its own."""
    return unit_per_module(torch.randn(m, k, generator=torch.Generator().manual_seed(seed)))


def project(
    features: Float[Tensor, "*n m k"], v: Float[Tensor, "m k"], metric: str = "cosine"
) -> Float[Tensor, "*n"]:
    """Unweighted mean over modules of the cosine with v, or of the dot product; a zero row counts as 0."""
    dot = (features * v.to(features)).sum(-1)
    return (dot if metric == "dot" else dot / features.norm(dim=-1).clamp(min=1e-12)).mean(-1)


def out_of_sample(
    hack: Float[Tensor, "p m k"],
    clean: Float[Tensor, "p m k"],
    prompt: Int[Tensor, " p"],
    *,
    centred: bool = False,
    metric: str = "cosine",
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Scores of both sides at A = +1, each pair by a direction (and midpoint) built without any pair on its prompt.

    With a single prompt nothing can be left out; the scores are then NaN, and a band made of them routes nothing.
    """
    scores = hack.new_full((2, len(hack)), float("nan"))
    for i in range(len(hack)):
        others = prompt != prompt[i]
        if others.any():
            v, midpoint = contrast(hack[others], clean[others])
            both = torch.stack([hack[i], clean[i]]) - (midpoint if centred else 0)
            scores[:, i] = project(both, v, metric)
    return scores[0], scores[1]
