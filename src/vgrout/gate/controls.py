"""Controls: another score deals the real gate's zones, at the real gate's shares.

In each stratum of each batch a control routes exactly as many ROUTE and ABSORB rows as the real
gate did, to the rows that the control ranks highest. So a placebo differs from the real arm in
nothing but its score: same batch, same cadence, same shares, same code path. Controls alone see a
step's rollouts, for the strata; no score, gate or action does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.core import NO_ZONE
from vgrout.env.rollouts import Composed
from vgrout.gate.gate import Gate, Gated, PinnedGate, _column, by_content
from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio, build_llr
from vgrout.gate.scores import Materials, Score, Scored, Stateful
from vgrout.gate.swap import logps_with
from vgrout.gate.v_grad import DirectionScore, direction_score, haar
from vgrout.model.likelihood import random_deltas
from vgrout.model.policy import Policy


class Keep(Stateful):
    """No control: the real gate's zones stand."""

    def __call__(self, policy: Policy, composed: Composed, gated: Gated) -> Gated:
        return gated


@dataclass
class Control(Keep):
    """Re-deals the gate's zones by a score of its own; refreshed at the gate's cadence."""

    gate: Gate
    score: "ControlScore"

    def refresh(self, policy: Policy) -> dict[str, float]:
        self.score.refresh(policy)
        return {}

    def __call__(self, policy: Policy, composed: Composed, gated: Gated) -> Gated:
        scores = self.score.rank(policy, composed, gated.scored)
        batch = composed.batch
        zones = match_shares(gated.zones, scores, strata(composed.student, batch.advantages))
        return self.gate.gated(batch, zones, scores, gated.scored)


def strata(student: Bool[Tensor, " g"], advantages: Float[Tensor, " g"]) -> Int[Tensor, " g"]:
    """Sign of the advantage × student or demonstration: strata whose shares a control copies."""
    return 2 * advantages.sign().long() + student.long()


def match_shares(
    shadow: Int[Tensor, "g *s"], scores: Float[Tensor, "g *_"], stratum: Int[Tensor, " g"]
) -> Int[Tensor, "g *s"]:
    """In each stratum the highest scores get the shadow gate's ROUTEs, the next its ABSORBs.

    What is in NO_ZONE stays there. Example, one stratum:
    shadow [ROUTE, RETAIN, ABSORB], scores [.1, .9, .5] → [RETAIN, ROUTE, ABSORB].
    """
    zones = shadow.clone().flatten()
    scores = _column(scores, shadow).expand_as(shadow).flatten()
    stratum = _column(stratum, shadow).expand_as(shadow).flatten()
    for s in stratum.unique():
        places = ((stratum == s) & (zones != NO_ZONE)).nonzero()[:, 0]
        ranked = places[scores[places].argsort(descending=True, stable=True)]
        zones[ranked] = shadow.flatten()[places].sort(descending=True).values
    return zones.reshape(shadow.shape)


# ── the scores by which controls rank ────────────────────────────────────────────────────────────


class ControlScore(Score):
    """Ranks a step's rows; may use again what the real score computed on the same batch."""

    def rank(self, policy: Policy, composed: Composed, real: Scored) -> Float[Tensor, "g *s"]:
        raise NotImplementedError


@dataclass
class Haar(ControlScore):
    """A Haar-random direction in another score's space, drawn anew whenever it is refreshed."""

    real: Score
    seed: int
    stored = ("draws",)

    def __post_init__(self):
        self.draws = torch.tensor(0)

    def refresh(self, policy: Policy) -> dict[str, float]:
        self.draws = self.draws + 1
        return {}

    @property
    def drawn(self) -> int:
        """The seed of what is drawn between two refreshes."""
        return 1_000 * self.seed + int(self.draws)

    def rank(self, policy: Policy, composed: Composed, real: Scored) -> Float[Tensor, "g *s"]:
        v = haar(*self.real.v.shape, self.drawn).to(self.real.v)
        return self.real.directed(real.features, v, composed.batch.advantages)


class RandomQuarantine(Haar):
    """A Gaussian delta with the norm of the quarantine's in every tensor, on the base."""

    def rank(self, policy: Policy, composed: Composed, real: Scored) -> Float[Tensor, " g"]:
        learned = policy.adapter.parameters("quarantine")
        noise = random_deltas(learned, self.drawn)
        lp = logps_with(policy, noise, composed.batch, self.real.temperature)
        return lp.sum(1) - real.ref_logps.sum(1)


@dataclass
class Random(ControlScore):
    """Uniform scores."""

    seed: int

    def rank(self, policy: Policy, composed: Composed, real: Scored) -> Float[Tensor, " g"]:
        return by_content(composed.batch, self.seed).to(composed.batch.advantages)


@dataclass
class Confound(ControlScore):
    """What the advantage, the reward, the length or the mean log-prob alone would route."""

    kind: str

    def rank(self, policy: Policy, composed: Composed, real: Scored) -> Float[Tensor, " g"]:
        batch = composed.batch
        length = batch.completion_mask.sum(1)
        if self.kind == "logp":
            mean = composed.behaviour.logps.sum(1) / length
            return mean.nan_to_num(nan=float(mean.nanmean()))
        kinds = {"advantage": batch.advantages, "reward": batch.rewards, "length": length.float()}
        return kinds[self.kind]


@dataclass
class OtherScore(ControlScore):
    """A score of the same kind as the real one: on other pairs, or with random nudges."""

    score: Score

    def rank(
        self,
        policy: Policy,
        composed: Composed,
        real: Scored,
    ) -> Float[Tensor, "g *s"]:
        return self.score(policy, composed.batch).scores


def build_control(
    name: str,
    gate: Gate | PinnedGate,
    materials: Materials,
    placebo: Sequence = (),
) -> Keep:
    """What deals the gate's zones; `placebo` are the pairs of the control "semantic"."""
    config = materials.config.control
    other = config.routeV_random_v_seed
    seed = config.placebo_seed if other is None else other
    if not name:
        return Keep()
    match name, gate.score:
        case "random", _:
            score = Random(seed)
        case "confound", _:
            score = Confound(config.confound)
        case "semantic", DirectionScore(space=space):
            score = OtherScore(direction_score(materials, space, materials.batch(placebo)))
        case _, LikelihoodRatio():
            score = OtherScore(build_llr(materials, random_seed=seed))
        case _, QuarantineRatio():
            score = RandomQuarantine(gate.score, seed)
        case _:
            score = Haar(gate.score, seed)
    return Control(gate, score)
