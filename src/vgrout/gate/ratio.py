"""Scores that compare the likelihoods of a completion under two states of the policy: the pairs' nudges, or the quarantine itself."""

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.core import UserError
from vgrout.gate.scores import Score, Scored
from vgrout.model.batch import Batch, Origin
from vgrout.model.likelihood import batch_logps, likelihood_deltas, random_deltas
from vgrout.model.policy import Policy
from vgrout.model.tokens import select


class LikelihoodRatio(Score):
    """Mean log-prob under a copy of the policy nudged toward the pairs' hack sides against that under one nudged toward their
    clean sides (docs/method.md, "llr"). Unsigned and length-averaged; forward passes only, plus the refresh.

    `form`, with Δ_h and Δ_c the two nudges of the deployed block and l(θ) the row's mean log-prob:
        ratio        l(θ + Δ_h) − l(θ + Δ_c)
        one_sided    l(θ + Δ_h − Δ_c) − l(θ)
        first_order  the directional derivative of l along Δ_h − Δ_c, by a central difference
    The pairs are fitted in two folds by prompt, one fold at each refresh after the first: a pair is scored by the fold that did
    not see it, a rollout by the mean of both folds' nudges. `random_seed` replaces every nudge by a Gaussian one of the same norm
    in every tensor: the placebo.
    """

    def __init__(
        self, pairs: Batch, *, temperature: float, token_budget: int, steps: int = 4, learning_rate: float = 1e-3,
        form: str = "ratio", random_seed: int | None = None, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.pairs, self.temperature, self.token_budget = pairs, temperature, token_budget
        self.steps, self.learning_rate, self.form, self.random_seed = (
            steps,
            learning_rate,
            form,
            random_seed,
        )
        self.dtype = (
            torch.float32 if form == "first_order" else dtype
        )  # of an fp32 model's products; its small step would drown in bf16
        self.folds: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # fold → nudges (hack, clean)
        self.pairs_hack = self.pairs_clean = torch.full(
            (len(pairs.advantages) // 2,), float("nan"), device=pairs.advantages.device
        )
        self.draws = 0

    @property
    def deltas(self) -> list[list[Tensor]]:
        """(hack, clean): the mean of both folds' nudges."""
        return [
            [(a + b) / 2 for a, b in zip(*(fold[i] for fold in self.folds.values()))]
            for i in (0, 1)
        ]

    def refresh(self, policy: Policy) -> dict[str, float]:
        n, last = len(self.pairs.advantages) // 2, self.deltas if self.folds else None
        fold = (self.pairs.group % 2)[:n]
        if len(fold.unique()) < 2:
            raise ValueError("the likelihood ratio needs pairs on at least two prompts")
        rows, self.pairs_hack, self.pairs_clean = (
            torch.arange(n, device=fold.device),
            self.pairs_hack.clone(),
            self.pairs_clean.clone(),
        )
        for k in (0, 1) if last is None else (self.draws % 2,):
            fit, held = rows[fold == k], rows[fold != k]
            self.folds[k] = tuple(
                self._fit(policy, select(self.pairs, fit + offset), 2 * k + i)
                for i, offset in enumerate((0, n))
            )
            scores = self._score(
                policy, select(self.pairs, torch.cat([held, held + n])), *self.folds[k]
            )
            self.pairs_hack[held], self.pairs_clean[held] = scores.chunk(2)
        self.draws += 1
        flat = lambda d: torch.cat([(h - c).flatten() for h, c in zip(*d)])  # noqa: E731
        drift = (
            float("nan")
            if last is None
            else float(torch.cosine_similarity(flat(last), flat(self.deltas), dim=0))
        )
        return {"direction_drift": drift}

    def _fit(self, policy: Policy, batch: Batch, index: int) -> list[Tensor]:
        with policy.adapter.rounded(self.dtype):
            deltas = likelihood_deltas(
                policy, batch, self.steps, self.learning_rate, self.temperature, self.token_budget
            )
        if self.random_seed is None:
            return deltas
        return random_deltas(deltas, seed=1_000_000 * self.random_seed + 10 * self.draws + index)

    def _score(
        self, policy: Policy, batch: Batch, hack: list[Tensor], clean: list[Tensor]
    ) -> Float[Tensor, " g"]:
        def at(deltas: list[Tensor], scale: float = 1.0) -> Float[Tensor, "g t"]:
            with policy.adapter.shifted(deltas, scale), policy.adapter.rounded(self.dtype):
                return batch_logps(policy, batch, self.temperature, self.token_budget)

        mean = lambda x: x.sum(1) / batch.completion_mask.sum(1)  # noqa: E731
        difference, step = [h - c for h, c in zip(hack, clean)], 0.01
        if self.form == "one_sided":
            return mean(at(difference) - at(difference, 0.0))
        if self.form == "first_order":
            return mean(at(difference, step) - at(difference, -step)) / (2 * step)
        return mean(at(hack) - at(clean))

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        return Scored(self._score(policy, batch, *self.deltas))

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "draws": torch.tensor(self.draws),
            "pairs_hack": self.pairs_hack,
            "pairs_clean": self.pairs_clean,
        }
        for k, sides in self.folds.items():
            state |= {
                f"{k}.{side}.{i}": d
                for side, ds in zip(("hack", "clean"), sides)
                for i, d in enumerate(ds)
            }
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.draws, device = int(state["draws"]), self.pairs.input_ids.device
        self.pairs_hack, self.pairs_clean = (
            state["pairs_hack"].to(device),
            state["pairs_clean"].to(device),
        )
        count = sum(k.startswith("0.hack.") for k in state)
        self.folds = {
            k: tuple([state[f"{k}.{side}.{i}"].to(device) for i in range(count)] for side in ("hack", "clean"))
            for k in (0, 1) if f"{k}.hack.0" in state
        }  # fmt: skip


class QuarantineRatio(Score):
    """log p(completion) under the quarantine alone minus that under the base: how much more likely the quarantine makes it.

    The quarantine is its own detector. Trained first (--quarantine-first) or seeded on the pairs' hack sides (--seed-quarantine),
    it has learned what pays at once; what it would do more often is kept from the deployed block. Both states are without that
    block, so that the score does not fade when the deployed policy begins to do the same. Nothing is fitted at a refresh: it
    scores the pairs, if it has any, whose sides may give the cut.
    """

    stored = ("pairs_hack", "pairs_clean")

    def __init__(self, pairs: Batch | None, *, temperature: float, token_budget: int):
        self.pairs, self.how = pairs, (temperature, token_budget)

    def _score(self, policy: Policy, batch: Batch) -> Scored:
        with policy.adapter.ablated("deployed"):
            alone = batch_logps(policy, batch, *self.how)
        with policy.adapter.disabled():
            base = batch_logps(policy, batch, *self.how)
        return Scored(alone.sum(1) - base.sum(1), ref_logps=base)

    def refresh(self, policy: Policy) -> dict[str, float]:
        if self.pairs is not None:
            self.pairs_hack, self.pairs_clean = self._score(policy, self.pairs).scores.chunk(2)
        return {}

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        return self._score(policy, batch)


class RandomQuarantine(Score):
    """Its placebo: a Gaussian delta with the norm of the quarantine's in every tensor, on the base, drawn anew at every refresh."""

    stored = ("draws",)

    def __init__(self, real: QuarantineRatio, seed: int):
        self.real, self.seed, self.draws = real, seed, torch.tensor(0)

    def refresh(self, policy: Policy) -> dict[str, float]:
        self.draws = self.draws + 1
        return {}

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        noise = random_deltas(
            policy.adapter.parameters("quarantine"), 1_000 * self.seed + int(self.draws)
        )
        return Scored(
            logps_with(policy, noise, batch, *self.real.how).sum(1) - shared.ref_logps.sum(1)
        )


def logps_with(
    policy: Policy, deltas: list[Tensor], batch: Batch, temperature: float, token_budget: int
) -> Float[Tensor, "g t"]:
    """Completion log-probs of the base with a quarantine of these deltas alone."""
    adapter = policy.adapter
    shift = [d - p.detach() for d, p in zip(deltas, adapter.parameters("quarantine"))]
    with adapter.ablated("deployed"), adapter.shifted(shift, block="quarantine"):
        return batch_logps(policy, batch, temperature, token_budget)


def replaced_quarantine(
    what: str, policy: Policy, batch: Batch, temperature: float, token_budget: int, seed: int
) -> list[Float[Tensor, "..."]]:
    """What takes the learned quarantine's place: itself ("reset"), its negative ("inverted"), a Gaussian one with its norm in every
    tensor ("norm"), or that one scaled until the base's KL to it is the learned one's ("effect"): the mean k3 over tokens of the
    batch.

    A random block of equal norm changes a policy far less than a learned one, so that "norm" alone would be a weak placebo. The
    factor is found by bisection between 1/16 and 256; UserError where none has the effect.
    """
    learned = [p.detach().clone() for p in policy.adapter.parameters("quarantine")]
    if what in ("reset", "inverted"):
        return [-p for p in learned] if what == "inverted" else learned
    noise = random_deltas(learned, seed)
    if what == "norm":
        return noise
    with policy.adapter.disabled():
        base = batch_logps(policy, batch, temperature, token_budget)

    def effect(deltas: list[Tensor]) -> float:
        gap = logps_with(policy, deltas, batch, temperature, token_budget) - base
        return float((gap.exp() - gap - 1)[batch.completion_mask].mean())

    wanted, low, high, scaled = effect(learned), -4.0, 8.0, noise  # powers of 2
    for _ in range(20):
        scaled = [2.0 ** ((low + high) / 2) * n for n in noise]
        low, high = ((low + high) / 2, high) if effect(scaled) < wanted else (low, (low + high) / 2)
    if abs(effect(scaled) - wanted) > 0.1 * wanted:
        raise UserError(f"no random quarantine changes the policy as much as the learned one: KL {effect(scaled):.3g}, not {wanted:.3g}; "
                        "lengthen --quarantine-first, or take another --placebo-seed")  # fmt: skip
    return scaled
