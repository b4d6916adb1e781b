"""Directions: features of a rollout [m, k], the pairs' hack-minus-clean direction, the cosine
with it.

Features: the c-probe gradient ∂L/∂c (one number for each rank of the deployed bottleneck of each
Linear: v_grad), the bottleneck activation A x itself, or the residual stream (v_act).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vgrout.gate.scores import Materials, ProbeOptions, Score, Scored, register
from vgrout.model.batch import Batch
from vgrout.model.grpo import scored_loss
from vgrout.model.policy import Policy, completion_states, logps, predicting
from vgrout.model.tokens import select


@dataclass
class DirectionScore(Score):
    """Cosine of a row's features with the pairs' hack-minus-clean direction.

    space "c_probe" is v_grad, "bottleneck" and "residual" are v_act. `signed_score` multiplies by
    the sign of the advantage (the score of the update) where the features are gradients; without
    it the score is of the completion (A = 1). `pairs` is one batch of hack sides followed by clean
    sides, `group` numbering the prompts.
    """

    pairs: Batch
    _: KW_ONLY
    space: str
    probe: ProbeOptions
    centred: bool = False
    signed_score: bool = True
    by_token: bool = False
    stored = ("v", "midpoint", "pairs_hack", "pairs_clean")
    v = midpoint = None

    def features(self, policy: Policy, batch: Batch) -> Float[Tensor, "g s m k"]:
        if self.space == "c_probe":
            return probe_gradients(policy, batch, self.probe, by_token=self.by_token)
        return activations(policy, batch, self.space)

    def refresh(self, policy: Policy) -> dict[str, float]:
        """Extract the direction anew; returns its drift, the cosine with the last one."""
        n, last = len(self.pairs.advantages) // 2, self.v
        features = self.features(policy, self.pairs)
        rows = features.sum(1)  # the direction is of whole completions, at either granularity
        self.v, self.midpoint = contrast(rows[:n], rows[n:])
        parts = None
        if self.by_token:  # the positions that predict a completion's tokens
            starts, ends = self.pairs.completion_start, self.pairs.attention_mask.sum(1)
            parts = [x[i - 1 : j - 1] for x, i, j in zip(features, starts, ends)]
        how = {"centred": self.centred, "parts": parts}
        sides = out_of_sample(rows[:n], rows[n:], self.pairs.group[:n], **how)
        self.pairs_hack, self.pairs_clean = sides
        drift = float("nan") if last is None else float(project(self.v, last))
        return {"direction_drift": drift}

    def directed(
        self,
        features: Float[Tensor, "g s m k"],
        v: Tensor,
        advantages: Float[Tensor, " g"],
    ) -> Float[Tensor, "g *s"]:
        """Scores of a batch's features along any direction of this space."""
        if self.centred:
            features = features - self.midpoint.to(features)
        scores = project(features, v)
        if self.signed_score and self.space == "c_probe":
            scores = scores * advantages.sign()[:, None]
        return scores if self.by_token else scores[:, 0]

    def __call__(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Scored:
        features = self.features(policy, batch)
        mass = features.flatten(1).norm(dim=1) if self.space == "c_probe" else None
        return Scored(self.directed(features, self.v, batch.advantages), features, mass=mass)


def direction_score(
    materials: Materials,
    space: str,
    pairs: Batch | None = None,
) -> DirectionScore:
    """The direction in a space, from the run's pairs or from others."""
    score = materials.config.score
    return DirectionScore(
        materials.batch() if pairs is None else pairs,
        space=space,
        probe=materials.probe,
        centred=score.centred,
        signed_score=score.score_sign == "advantage",
        by_token=score.granularity == "token",
    )


@register("v_grad")
def build_v_grad(materials: Materials) -> DirectionScore:
    return direction_score(materials, "c_probe")


@register("v_act")
def build_v_act(materials: Materials) -> DirectionScore:
    return direction_score(materials, materials.config.score.act_space)


# ── features ─────────────────────────────────────────────────────────────────────────────────────


def probe_gradients(
    policy: Policy,
    batch: Batch,
    options: ProbeOptions,
    by_token: bool = False,
) -> Float[Tensor, "g s m r"]:
    """∂L_i/∂c of every row at A = 1, L_i = −Σ_t logp_t / max_completion_length.

    The gradient at another advantage is A times this one. c multiplies the bottleneck at the
    positions that predict the completion, so that rows of one prompt share its keys and values, or
    with positions "all" the prompt's too. s is 1, or with `by_token` the sequence (all positions; a
    token's gradient includes its effect on later tokens; padding is 0). No `.grad` is touched.
    """
    adapter = policy.adapter
    everywhere = by_token or options.positions == "all"
    shared = policy.share_prompts and not everywhere
    width = batch.input_ids.shape[1] if by_token else 1
    shape = len(batch.advantages), width, len(adapter.linears), adapter.rank
    gradients = torch.zeros(shape, device=policy.device)
    for rows in policy.micro_batches(batch, shared):
        part = select(batch, rows)
        length = part.input_ids.shape[1]
        s = length if by_token else 1
        column = torch.arange(length, device=rows.device)
        where = None if everywhere else column >= part.completion_start[:, None] - 1
        masks = adapter.ablated() if options.state == "deployed" else nullcontext()
        with torch.enable_grad(), policy.training(), masks:
            with adapter.probing(len(rows), s, where) as c:
                lp = logps(
                    policy, part, options.temperature, share=not everywhere, prompt_grad=False
                )
                ones = torch.ones_like(part.advantages)
                limit = options.max_completion_length
                loss = scored_loss(lp, part.completion_mask, ones, limit).sum()
                grads = torch.autograd.grad(loss, list(c.values()))
        gradients[rows, :s] = rearrange(list(grads), "m g s r -> g s m r")
    return gradients


@torch.no_grad()
def activations(
    policy: Policy,
    batch: Batch,
    space: str,
) -> Float[Tensor, "g 1 m k"]:
    """Mean over the completion's tokens but its last (no token is predicted there).

    Of the deployed bottleneck A x (space "bottleneck": m = Linears, k = r) or of the residual
    stream after each layer ("residual": m = layers, k = width; the last one behind the final
    norm, as transformers gives it). Both blocks on, unmasked.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in policy.micro_batches(batch):
        part = select(batch, rows)
        inside = part.completion_mask.clone()
        inside[:, 0] &= part.completion_mask.sum(1) == 1  # the prompt's last token, unless alone
        weight = inside / inside.sum(1, keepdim=True)
        with policy.adapter.recording() as seen:
            states = completion_states(policy, part, layers=True)
        if space == "bottleneck":  # a forward pass over whole rows has recorded them whole
            width = weight.shape[1]
            streams = [x if x.shape[1] == width else predicting(part, x) for x in seen.values()]
        else:
            streams = states
        pooled = [torch.einsum("gtk,gt->gk", x.float(), weight) for x in streams]
        parts.append((rows, rearrange(pooled, "m g k -> g 1 m k")))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([x for _, x in parts])[order]


# ── directions ───────────────────────────────────────────────────────────────────────────────────


def unit_per_module(v: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Unit norm for each module; a module without signal keeps its zero row."""
    return torch.nn.functional.normalize(v, dim=-1)


def contrast(
    hack: Float[Tensor, "p m k"], clean: Float[Tensor, "p m k"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m k"]]:
    """(direction, midpoint) of the pairs' features at A = +1.

    For c-probe gradients the direction is v_grad = unit( mean of g(hack, A=+1) + g(clean, A=−1) ).
    """
    return unit_per_module((hack - clean).mean(0)), (hack + clean).mean(0) / 2


def haar(
    m: int,
    k: int,
    seed: int,
) -> Float[Tensor, "m k"]:
    """A Haar-random unit vector for every module: the normalised Gaussian, by its own generator."""
    return unit_per_module(torch.randn(m, k, generator=torch.Generator().manual_seed(seed)))


def project(
    features: Float[Tensor, "*n m k"],
    v: Float[Tensor, "m k"],
) -> Float[Tensor, "*n"]:
    """Unweighted mean over modules of the cosine with v, a unit vector there; zero rows are 0."""
    norm = features.norm(dim=-1).clamp(min=1e-12)
    return ((features * v.to(features)).sum(-1) / norm).mean(-1)


def out_of_sample(
    hack: Float[Tensor, "p m k"],
    clean: Float[Tensor, "p m k"],
    prompt: Int[Tensor, " p"],
    *,
    centred: bool = False,
    parts: Sequence[Tensor] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Scores of both sides at A = +1, each pair by a direction without any pair on its prompt.

    Each side has one score, or as many as it has `parts` [n, m, k] (hack sides, then clean ones).
    With a single prompt nothing can be left out; the scores are then NaN, and a band made of them
    routes nothing.
    """
    parts = torch.cat([hack, clean])[:, None] if parts is None else parts
    scores = []
    for i, part in enumerate(parts):
        others = prompt != prompt[i % len(prompt)]
        v, midpoint = contrast(hack[others], clean[others])
        scores.append(project(part - midpoint if centred else part, v))
    n = len(prompt)
    return torch.cat(scores[:n]), torch.cat(scores[n:])
