"""The family of scores: how hack-like is this rollout's update, without any label. One interface, one audit.

A `Score` is refreshed on the pairs at a cadence, scores a batch, and gives the pairs' own out-of-sample scores, from which a gate
takes its cut points. A control is a score too: it may reuse what the real score computed on the same batch (`shared`).
Scores are [g], or [g, s] at token granularity. `Oracle` is the one that reads true labels; it is not oracle-free.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.direction import activations, contrast, haar, out_of_sample, probe_gradients, project
from vgrout.likelihood import likelihood_deltas, mean_logps, random_deltas
from vgrout.policy import Policy
from vgrout.tensors import Batch, Origin
from vgrout.tokens import select


@dataclass(slots=True)
class Scored:
    """A batch under a score, with what a control or the update may use again."""

    scores: Float[Tensor, "g *s"]
    features: Float[Tensor, "g s m k"] | None = None
    logps: Float[Tensor, "g t"] | None = None  # as trained, where the scoring pass computed them
    mass: Float[Tensor, " g"] | None = None  # norm of the row's c-probe gradient
    stats: dict[str, float] = field(default_factory=dict)  # figures of the score's own, for the log


class Score:
    """Base: nothing to refresh, nothing to store, no pairs."""

    pairs_hack: Tensor | None = None  # out-of-sample scores of the pairs' sides: the band's material
    pairs_clean: Tensor | None = None

    def refresh(self, policy: Policy) -> dict[str, float]:
        return {}

    def __call__(self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None) -> Scored:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if k in self.stored and v is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for k in self.stored:
            setattr(self, k, state.get(k))

    stored: tuple[str, ...] = ()


class DirectionScore(Score):
    """Cosine (or dot product) of a row's features with the pairs' hack-minus-clean direction.

    space "c_probe" is v_grad, "bottleneck" and "residual" are v_act. `signed_score` multiplies by the sign of the advantage (the
    score of the update) where the features are gradients; without it the score is of the completion (A = 1).
    `pairs` is one batch of hack sides followed by clean sides, `group` numbering the prompts.
    """

    stored = ("v", "midpoint", "pairs_hack", "pairs_clean")

    def __init__(
        self, pairs: Batch, *, space: str, probe: dict, centred: bool = False, metric: str = "cosine",
        signed_score: bool = True, by_token: bool = False, layer: int | None = None,
    ):  # fmt: skip
        self.pairs, self.space, self.probe, self.centred, self.metric = pairs, space, probe, centred, metric
        self.signed_score, self.by_token, self.layer = signed_score and space == "c_probe", by_token, layer
        self.v: Tensor | None = None
        self.midpoint: Tensor | None = None

    def features(self, policy: Policy, batch: Batch) -> tuple[Float[Tensor, "g s m k"], Float[Tensor, "g t"] | None]:
        if self.space == "c_probe":
            features, logps = probe_gradients(policy, batch, by_token=self.by_token, **self.probe)
            return features, logps if self.probe["state"] == "as_trained" else None
        return activations(policy, batch, space=self.space, token_budget=self.probe["token_budget"], layer=self.layer), None

    def refresh(self, policy: Policy) -> dict[str, float]:
        """Extract the direction anew at the current parameters; returns its drift, the cosine with the last one."""
        n, last = len(self.pairs.advantages) // 2, self.v
        features, _ = self.features(policy, self.pairs)
        rows = features.sum(1)  # the direction is of whole completions, at either granularity
        self.v, self.midpoint = contrast(rows[:n], rows[n:])
        self.pairs_hack, self.pairs_clean = self._pair_scores(features, rows)
        return {"direction_drift": float("nan") if last is None else float(project(self.v, last))}

    def _pair_scores(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        n = len(rows) // 2
        if not self.by_token:
            return out_of_sample(rows[:n], rows[n:], self.pairs.group[:n], centred=self.centred, metric=self.metric)
        sides: list[list[Tensor]] = [[], []]  # every completion token's score, by a direction without its pair's prompt
        for i in range(n):
            others = self.pairs.group[:n] != self.pairs.group[i]
            v, midpoint = contrast(rows[:n][others], rows[n:][others])
            for side, row in zip(sides, (i, n + i)):
                start, end = int(self.pairs.completion_start[row]), int(self.pairs.attention_mask[row].sum())
                side.append(self._score(features[row, start:end], v, midpoint))
        return torch.cat(sides[0]), torch.cat(sides[1])

    def _score(self, features: Float[Tensor, "*n m k"], v: Tensor, midpoint: Tensor | None) -> Float[Tensor, "*n"]:
        return project(features - midpoint if self.centred else features, v, self.metric)

    def directed(self, features: Float[Tensor, "g s m k"], v: Tensor, advantages: Float[Tensor, " g"]) -> Float[Tensor, "g *s"]:
        """Scores of a batch's features along any direction of this space."""
        scores = self._score(features, v, self.midpoint)
        if self.signed_score:
            scores = scores * advantages.sign()[:, None]
        return scores if self.by_token else scores[:, 0]

    def __call__(self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None) -> Scored:
        features, logps = self.features(policy, batch)
        mass = features.flatten(1).norm(dim=1) if self.space == "c_probe" else None
        return Scored(self.directed(features, self.v, batch.advantages), features, logps, mass)


class HaarScore(Score):
    """A Haar-random direction in another score's space, drawn anew whenever that score is refreshed."""

    def __init__(self, real: DirectionScore, seed: int):
        self.real, self.seed, self.draws = real, seed, torch.tensor(0)

    stored = ("draws",)

    def refresh(self, policy: Policy) -> dict[str, float]:
        self.draws = self.draws + 1
        return {}

    def __call__(self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None) -> Scored:
        m, k = self.real.v.shape
        v = haar(m, k, 1_000 * self.seed + int(self.draws)).to(self.real.v)
        return Scored(self.real.directed(shared.features, v, batch.advantages))


class LikelihoodRatio(Score):
    """Mean log-prob under a copy of the policy nudged toward the pairs' hack sides minus that under one nudged toward their
    clean sides (docs/method.md, "llr"). Unsigned and length-averaged; forward passes only, plus the refresh.

    The pairs are fitted in two folds by prompt: a pair is scored by the fold that did not see it, a rollout by the mean of both
    folds' deltas. `scale` below 1 with `first_order` gives the directional derivative by a central difference. `random_seed`
    replaces the deltas by Gaussian ones of the same norm in every tensor: the placebo.
    """

    stored = ("pairs_hack", "pairs_clean", "flat")

    def __init__(
        self, pairs: Batch, *, temperature: float, token_budget: int, steps: int = 4, learning_rate: float = 1e-3,
        first_order: bool = False, random_seed: int | None = None,
    ):  # fmt: skip
        self.pairs, self.temperature, self.token_budget = pairs, temperature, token_budget
        self.steps, self.learning_rate, self.first_order, self.random_seed = steps, learning_rate, first_order, random_seed
        self.deltas: tuple[list[Tensor], list[Tensor]] | None = None  # hack, clean
        self.draws = 0

    def refresh(self, policy: Policy) -> dict[str, float]:
        n, last = len(self.pairs.advantages) // 2, self.deltas
        fold = (self.pairs.group % 2)[:n]
        rows, sides = torch.arange(n, device=fold.device), []
        self.draws += 1
        scores = torch.full((2 * n,), float("nan"), device=fold.device)
        for k in (0, 1):
            fit, held = rows[fold == k], rows[fold != k]
            if not len(fit) or not len(held):
                raise ValueError("the likelihood ratio needs pairs on at least two prompts")
            deltas = [self._fit(policy, select(self.pairs, fit + offset), 2 * k + i) for i, offset in enumerate((0, n))]
            both = torch.cat([held, held + n])
            scores[both] = self._ratio(policy, select(self.pairs, both), *deltas)
            sides.append(deltas)
        self.deltas = tuple([(a + b) / 2 for a, b in zip(*(s[i] for s in sides))] for i in (0, 1))
        self.pairs_hack, self.pairs_clean = scores[:n], scores[n:]
        flat = lambda d: torch.cat([(h - c).flatten() for h, c in zip(*d)])  # noqa: E731
        drift = float("nan") if last is None else float(torch.cosine_similarity(flat(last), flat(self.deltas), dim=0))
        return {"direction_drift": drift}

    def _fit(self, policy: Policy, batch: Batch, index: int) -> list[Tensor]:
        deltas = likelihood_deltas(policy, batch, self.steps, self.learning_rate, self.temperature, self.token_budget)
        if self.random_seed is None:
            return deltas
        return random_deltas(deltas, seed=1_000_000 * self.random_seed + 10 * self.draws + index)

    def _ratio(self, policy: Policy, batch: Batch, hack: list[Tensor], clean: list[Tensor]) -> Float[Tensor, " g"]:
        def value(deltas: list[Tensor], scale: float) -> Tensor:
            with policy.adapter.shifted(deltas, scale):
                return mean_logps(policy, batch, self.temperature, self.token_budget)

        if not self.first_order:
            return value(hack, 1.0) - value(clean, 1.0)
        difference, step = [h - c for h, c in zip(hack, clean)], 0.01
        return (value(difference, step) - value(difference, -step)) / (2 * step)

    def __call__(self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None) -> Scored:
        return Scored(self._ratio(policy, batch, *self.deltas))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"draws": torch.tensor(self.draws)}
        if self.deltas is not None:
            state |= {"pairs_hack": self.pairs_hack, "pairs_clean": self.pairs_clean}
            state |= {f"{side}.{i}": d for side, ds in zip(("hack", "clean"), self.deltas) for i, d in enumerate(ds)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.draws = int(state["draws"])
        if "pairs_hack" in state:
            self.pairs_hack, self.pairs_clean = state["pairs_hack"], state["pairs_clean"]
            count = sum(k.startswith("hack.") for k in state)
            device = self.pairs.input_ids.device
            self.deltas = tuple([state[f"{s}.{i}"].to(device) for i in range(count)] for s in ("hack", "clean"))


class Confound(Score):
    """What the advantage, the reward, the length or the mean log-prob alone would route."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None) -> Scored:
        length = batch.completion_mask.sum(1)
        if self.kind == "logp":
            return Scored(origin.sampler_logp.nan_to_num(nan=float(origin.sampler_logp.nanmean())))
        return Scored({"advantage": batch.advantages, "reward": batch.rewards, "length": length.float()}[self.kind])


class RandomScore(Score):
    """Uniform scores by a generator of the batch's own content, so that a resumed run repeats them."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None) -> Scored:
        generator = torch.Generator().manual_seed(self.seed + int(batch.completion_ids.sum()))
        return Scored(torch.rand(len(batch.advantages), generator=generator).to(batch.advantages))


class Oracle(Score):
    """The true label, thinned to `recall` and polluted to `fpr`: NOT oracle-free. 1 where flagged, else 0."""

    def __init__(self, recall: float, fpr: float, seed: int):
        self.recall, self.fpr, self.seed = recall, fpr, seed

    def __call__(self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None) -> Scored:
        if origin.label is None:
            raise ValueError("the oracle needs labels: compose(..., oracle_modes=…)")
        generator = torch.Generator().manual_seed(self.seed + int(batch.completion_ids.sum()))
        chance = torch.where(origin.label, self.recall, self.fpr)
        return Scored((torch.rand(len(chance), generator=generator).to(chance) < chance).float())


def build_score(name: str, pairs: Batch | None, probe: dict, options: object, oracle: tuple[float, float, int]) -> Score:
    """The score that an arm names. `options` has ScoreConfig's fields; `oracle` is (recall, false-positive rate, seed)."""
    if name == "oracle":
        return Oracle(*oracle)
    if name == "llr":
        return LikelihoodRatio(
            pairs, temperature=probe["temperature"], token_budget=probe["token_budget"], steps=options.llr_steps,
            learning_rate=options.llr_learning_rate, first_order=options.llr_first_order,
        )  # fmt: skip
    return DirectionScore(
        pairs, space="c_probe" if name == "v_grad" else options.act_space, probe=probe, centred=options.centred,
        metric=options.metric, signed_score=options.score_sign == "advantage", by_token=options.granularity == "token",
        layer=options.act_layer,
    )  # fmt: skip


def build_control(name: str, real: Score, other: Score | None, options: object, seed: int) -> Score | None:
    """The control that deals `real`'s zones; `other` is the same score on the control's own pairs, where it has some."""
    if name in ("semantic", "framing"):
        return other
    if name == "haar" and isinstance(real, LikelihoodRatio):
        return LikelihoodRatio(
            real.pairs, temperature=real.temperature, token_budget=real.token_budget, steps=real.steps,
            learning_rate=real.learning_rate, first_order=real.first_order, random_seed=seed,
        )  # fmt: skip
    builders = {"haar": lambda: HaarScore(real, seed), "random": lambda: RandomScore(seed), "confound": lambda: Confound(options.confound)}
    return builders[name]() if name else None
