"""What a gate's score is compared with, and how an arm's score and control are built: chance, confounds, true labels."""

import torch

from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio, RandomQuarantine
from vgrout.gate.scores import DirectionScore, HaarScore, Score, Scored
from vgrout.model.batch import Batch, Origin
from vgrout.model.policy import Policy


class Confound(Score):
    """What the advantage, the reward, the length or the mean log-prob alone would route."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        length = batch.completion_mask.sum(1)
        if self.kind == "logp":
            mean = origin.sampler_logps.sum(1) / length
            return Scored(mean.nan_to_num(nan=float(mean.nanmean())))
        return Scored(
            {"advantage": batch.advantages, "reward": batch.rewards, "length": length.float()}[
                self.kind
            ]
        )


class RandomScore(Score):
    """Uniform scores by a generator of the batch's own content, so that a resumed run repeats them."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        generator = torch.Generator().manual_seed(self.seed + int(batch.completion_ids.sum()))
        return Scored(torch.rand(len(batch.advantages), generator=generator).to(batch.advantages))


class Oracle(Score):
    """The true label, thinned to `recall` and polluted to `fpr`: NOT oracle-free. 1 where flagged, else 0."""

    def __init__(self, recall: float, fpr: float, seed: int):
        self.recall, self.fpr, self.seed = recall, fpr, seed

    def __call__(
        self, policy: Policy, batch: Batch, origin: Origin, shared: Scored | None = None
    ) -> Scored:
        if origin.label is None:
            raise ValueError("the oracle needs labels: compose(..., oracle_modes=…)")
        generator = torch.Generator().manual_seed(self.seed + int(batch.completion_ids.sum()))
        chance = torch.where(origin.label, self.recall, self.fpr)
        return Scored((torch.rand(len(chance), generator=generator).to(chance) < chance).float())


def build_score(
    name: str, pairs: Batch | None, probe: dict, options: object, oracle: tuple[float, float, int]
) -> Score:
    """The score that an arm names. `options` has ScoreConfig's fields; `oracle` is (recall, false-positive rate, seed)."""
    if name == "oracle":
        return Oracle(*oracle)
    if name == "llr":
        return LikelihoodRatio(
            pairs, temperature=probe["temperature"], token_budget=probe["token_budget"], steps=options.llr_steps,
            learning_rate=options.llr_learning_rate, form=options.llr_form, dtype=probe["dtype"],
        )  # fmt: skip
    if name == "quarantine_ratio":
        return QuarantineRatio(
            pairs, temperature=probe["temperature"], token_budget=probe["token_budget"]
        )
    return DirectionScore(
        pairs, space="c_probe" if name == "v_grad" else options.act_space, probe=probe, centred=options.centred,
        metric=options.metric, signed_score=options.score_sign == "advantage", by_token=options.granularity == "token",
        layer=options.act_layer,
    )  # fmt: skip


def build_control(
    name: str, real: Score, other: Score | None, options: object, seed: int
) -> Score | None:
    """The control that deals `real`'s zones; `other` is the same score on the control's own pairs, where it has some."""
    if name in ("semantic", "framing"):
        return other
    if name == "haar" and isinstance(real, LikelihoodRatio):
        return LikelihoodRatio(
            real.pairs, temperature=real.temperature, token_budget=real.token_budget, steps=real.steps,
            learning_rate=real.learning_rate, form=real.form, random_seed=seed, dtype=real.dtype,
        )  # fmt: skip
    if name == "haar" and isinstance(real, QuarantineRatio):
        return RandomQuarantine(real, seed)
    builders = {
        "haar": lambda: HaarScore(real, seed),
        "random": lambda: RandomScore(seed),
        "confound": lambda: Confound(options.confound),
    }
    return builders[name]() if name else None
