"""Directions: features of a rollout [m, k], the pairs' hack-minus-clean direction, the cosine
with it.

Features: the c-probe gradient ∂L/∂c (one number for each rank of the deployed bottleneck of each
Linear: v_grad), the bottleneck activation A x itself, or the residual stream (v_act).
"""

from contextlib import nullcontext

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vgrout.core import UserError
from vgrout.gate.scores import Materials, ProbeOptions, Score, Scored, register
from vgrout.model.batch import Batch
from vgrout.model.grpo import scored_loss
from vgrout.model.policy import Policy, completion_states, logps, predicting
from vgrout.model.tokens import micro_batches, select


class DirectionScore(Score):
    """Cosine (or dot product) of a row's features with the pairs' hack-minus-clean direction.

    space "c_probe" is v_grad, "bottleneck" and "residual" are v_act. `signed_score` multiplies by
    the
    sign of the advantage (the score of the update) where the features are gradients; without it the
    score is of the completion (A = 1). `pairs` is one batch of hack sides followed by clean sides,
    `group` numbering the prompts.
    """

    stored = ("v", "midpoint", "pairs_hack", "pairs_clean")

    def __init__(
        self,
        pairs: Batch,
        *,
        space: str,
        probe: ProbeOptions,
        centred: bool = False,
        metric: str = "cosine",
        signed_score: bool = True,
        by_token: bool = False,
        layer: int | None = None,
    ):
        self.pairs, self.space, self.probe = pairs, space, probe
        self.centred, self.metric, self.layer = centred, metric, layer
        self.signed_score = signed_score and space == "c_probe"
        self.by_token = by_token
        self.v: Tensor | None = None
        self.midpoint: Tensor | None = None

    def features(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Float[Tensor, "g s m k"]:
        if self.space == "c_probe":
            return probe_gradients(policy, batch, self.probe, by_token=self.by_token)
        budget = self.probe.token_budget
        return activations(policy, batch, space=self.space, token_budget=budget, layer=self.layer)

    def refresh(self, policy: Policy) -> dict[str, float]:
        """Extract the direction anew; returns its drift, the cosine with the last one."""
        n, last = len(self.pairs.advantages) // 2, self.v
        features = self.features(policy, self.pairs)
        rows = features.sum(1)  # the direction is of whole completions, at either granularity
        self.v, self.midpoint = contrast(rows[:n], rows[n:])
        self.pairs_hack, self.pairs_clean = self._pair_scores(features, rows)
        drift = float("nan") if last is None else float(project(self.v, last))
        return {"direction_drift": drift}

    def _pair_scores(
        self,
        features: Float[Tensor, "g s m k"],
        rows: Float[Tensor, "g m k"],
    ) -> tuple[Tensor, Tensor]:
        """Each side's scores by a direction without its pair's prompt: of rows, or of tokens."""
        n = len(rows) // 2
        prompt = self.pairs.group[:n]
        if not self.by_token:
            hack, clean = rows[:n], rows[n:]
            return out_of_sample(hack, clean, prompt, centred=self.centred, metric=self.metric)
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i in range(n):
            others = prompt != prompt[i]
            v, midpoint = contrast(rows[:n][others], rows[n:][others])
            for side, row in zip(sides, (i, n + i)):
                start = int(self.pairs.completion_start[row]) - 1  # what predicts the first token
                end = int(self.pairs.attention_mask[row].sum()) - 1
                side.append(self._score(features[row, start:end], v, midpoint))
        return torch.cat(sides[0]), torch.cat(sides[1])

    def _score(
        self,
        features: Float[Tensor, "*n m k"],
        v: Tensor,
        midpoint: Tensor | None,
    ) -> Float[Tensor, "*n"]:
        if self.centred:
            features = features - midpoint.to(features)
        return project(features, v, self.metric)

    def directed(
        self,
        features: Float[Tensor, "g s m k"],
        v: Tensor,
        advantages: Float[Tensor, " g"],
    ) -> Float[Tensor, "g *s"]:
        """Scores of a batch's features along any direction of this space."""
        scores = self._score(features, v, self.midpoint)
        if self.signed_score:
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
        metric=score.metric,
        signed_score=score.score_sign == "advantage",
        by_token=score.granularity == "token",
        layer=score.act_layer,
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
    positions
    that predict the completion, so that rows of one prompt share its keys and values, or with
    positions "all" the prompt's too. s is 1, or with `by_token` the sequence (all positions; a
    token's
    gradient includes its effect on later tokens; padding is 0). No `.grad` is touched.
    """
    adapter = policy.adapter
    everywhere = by_token or options.positions == "all"
    shared = policy.share_prompts and not everywhere
    gradients: Tensor | None = None
    for rows in micro_batches(batch, options.token_budget, by_prompt=shared):
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
        stacked = rearrange(list(grads), "m g s r -> g s m r")
        if gradients is None:
            width = batch.input_ids.shape[1] if by_token else 1
            gradients = stacked.new_zeros(len(batch.advantages), width, *stacked.shape[2:])
        gradients[rows, :s] = stacked
    return gradients


@torch.no_grad()
def activations(
    policy: Policy,
    batch: Batch,
    *,
    space: str,
    token_budget: int,
    layer: int | None = None,
) -> Float[Tensor, "g 1 m k"]:
    """Mean over the completion's tokens but its last (no token is predicted there).

    Of the deployed bottleneck A x (space "bottleneck": m = Linears, k = r) or of the residual
    stream
    after each layer ("residual": m = layers or 1, k = width; the last one behind the final norm, as
    transformers gives it). Both blocks on, unmasked.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in micro_batches(batch, token_budget, by_prompt=policy.share_prompts):
        part = select(batch, rows)
        inside = part.completion_mask.clone()
        inside[:, 0] &= part.completion_mask.sum(1) == 1  # the prompt's last token, unless alone
        weight = inside / inside.sum(1, keepdim=True)
        with policy.adapter.recording() as seen:
            states = completion_states(policy, part, layers=True)
        if space == "bottleneck":  # a forward pass over whole rows has recorded them whole
            width = weight.shape[1]
            streams = [x if x.shape[1] == width else predicting(part, x) for x in seen.values()]
        elif layer is not None and not 0 <= layer < len(states):
            last = len(states) - 1
            raise UserError(f"--act-layer {layer} is no layer of this model: they are 0 to {last}")
        else:
            streams = states if layer is None else states[layer : layer + 1]
        pooled = [torch.einsum("gtk,gt->gk", x.float(), weight) for x in streams]
        parts.append((rows, rearrange(pooled, "m g k -> g 1 m k")))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([x for _, x in parts])[order]


# ── directions ───────────────────────────────────────────────────────────────────────────────────


def unit_per_module(v: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Unit norm for each module; a module without signal keeps its zero row."""
    return torch.nn.functional.normalize(v, dim=-1)


def contrast(
    hack: Float[Tensor, "p m k"],
    clean: Float[Tensor, "p m k"],
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
    metric: str = "cosine",
) -> Float[Tensor, "*n"]:
    """Unweighted mean over modules of the cosine with v, or of the dot product; zero rows are 0."""
    dot = (features * v.to(features)).sum(-1)
    norm = features.norm(dim=-1).clamp(min=1e-12)
    return (dot if metric == "dot" else dot / norm).mean(-1)


def out_of_sample(
    hack: Float[Tensor, "p m k"],
    clean: Float[Tensor, "p m k"],
    prompt: Int[Tensor, " p"],
    *,
    centred: bool = False,
    metric: str = "cosine",
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Scores of both sides at A = +1, each pair by a direction without any pair on its prompt.

    With a single prompt nothing can be left out; the scores are then NaN, and a band made of them
    routes nothing.
    """
    scores = hack.new_full((2, len(hack)), float("nan"))
    for i in range(len(hack)):
        others = prompt != prompt[i]
        if others.any():
            v, midpoint = contrast(hack[others], clean[others])
            both = torch.stack([hack[i], clean[i]]) - (midpoint if centred else 0)
            scores[:, i] = project(both, v, metric)
    return scores[0], scores[1]
