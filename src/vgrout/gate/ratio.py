"""Scores that compare a completion's likelihoods under two states of the policy.

`llr`: the pairs' nudges toward their hack and their clean sides. `quarantine_ratio`: the quarantine
alone against the base.
"""

from dataclasses import KW_ONLY, dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.files import part
from vgrout.gate.scores import Materials, Score, Scored, register
from vgrout.model.batch import Batch
from vgrout.model.likelihood import batch_logps, likelihood_deltas, random_deltas
from vgrout.model.policy import Policy
from vgrout.model.tokens import select

Deltas = list[Tensor]  # of one block's parameters, in their order


@dataclass
class LikelihoodRatio(Score):
    """l(θ + Δ_hack) − l(θ + Δ_clean), l a row's mean log-prob, Δ the deployed block's nudges.

    Unsigned and length-averaged; forward passes only, plus the refresh. The pairs are fitted in two
    folds by prompt, one fold at each refresh after the first: a pair is scored by the fold that did
    not see it, a rollout by the mean of both folds' nudges. `random_seed` replaces every nudge by a
    Gaussian one of the same norm in every tensor: the placebo.
    """

    pairs: Batch
    _: KW_ONLY
    temperature: float
    steps: int = 4
    learning_rate: float = 1e-3
    random_seed: int | None = None
    draws: int = field(default=0, init=False)

    def __post_init__(self):
        self.folds: dict[int, tuple[Deltas, Deltas]] = {}  # fold → nudges (hack, clean)
        unknown = torch.full((len(self.pairs.advantages) // 2,), float("nan"))
        self.pairs_hack = self.pairs_clean = unknown.to(self.pairs.advantages)

    @property
    def deltas(self) -> tuple[Deltas, Deltas]:
        """(hack, clean): the mean of both folds' nudges."""
        sides = [[fold[i] for fold in self.folds.values()] for i in (0, 1)]
        hack, clean = ([(a + b) / 2 for a, b in zip(*side)] for side in sides)
        return hack, clean

    def refresh(
        self,
        policy: Policy,
    ) -> dict[str, float]:
        n, last = len(self.pairs.advantages) // 2, self.deltas if self.folds else None
        fold = (self.pairs.group % 2)[:n]
        if len(fold.unique()) < 2:
            raise ValueError("the likelihood ratio needs pairs on at least two prompts")
        rows = torch.arange(n, device=fold.device)
        self.pairs_hack, self.pairs_clean = self.pairs_hack.clone(), self.pairs_clean.clone()
        for k in (0, 1) if last is None else (self.draws % 2,):
            fit, held = rows[fold == k], rows[fold != k]
            hack = self._fit(policy, select(self.pairs, fit), 2 * k)
            clean = self._fit(policy, select(self.pairs, fit + n), 2 * k + 1)
            self.folds[k] = hack, clean
            unseen = select(self.pairs, torch.cat([held, held + n]))
            scores = self._score(policy, unseen, hack, clean)
            self.pairs_hack[held], self.pairs_clean[held] = scores.chunk(2)
        self.draws += 1
        drift = float("nan") if last is None else direction_cosine(last, self.deltas)
        return {"direction_drift": drift}

    def _fit(
        self,
        policy: Policy,
        batch: Batch,
        index: int,
    ) -> Deltas:
        how = self.steps, self.learning_rate, self.temperature
        deltas = likelihood_deltas(policy, batch, *how)
        if self.random_seed is None:
            return deltas
        return random_deltas(deltas, seed=1_000_000 * self.random_seed + 10 * self.draws + index)

    def _score(
        self,
        policy: Policy,
        batch: Batch,
        hack: Deltas,
        clean: Deltas,
    ) -> Float[Tensor, " g"]:
        def at(deltas: Deltas) -> Float[Tensor, "g t"]:
            with policy.adapter.shifted(deltas):
                return batch_logps(policy, batch, self.temperature)

        return (at(hack) - at(clean)).sum(1) / batch.completion_mask.sum(1)

    def __call__(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Scored:
        return Scored(self._score(policy, batch, *self.deltas))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"draws": torch.tensor(self.draws)}
        state |= {"pairs_hack": self.pairs_hack, "pairs_clean": self.pairs_clean}
        for k, fold in self.folds.items():
            for side, deltas in zip(("hack", "clean"), fold):
                state |= {f"{k}.{side}.{i}": delta for i, delta in enumerate(deltas)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.draws, device = int(state["draws"]), self.pairs.input_ids.device
        self.pairs_hack = state["pairs_hack"].to(device)
        self.pairs_clean = state["pairs_clean"].to(device)
        for k in {int(name[0]) for name in state if ".hack." in name}:
            sides = (part(state, f"{k}.{side}") for side in ("hack", "clean"))
            hack, clean = ([own[str(i)].to(device) for i in range(len(own))] for own in sides)
            self.folds[k] = hack, clean


def direction_cosine(
    a: tuple[Deltas, Deltas],
    b: tuple[Deltas, Deltas],
) -> float:
    """Cosine of two directions Δ_hack − Δ_clean over all parameters."""
    flat = [torch.cat([(h - c).flatten() for h, c in zip(*deltas)]) for deltas in (a, b)]
    return float(torch.cosine_similarity(*flat, dim=0))


@dataclass
class QuarantineRatio(Score):
    """log p(completion) under the quarantine alone minus that under the base.

    The quarantine is its own detector. Trained first or seeded on the pairs' hack sides, it has
    learned what pays at once; what it would do more often is kept from the deployed block. Both
    states are without that block, so that the score does not fade when the deployed policy begins
    to do the same. Nothing is fitted at a refresh: it scores the pairs, if it has any, whose sides
    may give the cut.
    """

    pairs: Batch | None
    _: KW_ONLY
    temperature: float
    stored = ("pairs_hack", "pairs_clean")

    def refresh(self, policy: Policy) -> dict[str, float]:
        if self.pairs is not None:
            self.pairs_hack, self.pairs_clean = self(policy, self.pairs).scores.chunk(2)
        return {}

    def __call__(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Scored:
        with policy.adapter.ablated("deployed"):
            alone = batch_logps(policy, batch, self.temperature)
        with policy.adapter.disabled():
            base = batch_logps(policy, batch, self.temperature)
        return Scored(alone.sum(1) - base.sum(1), ref_logps=base)


@register("llr")
def build_llr(
    materials: Materials,
    random_seed: int | None = None,
) -> LikelihoodRatio:
    score, probe = materials.config.score, materials.probe
    return LikelihoodRatio(
        materials.batch(),
        temperature=probe.temperature,
        steps=score.llr_steps,
        learning_rate=score.llr_learning_rate,
        random_seed=random_seed,
    )


@register("quarantine_ratio")
def build_quarantine_ratio(materials: Materials) -> QuarantineRatio:
    return QuarantineRatio(materials.batch(), temperature=materials.probe.temperature)
