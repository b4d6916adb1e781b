"""The oracle: zones by true labels. NOT oracle-free; the one file of the gate that reads labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vgrout.config import ControlConfig
from vgrout.core import Rollout
from vgrout.env.rollouts import Composed
from vgrout.gate.controls import Keep
from vgrout.gate.gate import FLAG_EDGES, Gated, by_content, zones_from_band
from vgrout.model.policy import Policy


class Oracle(Keep):
    """The true label, thinned to a recall and polluted to a false-positive rate: ROUTE or
    RETAIN."""

    def __init__(
        self,
        config: ControlConfig,
        seed: int,
    ):
        self.config, self.seed = config, seed

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
        hack,
        and would teach one all the same."""
        modes = self.config.oracle_modes
        return [
            bool(r.grade.mechanism) and (not modes or r.problem.mode in modes) for r in rollouts
        ]

    def state_dict(self) -> dict[str, Tensor]:
        return {}
