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
    styled,
    styled_batch,
)
from scripts.verify.tiny import PAD, perturb, random_batch, tiny_policy

from vgrout.arms import ARMS
from vgrout.config import ControlConfig
from vgrout.core import NO_ZONE, Mode, Zone
from vgrout.gate import gate as gates
from vgrout.gate.actions import Options, drop, group_z, penalise, route
from vgrout.gate.controls import Confound, Control, Haar, Random, RandomQuarantine
from vgrout.gate.gate import Gate, Gated, PinnedGate
from vgrout.gate.oracle import Oracle
from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio
from vgrout.gate.scores import Scored
from vgrout.gate.swap import logps_with, replaced_quarantine
from vgrout.gate.v_grad import DirectionScore, activations, probe_gradients
from vgrout.model import grpo
from vgrout.model.batch import Batch
from vgrout.model.likelihood import (
    batch_logps,
    likelihood_deltas,
    likelihood_steps,
    mean_logps,
    random_deltas,
)
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import trained_blocks
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample
from vgrout.model.tokens import collate, select

HOW = dict(temperature=1.0, token_budget=1000)
llr = partial(LikelihoodRatio, learning_rate=1e-2, **HOW)
v_grad = partial(DirectionScore, space="c_probe", probe=PROBE)


def parameters(policy: Policy) -> dict[str, torch.Tensor]:
    """Each block's parameters, flat."""
    return {
        b: torch.cat([p.flatten() for p in policy.adapter.parameters(b)]).detach() for b in BLOCKS
    }


def unmoved(policy: Policy, before: dict[str, torch.Tensor]) -> dict[str, bool]:
    return {block: torch.equal(p, before[block]) for block, p in parameters(policy).items()}


def learn(policy: Policy, batch: Batch, steps: int) -> None:
    """Likelihood steps into the quarantine."""
    likelihood_steps(
        policy,
        batch,
        "quarantine",
        steps,
        1e-2,
        1.0,
        1000,
    )


def check_scores_find_a_style() -> None:
    """Every score finds a planted difference of the pairs' sides in fresh rows; Haar does not."""
    policy = tiny_policy(rank=16)
    pairs = styled_batch(64, 1)[0]
    fresh, label = styled_batch(40, 7)
    v_act = partial(DirectionScore, pairs, probe=PROBE, centred=True)
    scores = {
        "v_grad unit": v_grad(pairs, signed_score=False, centred=True),
        "v_act bottleneck": v_act(space="bottleneck"),
        "v_act residual": v_act(space="residual"),
        "llr": llr(pairs, steps=8),
    }
    real = {}
    for name, score in scores.items():
        real[name] = area(refreshed(score, policy)(policy, fresh).scores, label)
        assert score.pairs_hack.mean() > score.pairs_clean.mean(), name
    residual = scores["v_act residual"]
    shared = residual(policy, fresh)
    placebos = [refreshed(Haar(residual, seed), policy) for seed in range(1, 21)]
    draws = [area(p.rank(policy, behind(fresh), shared), label) for p in placebos]
    assert min(real.values()) > 0.8, real
    assert abs(sum(draws) / 20 - 0.5) < 0.2, draws
    print(
        "ok  a planted style is found:",
        ", ".join(f"{k} {v:.2f}" for k, v in real.items()),
    )


def check_quarantine_ratio() -> None:
    """A quarantine that learned a style finds it in fresh rows; one that has not routes nothing."""
    policy = tiny_policy(rank=16)
    pairs = styled_batch(64, 1)[0]
    fresh, label = styled_batch(40, 7)
    gate = refreshed(
        Gate(QuarantineRatio(pairs, **HOW), cut="midpoint"),
        policy,
    )
    gated = gate(policy, fresh)
    assert not gated.scores.any() and not gated.zones.any(), "an untrained quarantine routes"
    learn(policy, select(pairs, torch.arange(32)), 8)
    live = batch_logps(policy, fresh, 1.0, 1000)  # the deployed block is still the base
    gate.refresh(policy)
    perturb(policy, 0.02, blocks=("deployed",))  # what it learns later does not change the score
    gated = gate(policy, fresh)
    with policy.adapter.disabled():
        base = batch_logps(policy, fresh, 1.0, 1000)
    assert torch.allclose(
        gated.scores,
        (live - base).sum(1),
        atol=1e-4,
    )
    assert torch.allclose(gated.ref_logps, base, atol=1e-5), "the reference is not the base"
    assert not torch.allclose(live, base, atol=1e-2), "another reference would go unnoticed"
    real = area(gated.scores, label)
    routed = gated.zones == Zone.ROUTE
    precision = float(label[routed].float().mean())
    assert real > 0.9 and precision > 0.8 and 0 < routed.sum() < 40, (real, precision)
    assert not (gated.zones == Zone.ABSORB).any(), "a midpoint absorbs"
    bare = refreshed(
        Gate(QuarantineRatio(None, **HOW), cut="zero"),
        policy,
    )  # needs no pairs
    assert torch.equal(bare(policy, fresh).scores, gated.scores)
    swapped = select(pairs, torch.arange(64).roll(32))  # mutation: sides swapped
    inverted = refreshed(
        Gate(QuarantineRatio(swapped, **HOW), cut="midpoint"),
        policy,
    )
    assert not inverted(policy, fresh).zones.any(), "a gate whose sides are inverted routes"
    placebos = [refreshed(RandomQuarantine(gate.score, s), policy) for s in range(1, 21)]
    draws = [area(p.rank(policy, behind(fresh), gated.scored), label) for p in placebos]
    assert abs(sum(draws) / 20 - 0.5) < 0.2 and real > sorted(draws)[18], draws
    print(f"ok  the quarantine's ratio: 0 untrained; AUROC {real:.2f}, precision {precision:.2f}")


def check_replaced_quarantine() -> None:
    """A random quarantine of equal effect is as far from the base as the learned one."""
    policy = tiny_policy(rank=16)
    pairs = styled_batch(64, 1)[0]
    prompts = styled(40, 7, True)[0]
    ones = [1.0] * 40
    how = dict(
        max_completion_length=8,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    rows = [row[0][0] for row in sample(policy, prompts, [1] * 40, **how, **HOW)]
    batch = collate(
        prompts,
        rows,
        ones,
        [*range(40)],
        ones,
        PAD,
        "cpu",
    )
    learn(policy, select(pairs, torch.arange(32)), 2)
    learned = [p.detach().clone() for p in policy.adapter.parameters("quarantine")]
    before = parameters(policy)
    with policy.adapter.disabled():
        base = batch_logps(policy, batch, 1.0, 1000)

    def effect(deltas: list[torch.Tensor]) -> float:
        gap = (logps_with(policy, deltas, batch, 1.0, 1000) - base)[batch.completion_mask]
        return float((gap.exp() - gap - 1).mean())

    new = {
        what: replaced_quarantine(what, policy, batch, 1.0, 1000, seed=1)
        for what in ("reset", "norm", "effect", "inverted")
    }
    assert all(unmoved(policy, before).values()), "the parameters have moved"
    for same, noise, minus, old in zip(new["reset"], new["norm"], new["inverted"], learned):
        assert torch.equal(same, old)
        assert torch.equal(minus, -old)
        assert torch.allclose(noise.norm(), old.norm())
    share = {what: effect(deltas) / effect(learned) for what, deltas in new.items()}
    assert effect(learned) > 0.01
    assert share["reset"] == 1
    assert abs(share["effect"] - 1) < 0.1 and share["norm"] < 0.5, share
    print("ok  a random quarantine's share of the learned KL at equal norm", end=" ")
    print(f"{share['norm']:.2f}, at equal effect {share['effect']:.2f}")


def check_llr_restores() -> None:
    policy = tiny_policy()
    pairs = styled_batch(16, 1)[0]
    perturb(policy)
    before = parameters(policy)
    score = refreshed(llr(pairs), policy)
    scores = score(policy, pairs).scores
    deltas = likelihood_deltas(policy, pairs, 3, 1e-2, 1.0, 1000)
    assert all(unmoved(policy, before).values()), "the ratio left a trace in the parameters"
    value = mean_logps(policy, pairs, 1.0, 1000).mean()
    with policy.adapter.shifted(deltas):
        raised = mean_logps(policy, pairs, 1.0, 1000).mean()
    assert raised > value + 0.01, "the nudge does not raise the likelihood"
    noise = random_deltas(deltas, 3)
    assert all(torch.allclose(a.norm(), b.norm()) for a, b in zip(noise, deltas))
    assert not torch.allclose(noise[0], deltas[0])
    saved = llr(pairs)
    saved.load_state_dict(score.state_dict())
    assert torch.equal(saved(policy, pairs).scores, scores)
    learn(policy, pairs, 2)
    assert unmoved(policy, before) == {"deployed": True, "quarantine": False}
    print("ok  likelihood ratio: parameters and state restore exactly; seeding moves one block")


def check_folds() -> None:
    """Pairs without a common contrast score at chance: each by the fold that did not see it."""
    policy = tiny_policy()
    label = torch.arange(32) < 16
    found = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        prompts, hack, clean = (drawn(16, n, 2, 64, g) for n in (4, 7, 7))
        score = refreshed(llr(paired(prompts, hack, clean)), policy)
        held = torch.cat([score.pairs_hack, score.pairs_clean])
        seen = score(policy, score.pairs).scores
        found.append([area(x, label) for x in (held, seen)])
    held, seen = torch.tensor(found).mean(0).tolist()
    assert 0.35 < held < 0.65 and seen > 0.85, (held, seen)
    print(f"ok  two-fold scores of meaningless pairs: AUROC {held:.2f}, of fitted ones {seen:.2f}")


def check_tokens() -> None:
    """Zones where a token predicts one; a placebo deals them, and padding to nobody."""
    policy = tiny_policy()
    pairs = styled_batch(16, 1)[0]
    batch = random_batch(8)
    perturb(policy)
    score = v_grad(pairs, by_token=True)
    composed = behind(batch)
    predicts = gates.predicts(batch)
    gate = refreshed(Gate(score), policy)
    counts = lambda zones: zones[predicts].bincount(minlength=3).tolist()  # noqa: E731
    real = gate(policy, batch)
    dealt = Control(gate, Haar(score, 1))(policy, composed, real)
    assert dealt.zones.shape == batch.input_ids.shape == dealt.scores.shape
    assert counts(dealt.zones) == counts(real.zones)
    assert min(counts(real.zones)) > 0
    assert torch.equal(dealt.zones == NO_ZONE, ~predicts)
    assert torch.equal(dealt.scores.isnan(), ~predicts)
    routed = dealt.zones.where(~predicts, int(Zone.ROUTE))
    assert trained_blocks(routed) == {"deployed": False, "quarantine": True}

    def unlike() -> int:
        """Of eight placebos, those whose counts are not the gate's."""
        edge = Gate(score, cut="zero")
        gated = edge(policy, batch)
        placebos = [Control(edge, Haar(score, seed)) for seed in range(8)]
        zones = [placebo(policy, composed, gated).zones for placebo in placebos]
        return sum(counts(z) != counts(gated.zones) for z in zones)

    everywhere = torch.ones_like(predicts)
    with mock.patch.object(
        gates,
        "predicts",
        lambda batch: everywhere,
    ):
        padded = unlike()
    assert unlike() == 0 and padded > 4, f"where padding is dealt {padded} of 8 differ"
    options = replace(PROBE, positions="all")
    whole, tokens = (probe_gradients(policy, batch, options, by_token=b) for b in (False, True))
    assert torch.allclose(
        tokens.sum(1, keepdim=True),
        whole,
        atol=1e-5,
    )
    assert not torch.allclose(tokens[:, :1], whole, atol=1e-3)
    pooled = partial(
        activations,
        policy,
        batch,
        space="residual",
        layer=1,
    )
    assert torch.allclose(
        pooled(token_budget=20),
        pooled(token_budget=4000),
        atol=1e-5,
    )
    print("ok  token granularity: zones of what predicts, a matched placebo, gradients that add up")


def check_controls_and_oracle() -> None:
    policy, (batch, label) = tiny_policy(), styled_batch(60, 2)
    hacks = label.tolist()
    plain = PinnedGate(Zone.RETAIN)(policy, batch)

    def oracle(seed: int = 0, **options) -> Gated:
        control = Oracle(ControlConfig(**options), seed)
        return control(policy, behind(batch, hacks), plain)

    exact = oracle()
    assert torch.equal(exact.scores.bool(), label)
    assert torch.equal(exact.zones, label * int(Zone.ROUTE))
    assert torch.equal(
        oracle(oracle_modes=(Mode.SENTINEL,)).zones,
        exact.zones,
    )
    assert not oracle(oracle_modes=(Mode.RUN_TESTS,)).zones.any(), "labels of another mode"
    noisy = [oracle(s, oracle_recall=0.5, oracle_fpr=0.1).scores for s in range(200)]
    recall, false = (torch.stack(noisy)[:, rows].mean() for rows in (label, ~label))
    assert abs(recall - 0.5) < 0.03 and abs(false - 0.1) < 0.02, (recall, false)
    composed = behind(batch)
    scored = Scored(plain.scores)
    length = Confound("length").rank(policy, composed, scored)
    assert torch.equal(length, batch.completion_mask.sum(1).float())
    known = behind(batch, teachers=5)
    means = Confound("logp").rank(policy, known, scored)
    assert torch.allclose(means[:5], means[5:].mean()), "a row that nothing sampled is extreme"
    one, same, other = (Random(seed).rank(policy, composed, scored) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert {n for n, arm in ARMS.items() if arm.phases[-1].control == "oracle"} == {"oracle"}
    print("ok  oracle: exact, by mode, or at its recall and false-positive rate; other controls")


def check_actions() -> None:
    rewards = torch.tensor([3.5, 0.5, 0.5, 3.5, 0.5, 3.5])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    A = grpo.advantages(rewards, group)
    zones = torch.tensor([2, 0, 0, 2, 0, 0])
    batch = replace(
        random_batch(6),
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
    fined = grpo.advantages(
        rewards * (1 - 2 * torch.sigmoid(z) * (z > 0)),
        group,
    )
    assert fined[0] < A[0], "what is flagged is not lowered"
    retained = grpo.retained_advantages(rewards, group, zones)
    left = torch.tensor([0.0, 0.0, -1.5, 1.5])
    absorbed = torch.ones(6)
    for action, options, advantages, zone in (
        (route, Options(), A, zones),
        (route, Options(retained_advantages=True), retained, zones),
        (drop, Options(), left, absorbed[:4]),
        (drop, Options(zone=Zone.RETAIN), left, absorbed[:4] * 0),
        (penalise, Options(alpha=2.0), fined, absorbed),
        (penalise, Options(alpha=0.0, zone=Zone.RETAIN), A, absorbed * 0),
    ):
        trained = action(batch, gated, options)
        assert torch.allclose(trained.batch.advantages, advantages), action
        assert trained.zones.tolist() == zone.tolist(), action
    assert drop(batch, gated, Options()).rows.tolist() == [1, 2, 4, 5]
    assert (
        drop(
            batch,
            replace(gated, zones=absorbed.long() * 2),
            Options(),
        )
        is None
    )
    print("ok  route keeps, filter drops and re-centres, penalise lowers what it flags")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_scores_find_a_style()
    check_quarantine_ratio()
    check_replaced_quarantine()
    check_llr_restores()
    check_folds()
    check_tokens()
    check_controls_and_oracle()
    check_actions()
