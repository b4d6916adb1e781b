"""What the gate, the direction, the adapter and the loss receive.

Dims: `g` rollouts, `s` sequence, `t` completion tokens, `r` rank per block, `m` modules, `p` pairs, `v` vocabulary.
A `Batch` has no field for a label, a mode or a teacher flag: what cannot be read cannot leak.
"""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

from vgrout.core import NO_ZONE


@dataclass(slots=True)
class Batch:
    """What the gate, the direction, the adapter and the loss receive: right-padded sequences and advantages.

    Example, two rows with prompts of 3 and 2 tokens and completions of 1 and 2:
        input_ids          [[p p p c 0], [p p c c 0]]      completion_start  [3, 2]
        completion_ids     [[c 0], [c c]]                  completion_mask   [[1 0], [1 1]]
    """

    input_ids: Int[Tensor, "g s"]
    attention_mask: Int[Tensor, "g s"]
    completion_ids: Int[Tensor, "g t"]
    completion_mask: Bool[Tensor, "g t"]
    completion_start: Int[Tensor, " g"]  # prompt length
    rewards: Float[Tensor, " g"]
    group: Int[Tensor, " g"]  # index of the row's prompt in the step
    advantages: Float[Tensor, " g"]


@dataclass(slots=True)
class Origin:
    """Which policy state sampled each row. The loss takes its old log-probs from here, and a *control* the strata in which it
    copies the real gate's shares; no score and no real gate reads it."""

    student: Bool[Tensor, " g"]  # False: a demonstration, which nothing sampled
    ablated: Bool[Tensor, " g"]  # sampled with the quarantine ablated
    sampler_logps: Float[
        Tensor, "g t"
    ]  # of the drawn tokens under the sampler, 0 for padding; NaN where unknown: a demonstration
    stratum: Int[Tensor, " g"]  # sign of the advantage × student or teacher
    label: Bool[Tensor, " g"] | None = (
        None  # is it a hack? None in every arm but the oracle's, which is not oracle-free
    )


@dataclass(slots=True)
class GateOutput:
    """Zones for every row, and the scores they came from (NaN where a row has no score, or a position no zone)."""

    zones: Int[
        Tensor, "g *s"
    ]  # [g], or [g, s] at token granularity, NO_ZONE where nothing is predicted
    scores: Float[Tensor, "g *s"]
    lower: float  # band edges: below → RETAIN, between → ABSORB, above → ROUTE
    upper: float
    ref_logps: Float[Tensor, "g t"] | None = None  # of the base, where pass 1 computed them
    stats: dict[str, float] = field(default_factory=dict)

    def by_row(self) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"]]:
        """(score, zone) of each row; at token granularity the means of its tokens', the zone's rounded."""
        zones = self.zones.float().masked_fill(self.zones == NO_ZONE, float("nan"))
        scores, zones = (x.reshape(len(x), -1).nanmean(1) for x in (self.scores.float(), zones))
        return scores, zones.round()
