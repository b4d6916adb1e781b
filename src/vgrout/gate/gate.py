"""Scores → zones. A gate sees tensors: no label, no mode, no teacher flag, no origin."""

from dataclasses import KW_ONLY, dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vgrout.core import NO_ZONE, Zone
from vgrout.gate.scores import Score, Scored, Stateful
from vgrout.model.batch import Batch
from vgrout.model.policy import Policy
from vgrout.model.update import row_zones

BAND_QUANTILE = 0.75  # both edges: p75 of the clean and of the hack sides' out-of-sample scores
FLAG_EDGES = (0.25, 0.5)  # of a score that is a flag: retained below, routed above


@dataclass(slots=True)
class Gated:
    """Zones for every row, and the scores they came from (NaN where a row has none)."""

    zones: Int[Tensor, "g *s"]  # [g], or [g, s] at token granularity, NO_ZONE without successor
    scores: Float[Tensor, "g *s"]
    lower: float  # band edges: below → RETAIN, between → ABSORB, above → ROUTE
    upper: float
    scored: Scored | None = None  # what a control may use again
    stats: dict[str, float] = field(default_factory=dict)

    @property
    def ref_logps(self) -> Float[Tensor, "g t"] | None:
        return None if self.scored is None else self.scored.ref_logps

    def by_row(self) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"]]:
        """(score, zone) of each row; at token granularity the means of its tokens'."""
        scores = self.scores.float()
        return scores.reshape(len(scores), -1).nanmean(1), row_zones(self.zones)


@dataclass
class PinnedGate(Stateful):
    """Every row in one zone. `absorb_share` of the rows, by chance, are in ABSORB instead."""

    zone: Zone
    absorb_share: float = 0.0
    seed: int = 0

    def __call__(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Gated:
        unscored = torch.full_like(batch.advantages, float("nan"))
        zones = torch.full_like(batch.group, int(self.zone))
        if self.absorb_share:
            drawn = by_content(batch, self.seed) < self.absorb_share
            zones = zones.masked_fill(drawn.to(zones.device), int(Zone.ABSORB))
        return Gated(zones, unscored, float("nan"), float("nan"))


def by_content(batch: Batch, seed: int) -> Float[Tensor, " g"]:
    """Uniform numbers by a generator of the batch's own content: a resumed run repeats them."""
    generator = torch.Generator().manual_seed(seed + int(batch.completion_ids.sum()))
    return torch.rand(len(batch.advantages), generator=generator)


@dataclass
class Gate(Stateful):
    """One score and its cut: the pairs' band or midpoint, 0, or a flag's edges.

    With `every` the zone is of the rollout and not of its update: rows with A = 0 have one too.
    """

    score: Score
    _: KW_ONLY
    signed: bool = False
    cut: str = "band"
    every: bool = False

    def refresh(self, policy: Policy) -> dict[str, float]:
        """Refresh the score; returns the direction's drift and the band."""
        figures = super().refresh(policy)
        lower, upper = self.edges()
        cuts = upper > lower or (upper == lower and self.cut in ("zero", "midpoint"))
        figures |= {"gate_lower": lower, "gate_upper": upper}
        return figures | {"gate_collapsed": float(not cuts)}

    def edges(self) -> tuple[float, float]:
        """(lower, upper) edges of the zones.

        "band": p75 of the pairs' clean and of their hack sides' out-of-sample scores; "midpoint":
        both halfway between the sides' means, so that nothing is absorbed; "zero": 0; "flag":
        fixed.
        """
        if self.cut == "flag":
            return FLAG_EDGES
        if self.cut == "zero":
            return 0.0, 0.0
        sides = self.score.pairs_clean, self.score.pairs_hack
        if self.cut == "midpoint":
            clean, hack = (float(x.double().mean()) for x in sides)
            middle = (clean + hack) / 2 if hack > clean else float("nan")
            return middle, middle
        lower, upper = (float(torch.quantile(x.float(), BAND_QUANTILE)) for x in sides)
        return lower, upper

    def __call__(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Gated:
        """Pass 1. Rows with A = 0 are RETAIN and have no score, unless the gate is of every row."""
        scored = self.score(policy, batch)
        lower, upper = self.edges()
        cut = zones_from_band if self.cut in ("band", "flag") else zones_from_edge
        zones = cut(scored.scores, self.weight(batch), lower, upper)
        if zones.ndim == 2:
            zones = zones.where(predicts(batch), NO_ZONE)
        return self.gated(batch, zones, scored.scores, scored)

    def gated(
        self,
        batch: Batch,
        zones: Int[Tensor, "g *s"],
        scores: Float[Tensor, "g *_"],
        scored: Scored,
    ) -> Gated:
        """Zones and scores as the update takes them: signed, without scores where none counts."""
        if self.signed:  # discouraging a hack may train the deployed block
            discouraged = _column(batch.advantages < 0, zones) & (zones != NO_ZONE)
            zones = torch.where(discouraged, int(Zone.RETAIN), zones)
        scores = torch.where(_column(self.weight(batch) == 0, scores), float("nan"), scores)
        if scores.ndim == 2:
            scores = scores.where(zones != NO_ZONE, float("nan"))
        stats = dict(scored.stats)
        if scored.mass is not None:
            mass = scored.mass * batch.advantages.abs()
            stats |= routed_mass(mass, zones, batch.advantages)
        return Gated(zones, scores, *self.edges(), scored, stats)

    def weight(self, batch: Batch) -> Float[Tensor, " g"]:
        every = self.every or self.cut == "flag"
        return torch.ones_like(batch.advantages) if every else batch.advantages


def predicts(batch: Batch) -> Bool[Tensor, "g s"]:
    """The positions that have a successor: what is computed there can act on a completion token."""
    return F.pad(batch.attention_mask[:, 1:], (0, 1)).bool()


def _column(
    rows: Tensor,
    like: Tensor,
) -> Tensor:
    """[g] → [g] or [g, 1], to broadcast over `like` [g] or [g, s]."""
    return rows if rows.ndim == like.ndim else rows[:, None]


def routed_mass(
    mass: Float[Tensor, " g"],
    zones: Int[Tensor, "g *s"],
    advantages: Float[Tensor, " g"],
) -> dict[str, float]:
    """Share of the rows' summed gradient norms that ROUTE carries, by sign of the advantage.

    At token granularity a row counts by the share of its tokens that are in ROUTE.
    """
    flat = zones.reshape(len(mass), -1)
    routed, zoned = (x.float().sum(1) for x in (flat == Zone.ROUTE, flat != NO_ZONE))
    carried = mass * routed / zoned
    total = float(mass.sum()) or 1.0
    positive, negative = (float(carried[x].sum()) / total for x in (advantages > 0, advantages < 0))
    return {"routed_mass_pos": positive, "routed_mass_neg": negative}


def zones_from_band(
    scores: Float[Tensor, "g *s"],
    advantages: Float[Tensor, " g"],
    lower: float,
    upper: float,
) -> Int[Tensor, "g *s"]:
    """RETAIN below `lower`, ROUTE above `upper`, else ABSORB.

    All RETAIN where upper ≤ lower; RETAIN where A = 0.
    """
    zones = torch.full_like(scores, int(Zone.ABSORB), dtype=torch.long)
    zones[scores < lower] = int(Zone.RETAIN)
    zones[scores > upper] = int(Zone.ROUTE)
    unrouted = (advantages == 0) | (not upper > lower)
    return torch.where(_column(unrouted, zones), int(Zone.RETAIN), zones)


def zones_from_edge(
    scores: Float[Tensor, "g *s"],
    advantages: Float[Tensor, " g"],
    edge: float,
    _: float,
) -> Int[Tensor, "g *s"]:
    """ROUTE above the edge, else RETAIN: all RETAIN where it is NaN; RETAIN where A = 0."""
    flagged = (scores > edge) & _column(advantages != 0, scores)
    return torch.where(flagged, int(Zone.ROUTE), int(Zone.RETAIN))
