"""What takes the learned quarantine's place when a phase begins, and the base with such a block."""

from jaxtyping import Float
from torch import Tensor

from vgrout.config import Enter
from vgrout.core import UserError
from vgrout.model.batch import Batch
from vgrout.model.likelihood import batch_logps, random_deltas
from vgrout.model.policy import Policy

FACTORS = (-4.0, 8.0)  # powers of 2 between which the factor of equal effect is sought
BISECTIONS = 20
TOLERANCE = 0.1  # of the wanted effect


def logps_with(
    policy: Policy, deltas: list[Tensor], batch: Batch, temperature: float
) -> Float[Tensor, "g t"]:
    """Completion log-probs of the base with a quarantine of these deltas alone."""
    adapter = policy.adapter
    shift = [d - p.detach() for d, p in zip(deltas, adapter.parameters("quarantine"))]
    with adapter.ablated("deployed"), adapter.shifted(shift, block="quarantine"):
        return batch_logps(policy, batch, temperature)


def replaced_quarantine(
    what: Enter, policy: Policy, batch: Batch, temperature: float, seed: int
) -> list[Float[Tensor, "..."]]:
    """The new quarantine's parameters, for --enter:

    "reset" the learned one itself (its optimiser moments go), "inverted" its negative, "norm" a
    Gaussian one with its norm in every tensor, "effect" that one scaled until the base's KL to it
    is the learned one's: the mean k3 over tokens of the batch. A random block of equal norm changes
    a policy far less than a learned one, so that "norm" alone would be a weak placebo. UserError
    where no factor has the effect.
    """
    learned = [p.detach().clone() for p in policy.adapter.parameters("quarantine")]
    if what == "reset":
        return learned
    if what == "inverted":
        return [-p for p in learned]
    noise = random_deltas(learned, seed)
    if what == "norm":
        return noise
    with policy.adapter.disabled():
        base = batch_logps(policy, batch, temperature)

    def effect(deltas: list[Tensor]) -> float:
        gap = logps_with(policy, deltas, batch, temperature) - base
        return float((gap.exp() - gap - 1)[batch.completion_mask].mean())

    wanted, (low, high), scaled = effect(learned), FACTORS, noise
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        scaled = [2.0**middle * n for n in noise]
        low, high = (middle, high) if effect(scaled) < wanted else (low, middle)
    if abs(effect(scaled) - wanted) > TOLERANCE * wanted:
        raise UserError(
            f"no random quarantine changes the policy as much as the learned one: KL "
            f"{effect(scaled):.3g}, not {wanted:.3g}; lengthen --quarantine-first, or take another "
            "--placebo-seed"
        )
    return scaled
