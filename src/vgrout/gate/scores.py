"""The family of scores: how hack-like is this rollout's update, without any label. One interface, one audit.

A `Score` is refreshed on the pairs at a cadence, scores a batch, and gives the pairs' own out-of-sample scores, from which a gate
takes its cut points. A control is a score too: it may reuse what the real score computed on the same batch (`shared`).
Scores are [g], or [g, s] at token granularity. The likelihood ratios are in `ratios.py`, confounds and oracle in `controls.py`.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.gate.direction import (
    activations,
    contrast,
    haar,
    out_of_sample,
    probe_gradients,
    project,
)
from vgrout.model.batch import Batch, Origin
from vgrout.model.policy import Policy


@dataclass(slots=True)
class Scored:
    """A batch under a score, with what a control or the update may use again."""

    scores: Float[Tensor, "g *s"]
    features: Float[Tensor, "g s m k"] | None = None
    ref_logps: Float[Tensor, "g t"] | None = None  # of the base, where the score needed them
    mass: Float[Tensor, " g"] | None = None  # norm of the row's c-probe gradient
    stats: dict[str, float] = field(default_factory=dict)  # figures of the score's own, for the log


class Score:
    """Base: nothing to refresh, nothing to store, no pairs."""

    pairs_hack: Tensor | None = (
        None  # out-of-sample scores of the pairs' sides: the band's material
    )
    pairs_clean: Tensor | None = None

    def refresh(self, policy: Policy) -> dict[str, float]:
        return {}

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if k in self.stored and v is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for k in self.stored:
            setattr(self, k, state.get(k))

    stored: tuple[str, ...] = ()


class DirectionScore(Score):
    """Cosine (or dot product) of a row's features with the pairs' hack-minus-clean direction.

    space "c_probe" is v_grad, "bottleneck" and "residual" are v_act. `signed_score` multiplies by the sign of the advantage (the
    score of the update) where the features are gradients; without it the score is of the completion (A = 1).
    `pairs` is one batch of hack sides followed by clean sides, `group` numbering the prompts.
    """

    stored = ("v", "midpoint", "pairs_hack", "pairs_clean")

    def __init__(
        self, pairs: Batch, *, space: str, probe: dict, centred: bool = False, metric: str = "cosine",
        signed_score: bool = True, by_token: bool = False, layer: int | None = None,
    ):  # fmt: skip
        self.pairs, self.space, self.probe, self.centred, self.metric = (
            pairs,
            space,
            probe,
            centred,
            metric,
        )
        self.signed_score, self.by_token, self.layer = (
            signed_score and space == "c_probe",
            by_token,
            layer,
        )
        self.v: Tensor | None = None
        self.midpoint: Tensor | None = None

    def features(self, policy: Policy, batch: Batch) -> Float[Tensor, "g s m k"]:
        if self.space == "c_probe":
            return probe_gradients(policy, batch, by_token=self.by_token, **self.probe)
        return activations(
            policy,
            batch,
            space=self.space,
            token_budget=self.probe["token_budget"],
            layer=self.layer,
        )

    def refresh(self, policy: Policy) -> dict[str, float]:
        """Extract the direction anew at the current parameters; returns its drift, the cosine with the last one."""
        n, last = len(self.pairs.advantages) // 2, self.v
        features = self.features(policy, self.pairs)
        rows = features.sum(1)  # the direction is of whole completions, at either granularity
        self.v, self.midpoint = contrast(rows[:n], rows[n:])
        self.pairs_hack, self.pairs_clean = self._pair_scores(features, rows)
        return {"direction_drift": float("nan") if last is None else float(project(self.v, last))}

    def _pair_scores(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        n = len(rows) // 2
        if not self.by_token:
            return out_of_sample(
                rows[:n], rows[n:], self.pairs.group[:n], centred=self.centred, metric=self.metric
            )
        sides: list[list[Tensor]] = [
            [],
            [],
        ]  # every completion token's score, by a direction without its pair's prompt
        for i in range(n):
            others = self.pairs.group[:n] != self.pairs.group[i]
            v, midpoint = contrast(rows[:n][others], rows[n:][others])
            for side, row in zip(sides, (i, n + i)):
                start, end = (
                    int(self.pairs.completion_start[row]) - 1,
                    int(self.pairs.attention_mask[row].sum()) - 1,
                )  # what predicts it
                side.append(self._score(features[row, start:end], v, midpoint))
        return torch.cat(sides[0]), torch.cat(sides[1])

    def _score(
        self, features: Float[Tensor, "*n m k"], v: Tensor, midpoint: Tensor | None
    ) -> Float[Tensor, "*n"]:
        return project(features - midpoint if self.centred else features, v, self.metric)

    def directed(
        self, features: Float[Tensor, "g s m k"], v: Tensor, advantages: Float[Tensor, " g"]
    ) -> Float[Tensor, "g *s"]:
        """Scores of a batch's features along any direction of this space."""
        scores = self._score(features, v, self.midpoint)
        if self.signed_score:
            scores = scores * advantages.sign()[:, None]
        return scores if self.by_token else scores[:, 0]

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        features = self.features(policy, batch)
        mass = features.flatten(1).norm(dim=1) if self.space == "c_probe" else None
        return Scored(self.directed(features, self.v, batch.advantages), features, mass=mass)


class HaarScore(Score):
    """A Haar-random direction in another score's space, drawn anew whenever that score is refreshed."""

    def __init__(self, real: DirectionScore, seed: int):
        self.real, self.seed, self.draws = real, seed, torch.tensor(0)

    stored = ("draws",)

    def refresh(self, policy: Policy) -> dict[str, float]:
        self.draws = self.draws + 1
        return {}

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        m, k = self.real.v.shape
        v = haar(m, k, 1_000 * self.seed + int(self.draws)).to(self.real.v)
        return Scored(self.real.directed(shared.features, v, batch.advantages))
