"""Scores beyond v_grad, controls, the oracle and actions, each with a mutation that is noticed."""

from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from scripts.verify.styled import (
    PROBE,
    area,
    behind,
    drawn,
    paired,
    refreshed,
    styled_batch,
)
from scripts.verify.tiny import (
    perturb,
    planted,
    random_batch,
    tiny_policy,
    trained,
)
from torch import Tensor

from vgrout.config import ControlConfig
from vgrout.core import NO_ZONE, Mode, Zone
from vgrout.gate import gate as gates
from vgrout.gate.actions import (
    Options,
    drop,
    group_z,
    penalise,
    route,
)
from vgrout.gate.controls import (
    Confound,
    Control,
    Haar,
    Random,
    RandomQuarantine,
)
from vgrout.gate.gate import Gate, Gated, PinnedGate
from vgrout.gate.oracle import Oracle
from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio
from vgrout.gate.scores import Scored
from vgrout.gate.swap import logps_with, replaced_quarantine
from vgrout.gate.v_grad import DirectionScore
from vgrout.model import grpo
from vgrout.model.batch import Batch
from vgrout.model.likelihood import (
    batch_logps,
    likelihood_deltas,
    likelihood_steps,
    mean_logps,
)
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import trained_blocks
from vgrout.model.policy import Policy
from vgrout.model.tokens import select

HOW = {"temperature": 1.0}
PAIRS = styled_batch(48, 1)[0]  # with a planted style
HACKS = select(PAIRS, torch.arange(24))
FRESH, LABEL = styled_batch(40, 7)
SEEDS = range(1, 13)
llr = partial(LikelihoodRatio, learning_rate=1e-2, **HOW)
v_grad = partial(DirectionScore, space="c_probe", probe=PROBE)


def parameters(policy: Policy) -> list[Tensor]:
    """Each block's, flat."""
    return [torch.cat([p.detach().flatten() for p in trained(policy, [b])]) for b in BLOCKS]


def unmoved(policy: Policy, before: list[Tensor]) -> list[bool]:
    return [torch.equal(p, old) for p, old in zip(parameters(policy), before)]


def learn(policy: Policy, batch: Batch, steps: int) -> None:
    """Likelihood steps into the quarantine."""
    likelihood_steps(policy, batch, "quarantine", steps, 1e-2, 1.0)


def found_by(policy: Policy, control, scored: Scored) -> float:
    return area(
        refreshed(control, policy).rank(policy, behind(FRESH), scored),
        LABEL,
    )


def check_scores_find_a_style() -> None:
    """Every score finds a planted difference of the pairs' sides in fresh rows; Haar does not."""
    policy = tiny_policy(rank=16)
    v_act = partial(DirectionScore, PAIRS, probe=PROBE, centred=True)
    residual = v_act(space="residual")
    scores = {
        "v_grad unit": v_grad(PAIRS, signed_score=False, centred=True),
        "v_act bottleneck": v_act(space="bottleneck"),
        "v_act residual": residual,
        "llr": llr(PAIRS, steps=8),
    }
    real = {}
    for name, score in scores.items():
        real[name] = area(
            refreshed(score, policy)(policy, FRESH).scores,
            LABEL,
        )
        assert score.pairs_hack.mean() > score.pairs_clean.mean(), name
    shared = residual(policy, FRESH)
    chance = [found_by(policy, Haar(residual, seed), shared) for seed in SEEDS]
    assert min(real.values()) > 0.8, real
    assert abs(sum(chance) / len(SEEDS) - 0.5) < 0.2, chance
    words = ", ".join(f"{name} {value:.2f}" for name, value in real.items())
    print("ok  a planted style is found:", words)


def check_quarantine_ratio() -> None:
    """A quarantine that learned a style finds it in fresh rows; one that has not routes nothing."""
    policy = tiny_policy(rank=16)
    gate = refreshed(
        Gate(QuarantineRatio(PAIRS, **HOW), cut="midpoint"),
        policy,
    )
    assert not gate(policy, FRESH).zones.any(), "an untrained quarantine routes"
    base = batch_logps(policy, FRESH, **HOW)
    learn(policy, HACKS, 8)
    live = batch_logps(policy, FRESH, **HOW)  # the deployed block is still the base
    gate.refresh(policy)
    perturb(policy, 0.02, blocks=["deployed"])  # what it learns later does not change the score
    gated = gate(policy, FRESH)
    assert torch.allclose(gated.scores, (live - base).sum(1), atol=1e-4)
    assert torch.allclose(gated.ref_logps, base, atol=1e-5), "the reference is not the base"
    real, routed = (
        area(gated.scores, LABEL),
        gated.zones == Zone.ROUTE,
    )
    precision = float(LABEL[routed].float().mean())
    assert real > 0.9 and precision > 0.8 and 0 < routed.sum() < 40, (real, precision)
    assert not (gated.zones == Zone.ABSORB).any(), "a midpoint absorbs"
    swapped = select(PAIRS, torch.arange(48).roll(24))  # mutation
    inverted = refreshed(
        Gate(QuarantineRatio(swapped, **HOW), cut="midpoint"),
        policy,
    )
    assert not inverted(policy, FRESH).zones.any(), "a gate whose sides are inverted routes"
    controls = [RandomQuarantine(gate.score, seed) for seed in SEEDS]
    chance = [found_by(policy, control, gated.scored) for control in controls]
    assert abs(sum(chance) / len(SEEDS) - 0.5) < 0.2 and real > max(chance), chance
    print(f"ok  the quarantine's ratio: 0 untrained; AUROC {real:.2f}, precision {precision:.2f}")


def check_replaced_quarantine() -> None:
    """A random quarantine of equal effect is as far from the base as the learned one."""
    policy = tiny_policy(rank=16)
    base = batch_logps(policy, FRESH, **HOW)
    learn(policy, HACKS, 2)
    learned = [p.detach().clone() for p in trained(policy, ["quarantine"])]
    before = parameters(policy)

    def effect(deltas: list[Tensor]) -> float:
        gap = (logps_with(policy, deltas, FRESH, **HOW) - base)[FRESH.completion_mask]
        return float((gap.exp() - gap - 1).mean())

    new, share = {}, {}
    for what in ("reset", "norm", "effect", "inverted"):
        new[what] = replaced_quarantine(what, policy, FRESH, **HOW, seed=1)
        share[what] = effect(new[what]) / effect(learned)
    assert all(unmoved(policy, before)), "the parameters have moved"
    for same, noise, minus, old in zip(new["reset"], new["norm"], new["inverted"], learned):
        assert torch.equal(same, old) and torch.equal(minus, -old)
        assert torch.allclose(noise.norm(), old.norm())
    assert abs(share["effect"] - 1) < 0.1 and share["norm"] < 0.5, share
    print(
        "ok  a random quarantine's share of the learned KL at equal norm",
        end=" ",
    )
    print(f"{share['norm']:.2f}, at equal effect {share['effect']:.2f}")


def check_llr() -> None:
    """It leaves no trace, and restores. Pairs without a common contrast score at chance: each by
    the fold that did not see it; by fitted folds they do not."""
    policy, _ = planted()
    before = parameters(policy)
    value = mean_logps(policy, HACKS, **HOW).mean()
    with policy.adapter.shifted(likelihood_deltas(policy, HACKS, 3, 1e-2, **HOW)):
        raised = mean_logps(policy, HACKS, **HOW).mean()
    assert raised > value + 0.01, "the nudge does not raise the likelihood"
    areas = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        prompts, hack, clean = (drawn(16, n, 2, 64, g) for n in (4, 7, 7))
        score = refreshed(llr(paired(prompts, hack, clean), steps=2), policy)
        held = torch.cat([score.pairs_hack, score.pairs_clean])
        seen = score(policy, score.pairs).scores
        areas.append([area(x, torch.arange(32) < 16) for x in (held, seen)])
    outside, inside = torch.tensor(areas).mean(0).tolist()
    assert 0.35 < outside < 0.65 and inside > 0.85, (
        outside,
        inside,
    )
    assert all(unmoved(policy, before)), "the ratio left a trace in the parameters"
    saved = llr(score.pairs)
    saved.load_state_dict(score.state_dict())
    assert torch.equal(saved(policy, score.pairs).scores, seen)
    learn(policy, HACKS, 1)
    assert unmoved(policy, before) == [True, False], "seeding moves another block"
    print(f"ok  llr leaves no trace; meaningless pairs: AUROC {outside:.2f}, fitted {inside:.2f}")


def check_tokens() -> None:
    """Zones where a token predicts one; a placebo deals them, and padding to nobody."""
    policy, batch = planted(8)
    score = v_grad(PAIRS, by_token=True)
    refreshed(score, policy)
    predicts, everywhere = (
        gates.predicts(batch),
        torch.ones_like(batch.input_ids).bool(),
    )

    def dealt(seed: int) -> tuple[Gated, bool]:
        """A placebo's zones, and whether their counts are the gate's."""
        gate = Gate(score, cut="zero")
        real = gate(policy, batch)
        placebo = Control(gate, Haar(score, seed))(policy, behind(batch), real)
        counts = [x.zones[predicts].bincount(minlength=3).tolist() for x in (real, placebo)]
        return placebo, counts[0] == counts[1]

    for placebo, matched in map(dealt, range(8)):
        assert matched and placebo.zones.shape == placebo.scores.shape == predicts.shape
        assert torch.equal(placebo.zones == NO_ZONE, ~predicts)
        assert torch.equal(placebo.scores.isnan(), ~predicts)
    with mock.patch.object(gates, "predicts", lambda batch: everywhere):  # mutation
        assert not all(dealt(seed)[1] for seed in range(8)), "padding that is dealt goes unnoticed"
    routed = placebo.zones.where(~predicts, int(Zone.ROUTE))
    assert trained_blocks(routed) == {
        "deployed": False,
        "quarantine": True,
    }
    print("ok  token granularity: zones of what predicts, a matched placebo")


def check_controls_and_oracle() -> None:
    policy = tiny_policy()
    plain = PinnedGate(Zone.RETAIN)(policy, FRESH)
    composed = behind(FRESH, LABEL.tolist(), teachers=5)

    def oracle(seed: int = 0, **options) -> Gated:
        return Oracle(ControlConfig(**options), seed)(policy, composed, plain)

    assert torch.equal(oracle().zones, LABEL * int(Zone.ROUTE))
    assert torch.equal(oracle(oracle_modes=(Mode.SENTINEL,)).zones, oracle().zones)
    assert not oracle(oracle_modes=(Mode.RUN_TESTS,)).zones.any(), "labels of another mode"
    noisy = [oracle(seed, oracle_recall=0.5, oracle_fpr=0.1).scores for seed in range(200)]
    recall, false = (torch.stack(noisy)[:, rows].mean() for rows in (LABEL, ~LABEL))
    assert abs(recall - 0.5) < 0.03 and abs(false - 0.1) < 0.02, (recall, false)
    controls = (Confound("length"), Confound("logp"), Random(1), Random(2))
    scored = Scored(plain.scores)
    length, means, one, other = (c.rank(policy, composed, scored) for c in controls)
    assert torch.equal(length, FRESH.completion_mask.sum(1).float())
    assert torch.allclose(means[:5], means[5:].mean()), "a row that nothing sampled is extreme"
    assert not torch.equal(one, other)
    print("ok  oracle: exact, by mode, or at its recall and false-positive rate; other controls")


def check_actions() -> None:
    rewards = torch.tensor([3.5, 0.5, 0.5, 3.5, 0.5, 3.5])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    zones = torch.tensor([2, 0, 0, 2, 0, 0])
    A = grpo.advantages(rewards, group)
    batch = replace(
        random_batch(),
        rewards=rewards,
        group=group,
        advantages=A,
    )
    gated = Gated(
        zones,
        torch.tensor([3.0, 0.0, 0.0, 3.0, 0.0, 0.1]),
        0.0,
        1.0,
    )
    z = group_z(gated.scores, group)
    fined = grpo.advantages(rewards * (1 - 2 * torch.sigmoid(z) * (z > 0)), group)
    assert fined[0] < A[0], "what is flagged is not lowered"
    retained = grpo.retained_advantages(rewards, group, zones)
    left = torch.tensor([0.0, 0.0, -1.5, 1.5])
    for action, options, advantages, wanted in (
        (route, Options(), A, zones.tolist()),
        (
            route,
            Options(retained_advantages=True),
            retained,
            zones.tolist(),
        ),
        (drop, Options(), left, [1] * 4),
        (drop, Options(zone=Zone.RETAIN), left, [0] * 4),
        (penalise, Options(alpha=2.0), fined, [1] * 6),
        (penalise, Options(alpha=0.0), A, [1] * 6),
    ):
        result = action(batch, gated, options)
        assert torch.allclose(result.batch.advantages, advantages), action
        assert result.zones.tolist() == wanted, action
    assert drop(batch, gated, Options()).rows.tolist() == [
        1,
        2,
        4,
        5,
    ]
    flagged = replace(gated, zones=torch.full((6,), int(Zone.ROUTE)))
    assert drop(batch, flagged, Options()) is None
    print("ok  route keeps, filter drops and re-centres, penalise lowers what it flags")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_scores_find_a_style()
    check_quarantine_ratio()
    check_replaced_quarantine()
    check_llr()
    check_tokens()
    check_controls_and_oracle()
    check_actions()
