"""An arm's phases at work: gate, control and action of each, refreshed and stored together."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vgrout import arms
from vgrout.arms import Phase
from vgrout.config import Config
from vgrout.core import Group
from vgrout.env.pairs import Pair
from vgrout.env.rollouts import compose
from vgrout.files import nested, part
from vgrout.gate.actions import ACTIONS, Action, Options
from vgrout.gate.controls import Keep, build_control
from vgrout.gate.gate import Gate, Gated, PinnedGate
from vgrout.gate.oracle import Oracle
from vgrout.gate.scores import SCORES, Materials
from vgrout.gate.swap import replaced_quarantine
from vgrout.model.batch import Batch, Trained
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import Policy

# phases that differ in nothing else share a gate and its state
OF_GATE = "score zone absorb_share cut control action".split()


@dataclass
class LivePhase:
    """One phase with what it does. `start` is its first step."""

    phase: Phase
    start: int
    gate: Gate | PinnedGate
    control: Keep
    act: Action
    options: Options
    config: Config

    @property
    def keeps_equal_groups(self) -> bool:
        """A penalty may give variance to a group of equal rewards."""
        return self.phase.action == "deduct"

    def begins(self, step: int) -> bool:
        return step == self.start

    def enter(self, policy: Policy, optimizer: BlockOptimizer, groups: Sequence[Group]) -> None:
        """Put another quarantine in the learned one's place, where the phase says so."""
        if not self.phase.enter:
            return
        drawn = compose(groups, policy, equal_groups=True).batch
        grpo, seed = self.config.grpo, self.config.control.placebo_seed
        replaced = replaced_quarantine(self.phase.enter, policy, drawn, grpo.temperature, seed)
        optimizer.put("quarantine", replaced)

    def action(self, batch: Batch, gated: Gated) -> Trained | None:
        return self.act(batch, gated, self.options)


class Phases:
    """The run's phases in order. Their gates are refreshed at one cadence, whichever is at work."""

    def __init__(self, phases: Sequence[Phase], materials: Materials, placebo: Sequence[Pair] = ()):
        self.materials, self.placebo = materials, placebo
        self.every = materials.config.score.refresh_every
        self.gates: dict[tuple, tuple[Gate | PinnedGate, Keep]] = {}
        self.phases: list[LivePhase] = []
        start = 0
        for phase in phases:
            self.phases.append(self._live(phase, start))
            start += phase.steps or 0

    def _live(self, phase: Phase, start: int) -> LivePhase:
        config = self.materials.config
        kind = tuple(getattr(phase, name) for name in OF_GATE)
        if kind not in self.gates:
            self.gates[kind] = build_gate(phase, self.materials, self.placebo)
        gate, control = self.gates[kind]
        options = Options(
            phase.retained_advantages,
            config.monitor.penalty_alpha,
            config.monitor.penalty,
            arms.trained_zone(config),
        )
        return LivePhase(phase, start, gate, control, ACTIONS[phase.action], options, config)

    def at(self, step: int) -> LivePhase:
        return [phase for phase in self.phases if phase.start <= step][-1]

    def refresh(self, policy: Policy, step: int) -> dict[str, float]:
        """At step 0 and then at the cadence: every gate and control of the run."""
        if step and (not self.every or step % self.every):
            return {}
        figures: dict[str, float] = {}
        for gate, control in self.gates.values():
            figures |= gate.refresh(policy)
            figures |= control.refresh(policy)
        return figures

    def _owners(self) -> dict[str, Gate | PinnedGate | Keep]:
        owners = {}
        for i, (gate, control) in enumerate(self.gates.values()):
            owners |= {f"{i}.score": gate, f"{i}.control": control}
        return owners

    def state_dict(self) -> dict[str, Tensor]:
        return nested({name: owner.state_dict() for name, owner in self._owners().items()})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, owner in self._owners().items():
            owner.load_state_dict(part(state, name))


def build_gate(
    phase: Phase, materials: Materials, placebo: Sequence[Pair]
) -> tuple[Gate | PinnedGate, Keep]:
    """The phase's gate, and what deals its zones."""
    config = materials.config
    if phase.score == "pinned":
        gate = PinnedGate(phase.zone, phase.absorb_share, config.run.seed)
        oracle = phase.control == "oracle"
        return gate, Oracle(config.control, config.run.seed) if oracle else Keep()
    cut = "flag" if phase.score in arms.FLAGS else phase.cut
    every = phase.action == "deduct"
    gate = Gate(SCORES[phase.score](materials), signed=config.phase.signed, cut=cut, every=every)
    return gate, build_control(phase.control, gate, materials, placebo)
