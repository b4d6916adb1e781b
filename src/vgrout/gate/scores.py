"""What a score is: how hack-like is this rollout's update, without any label. Protocol and
registry.

A score is refreshed on the pairs at a cadence, scores a batch of tensors, and gives the pairs' own
out-of-sample scores, from which a gate takes its cut. A new score is a file with a class and a
builder under `@register`, and its import in `gate/__init__.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from vgrout.config import Config
from vgrout.core import Problem
from vgrout.env.pairs import Pair
from vgrout.env.rollouts import pair_batch
from vgrout.model.batch import Batch
from vgrout.model.policy import Policy


@dataclass(slots=True)
class Scored:
    """A batch under a score, with what a control or the update may use again."""

    scores: Float[Tensor, "g *s"]
    features: Float[Tensor, "g s m k"] | None = None
    ref_logps: Float[Tensor, "g t"] | None = None  # of the base, where the score needed them
    mass: Float[Tensor, " g"] | None = None  # norm of the row's c-probe gradient
    stats: dict[str, float] = field(default_factory=dict)  # figures of the score's own, for the log


class Stateful:
    """Is refreshed at the cadence, and stored in checkpoints: as its `score` is, where it has one,
    else nothing but the attributes that `stored` names.
    """

    stored: tuple[str, ...] = ()
    score: "Score | None" = None

    def refresh(self, policy: Policy) -> dict[str, float]:
        return {} if self.score is None else self.score.refresh(policy)

    def state_dict(self) -> dict[str, Tensor]:
        if self.score is not None:
            return self.score.state_dict()
        return {k: v for k, v in vars(self).items() if k in self.stored and v is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.score is not None:
            self.score.load_state_dict(state)
        for k in self.stored:
            setattr(self, k, state.get(k))


class Score(Stateful):
    """Base: nothing to refresh, nothing to store, no pairs."""

    pairs: Batch | None = None  # hack sides, then clean sides
    pairs_hack: Tensor | None = None  # out-of-sample scores of the pairs' sides, for the cut
    pairs_clean: Tensor | None = None

    def __call__(self, policy: Policy, batch: Batch) -> Scored:
        raise NotImplementedError


@dataclass(frozen=True)
class ProbeOptions:
    """How the c-probe runs."""

    max_completion_length: int
    temperature: float
    state: str = "as_trained"  # or "deployed": with the quarantine ablated
    positions: str = "completion"  # or "all"


@dataclass(frozen=True)
class Materials:
    """What a score is built from: the policy, the options, the pairs and the run's problems."""

    policy: Policy
    config: Config
    pairs: Sequence[Pair]
    problems: Sequence[Problem] = ()

    def batch(self, pairs: Sequence[Pair] | None = None) -> Batch | None:
        chosen = self.pairs if pairs is None else pairs
        return pair_batch(self.policy, list(chosen)) if chosen else None

    @property
    def probe(self) -> ProbeOptions:
        grpo, score = self.config.grpo, self.config.score
        return ProbeOptions(
            grpo.max_completion_length, grpo.temperature, score.probe_state, score.probe_positions
        )


Builder = Callable[[Materials], Score]
B = TypeVar("B", bound=Builder)
SCORES: dict[str, Builder] = {}


def register(name: str) -> Callable[[B], B]:
    """Make a builder known under the name that --score and ARMS use."""

    def add(builder: B) -> B:
        SCORES[name] = builder
        return builder

    return add
