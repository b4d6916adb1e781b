"""The oracle: zones by true labels. NOT oracle-free; the one file of the gate that reads labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vgrout.config import ControlConfig
from vgrout.core import Mode, Rollout
from vgrout.env.rollouts import Composed
from vgrout.gate.controls import Keep
from vgrout.gate.gate import FLAG_EDGES, Gated, by_content, zones_from_band
from vgrout.model.policy import Policy


@dataclass
class Oracle(Keep):
    """The true label, thinned to a recall and polluted to a false-positive rate: ROUTE or
    RETAIN."""

    config: ControlConfig
    seed: int

    def refresh(self, policy: Policy) -> dict[str, float]:
        lower, upper = FLAG_EDGES
        return {"gate_lower": lower, "gate_upper": upper, "gate_collapsed": 0.0}

    def __call__(
        self,
        policy: Policy,
        composed: Composed,
        gated: Gated,
    ) -> Gated:
        batch = composed.batch
        hack = torch.tensor(self.labels(composed.rollouts), device=batch.advantages.device)
        chance = torch.where(hack, self.config.oracle_recall, self.config.oracle_fpr)
        scores = (by_content(batch, self.seed).to(chance) < chance).float()
        zones = zones_from_band(scores, torch.ones_like(batch.advantages), *FLAG_EDGES)
        return Gated(zones, scores, *FLAG_EDGES)

    def labels(self, rollouts: Sequence[Rollout]) -> list[bool]:
        """Whether the mode's exploit fired. A correct completion that fires it too is no reward
        hack, and would teach one all the same."""
        modes = self.config.oracle_modes or tuple(Mode)
        return [bool(r.grade.mechanism) and r.problem.mode in modes for r in rollouts]
