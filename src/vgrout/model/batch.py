"""The tensors of a step: what the gate, the direction, the adapter and the loss receive.

Dims: `g` rollouts, `s` sequence, `t` completion tokens, `r` rank per block, `m` modules, `p` pairs,
`v` vocabulary. No class here has a field for a label, a mode or a teacher flag: what cannot be read
cannot leak.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Right-padded sequences and advantages: what a score, a gate and an action receive.

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
class Behaviour:
    """Which policy state sampled each row, for the ratio of the loss and for nothing else."""

    ablated: Bool[Tensor, " g"]  # sampled with the quarantine ablated
    logps: Float[
        Tensor, "g t"
    ]  # under the sampler, 0 for padding; NaN where nothing sampled the row

    @property
    def sampled(self) -> Bool[Tensor, " g"]:
        return ~self.logps.isnan().any(1)

    def select(self, rows: Int[Tensor, " n"]) -> "Behaviour":
        return Behaviour(self.ablated[rows], self.logps[rows])


@dataclass(slots=True)
class Trained:
    """What an action leaves for pass 2: rows of the step's batch, each in its zone."""

    batch: Batch
    zones: Int[Tensor, "g *s"]  # [g], or [g, s] at token granularity
    rows: Int[Tensor, " g"]  # of the step's batch
    ref_logps: Float[Tensor, "g t"] | None = None  # of the base, where pass 1 computed them
