"""Scores → zones, and what is done with a flagged row. A real gate sees tensors: no label, no mode, no teacher flag.

A gate holds one score and, for a control, a second score that re-deals the first one's zones: in each stratum the control routes
exactly as many ROUTE and ABSORB rows as the real gate would have, to the rows that the control ranks highest. So a placebo
differs from the real arm in nothing but its score: same batch, same cadence, same shares, same code path.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vgrout.core import NO_ZONE, Zone
from vgrout.gate.scores import Score
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.policy import Policy

BAND_QUANTILE = 0.75  # both edges: p75 of the clean and of the hack sides' out-of-sample scores


class PinnedGate:
    """Every row in one zone: the arms without a score. `absorb_share` of the rows, by chance, are in ABSORB instead."""

    def __init__(self, zone: Zone, absorb_share: float = 0.0, seed: int = 0):
        self.zone, self.absorb_share, self.seed = zone, absorb_share, seed

    def refresh(self, policy: Policy) -> dict[str, float]:
        return {}

    def __call__(self, policy: Policy, batch: Batch, origin: Origin) -> GateOutput:
        nan, zones = (
            torch.full_like(batch.advantages, float("nan")),
            torch.full_like(batch.group, int(self.zone)),
        )
        if self.absorb_share:  # by the batch's own content, so that a resumed run repeats them
            generator = torch.Generator().manual_seed(self.seed + int(batch.completion_ids.sum()))
            drawn = torch.rand(len(zones), generator=generator) < self.absorb_share
            zones = zones.masked_fill(drawn.to(zones.device), int(Zone.ABSORB))
        return GateOutput(zones, nan, float("nan"), float("nan"))

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class Gate:
    """One score, its cut (the pairs' band or midpoint, or a flag's 0.5), perhaps a control; refreshed together, at one cadence."""

    def __init__(
        self,
        score: Score,
        control: Score | None = None,
        *,
        signed: bool = False,
        cut: str = "band",
        every: bool = False,
    ):
        self.score, self.control, self.signed, self.cut = score, control, signed, cut
        self.every = (
            every or cut == "flag"
        )  # the zone is of the rollout, not of its update: of rows with A = 0 too

    def refresh(self, policy: Policy) -> dict[str, float]:
        """Refresh the score and its control; returns the direction's drift and the band."""
        figures = self.score.refresh(policy)
        if self.control is not None:
            self.control.refresh(policy)
        lower, upper = self.edges()
        cuts = upper > lower or upper == lower and self.cut in ("zero", "midpoint")
        return figures | {
            "gate_lower": lower,
            "gate_upper": upper,
            "gate_collapsed": float(not cuts),
        }

    def edges(self) -> tuple[float, float]:
        """(lower, upper) of the pairs' out-of-sample scores: p75 of the clean and of the hack sides ("band"), or both halfway
        between the sides' means ("midpoint": nothing is absorbed), or 0 whatever the pairs say ("zero"); a flag above 0.5
        is routed, below 0.25 retained ("flag")."""
        if self.cut == "flag":
            return 0.25, 0.5
        if self.cut == "zero":
            return 0.0, 0.0
        if self.cut == "midpoint":
            clean, hack = (
                float(x.double().mean()) for x in (self.score.pairs_clean, self.score.pairs_hack)
            )
            return ((clean + hack) / 2,) * 2 if hack > clean else (float("nan"),) * 2
        lower, upper = (
            torch.quantile(x.float(), BAND_QUANTILE)
            for x in (self.score.pairs_clean, self.score.pairs_hack)
        )
        return float(lower), float(upper)

    def __call__(self, policy: Policy, batch: Batch, origin: Origin) -> GateOutput:
        """Pass 1. Rows with A = 0 are RETAIN and have no score, unless the gate is of every row."""
        real = self.score(policy, batch, origin)
        lower, upper = self.edges()
        weight = torch.ones_like(batch.advantages) if self.every else batch.advantages
        cut, scores = (
            zones_from_band if self.cut in ("band", "flag") else zones_from_edge,
            real.scores,
        )
        zones = cut(scores, weight, lower, upper)
        if zones.ndim == 2:
            zones = zones.where(predicts(batch), NO_ZONE)
        if self.control is not None:
            scores = self.control(policy, batch, origin, real).scores
            zones = match_shares(zones, scores, origin.stratum)
        if (
            self.signed
        ):  # discouraging a hack is no hack-ward update: it may train the deployed block
            zones = torch.where(
                _column(batch.advantages < 0, zones) & (zones != NO_ZONE), int(Zone.RETAIN), zones
            )
        scores = torch.where(_column(weight == 0, scores), float("nan"), scores)
        if scores.ndim == 2:
            scores = scores.where(zones != NO_ZONE, float("nan"))
        mass = (
            {}
            if real.mass is None
            else routed_mass(real.mass * batch.advantages.abs(), zones, batch.advantages)
        )
        return GateOutput(zones, scores, lower, upper, real.ref_logps, real.stats | mass)

    def state_dict(self) -> dict[str, Tensor]:
        scores = {"score": self.score} | ({} if self.control is None else {"control": self.control})
        return {
            f"{name}.{k}": v
            for name, score in scores.items()
            for k, v in score.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, score in (("score.", self.score), ("control.", self.control)):
            if score is not None:
                score.load_state_dict(
                    {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
                )


def predicts(batch: Batch) -> Bool[Tensor, "g s"]:
    """The positions that have a successor, so that what is computed there can act on a completion token."""
    return F.pad(batch.attention_mask[:, 1:], (0, 1)).bool()


def _column(rows: Tensor, like: Tensor) -> Tensor:
    """[g] → [g] or [g, 1], to broadcast over `like` [g] or [g, s]."""
    return rows if rows.ndim == like.ndim else rows[:, None]


def routed_mass(
    mass: Float[Tensor, " g"], zones: Int[Tensor, "g *s"], advantages: Float[Tensor, " g"]
) -> dict[str, float]:
    """Share of the rows' summed gradient norms that ROUTE carries (by the share of a row's tokens), by sign of the advantage."""
    routed, zoned = (
        x.float().reshape(len(mass), -1).sum(1) for x in (zones == Zone.ROUTE, zones != NO_ZONE)
    )
    routed = mass * routed / zoned
    total = float(mass.sum()) or 1.0
    signs = (("pos", advantages > 0), ("neg", advantages < 0))
    return {f"routed_mass_{name}": float(routed[rows].sum()) / total for name, rows in signs}


def zones_from_band(
    scores: Float[Tensor, "g *s"], advantages: Float[Tensor, " g"], lower: float, upper: float
) -> Int[Tensor, "g *s"]:
    """RETAIN below `lower`, ROUTE above `upper`, else ABSORB; all RETAIN where upper ≤ lower; RETAIN where A = 0."""
    zones = torch.full_like(scores, int(Zone.ABSORB), dtype=torch.long)
    zones[scores < lower], zones[scores > upper] = int(Zone.RETAIN), int(Zone.ROUTE)
    unrouted = (advantages == 0) | torch.tensor(not upper > lower, device=scores.device)
    return torch.where(_column(unrouted, zones), int(Zone.RETAIN), zones)


def zones_from_edge(
    scores: Float[Tensor, "g *s"], advantages: Float[Tensor, " g"], edge: float, _: float
) -> Int[Tensor, "g *s"]:
    """ROUTE above the edge, else RETAIN: all RETAIN where the edge is NaN; RETAIN where A = 0."""
    flagged = (scores > edge) & _column(advantages != 0, scores)
    return torch.where(flagged, int(Zone.ROUTE), int(Zone.RETAIN))


def match_shares(
    shadow: Int[Tensor, "g *s"], scores: Float[Tensor, "g *_"], stratum: Int[Tensor, " g"]
) -> Int[Tensor, "g *s"]:
    """Re-deal the shadow gate's zones by another score: in each stratum the highest scores get its ROUTEs, the next its ABSORBs.
    What is in NO_ZONE stays there.

    Example, one stratum: shadow [ROUTE, RETAIN, ABSORB], scores [.1, .9, .5] → [RETAIN, ROUTE, ABSORB].
    """
    zones, scores = shadow.clone().flatten(), _column(scores, shadow).expand_as(shadow).flatten()
    stratum = _column(stratum, shadow).expand_as(shadow).flatten()
    for s in stratum.unique():
        places = ((stratum == s) & (zones != NO_ZONE)).nonzero()[:, 0]
        ranked = places[scores[places].argsort(descending=True, stable=True)]
        zones[ranked] = shadow.flatten()[places].sort(descending=True).values
    return zones.reshape(shadow.shape)
