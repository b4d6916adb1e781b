"""Controls: another score deals the real gate's zones, at the real gate's shares.

In each stratum of each batch a control routes exactly as many ROUTE and ABSORB rows as the real
gate
did, to the rows that the control ranks highest. So a placebo differs from the real arm in nothing
but
its score: same batch, same cadence, same shares, same code path. Controls alone see a step's
rollouts,
for the strata; no score, gate or action does.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.core import NO_ZONE, Zone
from vgrout.env.rollouts import Composed
from vgrout.gate.gate import Gate, Gated, PinnedGate, _column, by_content
from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio, build_llr
from vgrout.gate.scores import Materials, Score, Scored
from vgrout.gate.swap import logps_with
from vgrout.gate.v_grad import DirectionScore, direction_score, haar
from vgrout.model.batch import Batch
from vgrout.model.likelihood import random_deltas
from vgrout.model.policy import Policy


class Keep:
    """No control: the real gate's zones stand."""

    def refresh(self, policy: Policy) -> dict[str, float]:
        return {}

    def __call__(
        self,
        policy: Policy,
        composed: Composed,
        gated: Gated,
    ) -> Gated:
        return gated

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class Control(Keep):
    """Re-deals the gate's zones by a score of its own; refreshed at the gate's cadence."""

    def __init__(
        self,
        gate: Gate,
        score: "ControlScore",
    ):
        self.gate, self.score = gate, score

    def refresh(self, policy: Policy) -> dict[str, float]:
        self.score.refresh(policy)
        return {}

    def __call__(
        self,
        policy: Policy,
        composed: Composed,
        gated: Gated,
    ) -> Gated:
        scores = self.score.rank(policy, composed, gated.scored)
        batch = composed.batch
        zones = match_shares(gated.zones, scores, strata(composed.student, batch.advantages))
        return self.gate.gated(batch, zones, scores, gated.scored)

    def state_dict(self) -> dict[str, Tensor]:
        return self.score.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.score.load_state_dict(state)


def strata(
    student: Bool[Tensor, " g"],
    advantages: Float[Tensor, " g"],
) -> Int[Tensor, " g"]:
    """Sign of the advantage × student or demonstration: strata whose shares a control copies."""
    return 2 * advantages.sign().long() + student.long()


def match_shares(
    shadow: Int[Tensor, "g *s"],
    scores: Float[Tensor, "g *_"],
    stratum: Int[Tensor, " g"],
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

    def rank(
        self,
        policy: Policy,
        composed: Composed,
        real: Scored,
    ) -> Float[Tensor, "g *s"]:
        raise NotImplementedError


class Haar(ControlScore):
    """A Haar-random direction in another score's space, drawn anew whenever it is refreshed."""

    stored = ("draws",)

    def __init__(
        self,
        real: DirectionScore,
        seed: int,
    ):
        self.real, self.seed, self.draws = real, seed, torch.tensor(0)

    def refresh(self, policy: Policy) -> dict[str, float]:
        self.draws = self.draws + 1
        return {}

    def rank(
        self,
        policy: Policy,
        composed: Composed,
        real: Scored,
    ) -> Float[Tensor, "g *s"]:
        m, k = self.real.v.shape
        v = haar(m, k, 1_000 * self.seed + int(self.draws)).to(self.real.v)
        return self.real.directed(real.features, v, composed.batch.advantages)


class RandomQuarantine(Haar):
    """A Gaussian delta with the norm of the quarantine's in every tensor, on the base."""

    def __init__(
        self,
        real: QuarantineRatio,
        seed: int,
    ):
        self.real, self.seed, self.draws = real, seed, torch.tensor(0)

    def rank(
        self,
        policy: Policy,
        composed: Composed,
        real: Scored,
    ) -> Float[Tensor, " g"]:
        learned = policy.adapter.parameters("quarantine")
        noise = random_deltas(learned, 1_000 * self.seed + int(self.draws))
        how = self.real.temperature, self.real.token_budget
        return logps_with(policy, noise, composed.batch, *how).sum(1) - real.ref_logps.sum(1)


class Random(ControlScore):
    """Uniform scores."""

    def __init__(self, seed: int):
        self.seed = seed

    def rank(
        self,
        policy: Policy,
        composed: Composed,
        real: Scored,
    ) -> Float[Tensor, " g"]:
        return by_content(composed.batch, self.seed).to(composed.batch.advantages)


class Confound(ControlScore):
    """What the advantage, the reward, the length or the mean log-prob alone would route."""

    def __init__(self, kind: str):
        self.kind = kind

    def rank(
        self,
        policy: Policy,
        composed: Composed,
        real: Scored,
    ) -> Float[Tensor, " g"]:
        batch: Batch = composed.batch
        length = batch.completion_mask.sum(1)
        if self.kind == "logp":
            mean = composed.behaviour.logps.sum(1) / length
            return mean.nan_to_num(nan=float(mean.nanmean()))
        kinds = {"advantage": batch.advantages, "reward": batch.rewards, "length": length.float()}
        return kinds[self.kind]


class OtherScore(ControlScore):
    """A score of the same kind as the real one: on other pairs, or with random nudges."""

    def __init__(self, score: Score):
        self.score = score

    def refresh(self, policy: Policy) -> dict[str, float]:
        return self.score.refresh(policy)

    def rank(
        self,
        policy: Policy,
        composed: Composed,
        real: Scored,
    ) -> Float[Tensor, "g *s"]:
        return self.score(policy, composed.batch).scores

    def state_dict(self) -> dict[str, Tensor]:
        return self.score.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.score.load_state_dict(state)


def build_control(
    name: str,
    gate: Gate | PinnedGate,
    materials: Materials,
    placebo: Sequence = (),
) -> Keep:
    """What deals the gate's zones; `placebo` are the pairs of the control "semantic"."""
    config = materials.config.control
    seed = config.placebo_seed
    if config.routeV_random_v_seed is not None:
        seed = config.routeV_random_v_seed
    if not name:
        return Keep()
    if name == "random":
        return Control(gate, Random(seed))
    if name == "confound":
        return Control(gate, Confound(config.confound))
    if name == "semantic":
        space = getattr(gate.score, "space", "c_probe")
        return Control(
            gate, OtherScore(direction_score(materials, space, materials.batch(placebo)))
        )
    if isinstance(gate.score, LikelihoodRatio):
        return Control(gate, OtherScore(build_llr(materials, random_seed=seed)))
    if isinstance(gate.score, QuarantineRatio):
        return Control(gate, RandomQuarantine(gate.score, seed))
    return Control(gate, Haar(gate.score, seed))


def zone_counts(zones: Int[Tensor, "g *s"]) -> dict[str, int]:
    """Rows (or tokens) in each zone."""
    return {zone.name.lower(): int((zones == zone).sum()) for zone in Zone}
