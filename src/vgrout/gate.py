"""Scores → zones. A gate sees tensors: no label, no mode, no teacher flag.

`Gate` holds one score and, for a control, a second score that re-deals the first one's zones: within each stratum the control
routes exactly as many ROUTE and ABSORB rows as the real gate would have, to the rows that the control ranks highest. So a
placebo differs from the real arm in nothing but the direction: same batch, same cadence, same shares, same code path.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vgrout.direction import cosine_score, haar, out_of_sample_scores, probe_gradients, v_grad
from vgrout.policy import Policy
from vgrout.tensors import Batch, Direction, GateOutput
from vgrout.types import Zone

BAND_QUANTILE = 0.75  # both edges: p75 of the clean and of the hack sides' out-of-sample scores


class PinnedGate:
    """Every row in one zone: the arms none, none2r, no_loophole and absorb."""

    scored = False

    def __init__(self, zone: Zone):
        self.zone = zone

    def refresh(self, policy: Policy) -> dict[str, float]:
        return {}

    def __call__(self, policy: Policy, batch: Batch, strata: Int[Tensor, " g"]) -> GateOutput:
        nan = torch.full_like(batch.advantages, float("nan"))
        return GateOutput(torch.full_like(batch.group, int(self.zone)), nan, float("nan"), float("nan"))

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class VectorGate:
    """Cosine of each row's c-probe gradient with v_grad, cut by the pairs' out-of-sample band.

    `pairs` is one batch of hack sides followed by clean sides, all at A = +1, `group` numbering the prompts.
    With `random_seed` the gate is the Haar placebo: v_grad runs in the shadow and sets the shares.
    """

    scored = True

    def __init__(self, pairs: Batch, probe: dict, *, signed: bool = False, random_seed: int | None = None):
        self.pairs, self.probe, self.signed, self.random_seed = pairs, probe, signed, random_seed
        self.direction: Direction | None = None
        self.refreshes = 0

    def refresh(self, policy: Policy) -> dict[str, float]:
        """Extract v_grad anew at the current parameters; returns its drift (cosine with the last one) and the band."""
        n = len(self.pairs.advantages) // 2
        gradients, _ = probe_gradients(policy, self.pairs, **self.probe)
        hack, clean, prompt = gradients[:n], gradients[n:], self.pairs.group[:n]
        v = v_grad(hack, clean)
        drift = float(cosine_score(v[None], self.direction.vectors)[0]) if self.direction else float("nan")
        self.direction = Direction(v, *out_of_sample_scores(hack, clean, prompt))
        self.refreshes += 1
        lower, upper = band(self.direction)
        return {"direction_drift": drift, "gate_lower": lower, "gate_upper": upper, "gate_collapsed": float(not upper > lower)}

    def __call__(self, policy: Policy, batch: Batch, strata: Int[Tensor, " g"]) -> GateOutput:
        """Pass 1. Rows with A = 0 are RETAIN and have no score."""
        gradients, logps = probe_gradients(policy, batch, **self.probe)
        lower, upper = band(self.direction)
        scores = cosine_score(gradients, self.direction.vectors)
        zones = zones_from_band(scores, batch.advantages, lower, upper)
        if self.random_seed is not None:
            m, r = self.direction.vectors.shape
            scores = cosine_score(gradients, haar(m, r, 1_000 * self.random_seed + self.refreshes))
            zones = match_shares(zones, scores, strata)
        if self.signed:  # discouraging a hack is no hack-ward update: it may train the deployed block
            zones = torch.where(batch.advantages < 0, int(Zone.RETAIN), zones)
        scores = torch.where(batch.advantages == 0, float("nan"), scores)
        known = logps if self.probe["state"] == "as_trained" else None
        return GateOutput(zones, scores, lower, upper, known, routed_mass(gradients, zones, batch.advantages))

    def state_dict(self) -> dict[str, Tensor]:
        d = self.direction
        fields = {} if d is None else {"vectors": d.vectors, "hack_scores": d.hack_scores, "clean_scores": d.clean_scores}
        return fields | {"refreshes": torch.tensor(self.refreshes)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.refreshes = int(state["refreshes"])
        if "vectors" in state:
            device = self.pairs.input_ids.device
            self.direction = Direction(*(state[k].to(device) for k in ("vectors", "hack_scores", "clean_scores")))


def routed_mass(
    gradients: Float[Tensor, "g m r"], zones: Int[Tensor, " g"], advantages: Float[Tensor, " g"]
) -> dict[str, float]:
    """Share of the summed c-probe gradient norms that ROUTE rows carry, by sign of the advantage."""
    norms = gradients.flatten(1).norm(dim=1)
    signs = (("pos", advantages > 0), ("neg", advantages < 0))
    total = float(norms.sum()) or 1.0
    return {f"routed_mass_{name}": float(norms[rows & (zones == Zone.ROUTE)].sum()) / total for name, rows in signs}


def band(direction: Direction) -> tuple[float, float]:
    """(lower, upper) = p75 of the clean sides' and of the hack sides' out-of-sample scores."""
    quantile = lambda x: float(torch.quantile(x.float(), BAND_QUANTILE))  # noqa: E731
    return quantile(direction.clean_scores), quantile(direction.hack_scores)


def zones_from_band(
    scores: Float[Tensor, " g"], advantages: Float[Tensor, " g"], lower: float, upper: float
) -> Int[Tensor, " g"]:
    """RETAIN below `lower`, ROUTE above `upper`, else ABSORB; all RETAIN where upper ≤ lower; RETAIN where A = 0."""
    zones = torch.full_like(scores, int(Zone.ABSORB), dtype=torch.long)
    zones[scores < lower], zones[scores > upper] = int(Zone.RETAIN), int(Zone.ROUTE)
    zones[(advantages == 0) | torch.tensor(not upper > lower, device=scores.device)] = int(Zone.RETAIN)
    return zones


def match_shares(
    shadow: Int[Tensor, " g"], scores: Float[Tensor, " g"], strata: Int[Tensor, " g"]
) -> Int[Tensor, " g"]:
    """Re-deal the shadow gate's zones by another score: in each stratum the highest scores get its ROUTEs, the next its ABSORBs.

    Example, one stratum: shadow [ROUTE, RETAIN, ABSORB], scores [.1, .9, .5] → [RETAIN, ROUTE, ABSORB].
    """
    zones = shadow.clone()
    for stratum in strata.unique():
        rows = (strata == stratum).nonzero()[:, 0]
        ranked = rows[scores[rows].argsort(descending=True, stable=True)]
        zones[ranked] = shadow[rows].sort(descending=True).values
    return zones


