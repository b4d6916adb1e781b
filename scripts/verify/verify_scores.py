"""Scores, controls and actions beyond v_grad: likelihood ratio, activations, token granularity, oracle, filter, penalise."""

from dataclasses import replace

import torch
from scripts.verify.tiny import EOS, PAD, perturb, random_batch, tiny_policy
from torch.nn import functional as F

from vgrout.config import ARMS
from vgrout.core import NO_ZONE, Zone
from vgrout.gate import gate as gates
from vgrout.gate.actions import Options, drop, group_z, penalise, route
from vgrout.gate.controls import Confound, Oracle, RandomScore
from vgrout.gate.direction import activations, probe_gradients
from vgrout.gate.gate import Gate
from vgrout.gate.ratio import (
    LikelihoodRatio,
    QuarantineRatio,
    RandomQuarantine,
    logps_with,
    replaced_quarantine,
)
from vgrout.gate.scores import DirectionScore, HaarScore
from vgrout.model import grpo
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.likelihood import (
    batch_logps,
    likelihood_deltas,
    likelihood_steps,
    mean_logps,
    random_deltas,
)
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import trained_blocks
from vgrout.model.sampling import sample
from vgrout.model.tokens import collate, select
from vgrout.stats import auroc

PROBE = dict(max_completion_length=8, temperature=1.0, token_budget=1000, state="as_trained")


def styled(rows: int, seed: int, style: bool) -> tuple[list, list]:
    """Prompts, and completions that draw from six low (style) or six high tokens."""
    g = torch.Generator().manual_seed(seed)
    low, high = (2, 8) if style else (32, 38)
    prompts = [torch.randint(2, 64, (4,), generator=g).tolist() for _ in range(rows)]
    return prompts, [
        torch.randint(low, high, (7,), generator=g).tolist() + [EOS] for _ in range(rows)
    ]


def styled_batch(rows: int, seed: int) -> tuple[Batch, torch.Tensor]:
    """Half the rows in the hack style, half not; on pairs' layout (hack sides first, shared prompts), A = +1."""
    prompts, hack = styled(rows // 2, seed, True)
    _, clean = styled(rows // 2, seed + 100, False)
    n = rows // 2
    batch = collate(
        prompts * 2, hack + clean, [1.0] * rows, [*range(n)] * 2, [1.0] * rows, PAD, "cpu"
    )
    return batch, torch.arange(rows) < n


def origin_of(batch: Batch, label: torch.Tensor | None = None) -> Origin:
    none = torch.zeros(len(batch.advantages), dtype=torch.bool)
    scored = torch.randn(batch.completion_ids.shape, generator=torch.Generator().manual_seed(0))
    return Origin(~none, none, scored, 2 * batch.advantages.sign().long() + 1, label)


def check_scores_find_a_style() -> None:
    """A planted difference between the pairs' sides is found in fresh rows by every score; random directions do not find it."""
    policy = tiny_policy(rank=16)
    pairs, (fresh, label) = styled_batch(64, 1)[0], styled_batch(40, 7)
    origin, found = origin_of(fresh), {}
    scores = {
        "v_grad unit": DirectionScore(
            pairs, space="c_probe", probe=PROBE, signed_score=False, centred=True
        ),
        "v_act bottleneck": DirectionScore(pairs, space="bottleneck", probe=PROBE, centred=True),
        "v_act residual": DirectionScore(pairs, space="residual", probe=PROBE, centred=True),
        "llr": LikelihoodRatio(
            pairs, temperature=1.0, token_budget=1000, steps=8, learning_rate=1e-2
        ),
        "llr one-sided": LikelihoodRatio(
            pairs, temperature=1.0, token_budget=1000, steps=8, learning_rate=1e-2, form="one_sided"
        ),
        "llr first order": LikelihoodRatio(
            pairs,
            temperature=1.0,
            token_budget=1000,
            steps=8,
            learning_rate=1e-2,
            form="first_order",
        ),
    }
    for name, score in scores.items():
        score.refresh(policy)
        found[name] = auroc(score(policy, fresh, origin).scores.numpy(), label.numpy())
        assert score.pairs_hack.mean() > score.pairs_clean.mean(), name
    real = scores["v_act residual"]
    shared, haar = real(policy, fresh, origin), []
    for seed in range(1, 21):
        control = HaarScore(real, seed)
        control.refresh(policy)
        haar.append(auroc(control(policy, fresh, origin, shared).scores.numpy(), label.numpy()))
    assert min(found.values()) > 0.8 and abs(sum(haar) / 20 - 0.5) < 0.2, (found, haar)
    print(
        "ok  every score finds a planted style in fresh rows:",
        ", ".join(f"{k} {v:.2f}" for k, v in found.items()),
    )


def check_rounded_products() -> None:
    """Products in bf16 give the scores of fp32 within a twentieth of their spread; a first-order step of a hundredth would not."""
    policy, pairs, fresh = tiny_policy(rank=16), styled_batch(32, 1)[0], styled_batch(40, 7)[0]

    def llr(dtype: torch.dtype, form: str = "ratio", force: bool = False) -> LikelihoodRatio:
        score = LikelihoodRatio(
            pairs, temperature=1.0, token_budget=1000, learning_rate=1e-2, form=form, dtype=dtype
        )
        score.dtype = dtype if force else score.dtype  # mutation: the small step is rounded too
        return score

    def error(build) -> float:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            score = build(dtype)
            score.refresh(policy)
            found.append(score(policy, fresh, origin_of(fresh)).scores)
        return float((found[1] - found[0]).norm() / (found[0] - found[0].mean()).norm())

    v_grad = error(
        lambda dtype: DirectionScore(pairs, space="c_probe", probe=PROBE | {"dtype": dtype})
    )
    ratio, first, forced = (
        error(llr),
        error(lambda d: llr(d, "first_order")),
        error(lambda d: llr(d, "first_order", force=True)),
    )
    assert 0 < v_grad < 0.05 and 0 < ratio < 0.05 and first == 0 and forced > 0.1, (
        v_grad,
        ratio,
        first,
        forced,
    )
    assert torch.get_float32_matmul_precision() == "highest", "the rounding outlives its scope"
    print(
        f"ok  products in bf16, error over spread: v_grad {v_grad:.3f}, llr {ratio:.3f}; first order keeps fp32, else {forced:.2f}"
    )


def check_quarantine_ratio() -> None:
    """A quarantine that learned a style finds it in fresh rows; one that learned nothing routes nothing."""
    policy = tiny_policy(rank=16)
    pairs, (fresh, label) = styled_batch(64, 1)[0], styled_batch(40, 7)
    score = QuarantineRatio(pairs, temperature=1.0, token_budget=1000)
    gate = Gate(score, cut="midpoint")
    gate.refresh(policy)
    out = gate(policy, fresh, origin_of(fresh))
    assert not out.scores.any() and (out.zones == Zone.RETAIN).all(), (
        "an untrained quarantine routes"
    )
    likelihood_steps(policy, select(pairs, torch.arange(32)), "quarantine", 8, 1e-2, 1.0, 1000)
    live = batch_logps(policy, fresh, 1.0, 1000)  # the deployed block is still the base
    gate.refresh(policy)
    perturb(
        policy, 0.02, blocks=("deployed",)
    )  # and what it learns later does not change the score
    out = gate(policy, fresh, origin_of(fresh))
    with policy.adapter.disabled():
        base = batch_logps(policy, fresh, 1.0, 1000)
    assert torch.allclose(out.scores, (live - base).sum(1), atol=1e-4)
    assert torch.allclose(out.ref_logps, base, atol=1e-5), "the update's reference is not the base"
    assert not torch.allclose(live, base, atol=1e-2), (
        "a reference of another state would go unnoticed"
    )
    found, routed = auroc(out.scores.numpy(), label.numpy()), out.zones == Zone.ROUTE
    precision = float(label[routed].float().mean())
    assert (
        found > 0.9
        and precision > 0.8
        and routed.any()
        and not routed.all()
        and not (out.zones == Zone.ABSORB).any()
    )
    bare = Gate(
        QuarantineRatio(None, temperature=1.0, token_budget=1000), cut="zero"
    )  # a cut at 0 needs no pairs
    bare.refresh(policy)
    assert torch.equal(bare(policy, fresh, origin_of(fresh)).scores, out.scores)
    swapped = QuarantineRatio(
        select(pairs, torch.arange(64).roll(32)), temperature=1.0, token_budget=1000
    )  # mutation: sides swapped
    gate = Gate(swapped, cut="midpoint")
    gate.refresh(policy)
    assert (gate(policy, fresh, origin_of(fresh)).zones == Zone.RETAIN).all(), (
        "a gate whose sides are inverted routes"
    )
    aurocs, real = [], score(policy, fresh, origin_of(fresh))
    for seed in range(1, 21):
        control = RandomQuarantine(score, seed)
        control.refresh(policy)
        aurocs.append(
            auroc(control(policy, fresh, origin_of(fresh), real).scores.numpy(), label.numpy())
        )
    assert abs(sum(aurocs) / 20 - 0.5) < 0.2 and found > sorted(aurocs)[18], aurocs
    print(
        f"ok  the quarantine's own ratio: 0 before it learned, then AUROC {found:.2f}, precision {precision:.2f} at the midpoint"
    )


def check_replaced_quarantine() -> None:
    """A random quarantine of equal effect is as far from the base as the learned one; one of equal norm is not."""
    policy, pairs = tiny_policy(rank=16), styled_batch(64, 1)[0]
    prompts = styled(40, 7, True)[0]
    how = dict(
        max_completion_length=8,
        temperature=1.0,
        top_p=1.0,
        token_budget=1000,
        generator=torch.Generator().manual_seed(0),
    )
    drawn = [ids for (row,) in sample(policy, prompts, [1] * 40, **how) for ids in [row[0]]]
    batch = collate(prompts, drawn, [1.0] * 40, [*range(40)], [1.0] * 40, PAD, "cpu")
    likelihood_steps(policy, select(pairs, torch.arange(32)), "quarantine", 2, 1e-2, 1.0, 1000)
    learned = [p.detach().clone() for p in policy.adapter.parameters("quarantine")]
    before = {b: [p.detach().clone() for p in policy.adapter.parameters(b)] for b in BLOCKS}
    with policy.adapter.disabled():
        base = batch_logps(policy, batch, 1.0, 1000)
    with policy.adapter.ablated("deployed"):
        alone = batch_logps(policy, batch, 1.0, 1000)
    assert torch.allclose(
        logps_with(policy, learned, batch, 1.0, 1000), alone
    ) and not torch.allclose(base, alone)

    def effect(deltas: list[torch.Tensor]) -> float:
        gap = (logps_with(policy, deltas, batch, 1.0, 1000) - base)[batch.completion_mask]
        return float((gap.exp() - gap - 1).mean())

    found = {
        what: replaced_quarantine(what, policy, batch, 1.0, 1000, 1)
        for what in ("norm", "effect", "inverted")
    }
    assert all(
        torch.equal(a, b) for k in BLOCKS for a, b in zip(before[k], policy.adapter.parameters(k))
    ), "the parameters have moved"
    norms = lambda deltas: torch.stack([d.norm() for d in deltas])  # noqa: E731
    assert torch.allclose(norms(found["norm"]), norms(learned)) and all(
        torch.equal(a, -b) for a, b in zip(found["inverted"], learned)
    )
    shares = {what: effect(deltas) / effect(learned) for what, deltas in found.items()}
    factor = float(norms(found["effect"]).sum() / norms(learned).sum())
    assert abs(shares["effect"] - 1) < 0.1 and shares["norm"] < 0.5, shares
    print(
        f"ok  a random quarantine: {shares['norm']:.2f} of the learned KL at its norm, {shares['effect']:.2f} at {factor:.1f} × it"
    )


def check_llr_restores() -> None:
    policy, pairs = tiny_policy(), styled_batch(16, 1)[0]
    perturb(policy)
    before = {b: [p.detach().clone() for p in policy.adapter.parameters(b)] for b in BLOCKS}
    score = LikelihoodRatio(pairs, temperature=1.0, token_budget=1000)
    score.refresh(policy)
    score(policy, pairs, origin_of(pairs))
    same = lambda: all(
        torch.equal(a, b) for k in BLOCKS for a, b in zip(before[k], policy.adapter.parameters(k))
    )
    assert same(), "the likelihood ratio left a trace in the parameters"
    deltas = likelihood_deltas(policy, pairs, 3, 1e-2, 1.0, 1000)
    assert same() and any(d.abs().max() > 0 for d in deltas)
    value = mean_logps(policy, pairs, 1.0, 1000)
    with policy.adapter.shifted(deltas):
        assert mean_logps(policy, pairs, 1.0, 1000).mean() > value.mean() + 0.01, (
            "the nudge does not raise the likelihood"
        )
    noise = random_deltas(deltas, 3)
    assert all(
        torch.allclose(a.norm(), b.norm()) for a, b in zip(noise, deltas)
    ) and not torch.allclose(noise[0], deltas[0])
    saved = LikelihoodRatio(pairs, temperature=1.0, token_budget=1000)
    saved.load_state_dict(score.state_dict())
    a, b = (s(policy, pairs, origin_of(pairs)).scores for s in (score, saved))
    assert torch.equal(a, b)
    likelihood_steps(policy, pairs, "quarantine", 2, 1e-2, 1.0, 1000)
    moved = {
        k: not all(torch.equal(a, b) for a, b in zip(before[k], policy.adapter.parameters(k)))
        for k in BLOCKS
    }
    assert moved == {"deployed": False, "quarantine": True}, moved
    print(
        "ok  likelihood ratio: parameters restored exactly, state restores exactly; seeding moves the quarantine block alone"
    )


def check_folds() -> None:
    """A pair's own score comes from the fold that did not see it: pairs without a common contrast score at chance."""
    policy, out = tiny_policy(), []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        ids = lambda n, g=g: [torch.randint(2, 64, (n,), generator=g).tolist() for _ in range(16)]  # noqa: E731
        prompts = ids(4)
        pairs = collate(
            prompts * 2, ids(7) + ids(7), [1.0] * 32, [*range(16)] * 2, [1.0] * 32, PAD, "cpu"
        )
        score = LikelihoodRatio(
            pairs, temperature=1.0, token_budget=4000, steps=4, learning_rate=1e-2
        )
        score.refresh(policy)
        inside = score(policy, pairs, origin_of(pairs)).scores
        label = (torch.arange(32) < 16).numpy()
        out.append(
            (
                auroc(torch.cat([score.pairs_hack, score.pairs_clean]).numpy(), label),
                auroc(inside.numpy(), label),
            )
        )
    held, seen = (sum(x) / len(out) for x in zip(*out))
    assert 0.35 < held < 0.65 and seen > 0.85, (held, seen)
    print(
        f"ok  two-fold pair scores: AUROC {held:.2f} on meaningless pairs, where the fitted ones show {seen:.2f}"
    )


def check_tokens() -> None:
    policy, pairs = tiny_policy(), styled_batch(16, 1)[0]
    perturb(policy)
    batch = random_batch(8)
    score = DirectionScore(pairs, space="c_probe", probe=PROBE, by_token=True)
    gate = Gate(score, HaarScore(score, 1))
    gate.refresh(policy)
    out = gate(policy, batch, origin_of(batch))
    assert out.zones.shape == batch.input_ids.shape == out.scores.shape
    real, acts = (
        Gate(score)(policy, batch, origin_of(batch)),
        F.pad(batch.attention_mask[:, 1:], (0, 1)).bool(),
    )
    counts = lambda zones: [int((zones[acts] == z).sum()) for z in Zone]  # noqa: E731  # of positions that have a successor
    assert counts(out.zones) == counts(real.zones) and min(counts(real.zones)) > 0
    assert (
        (out.zones[~acts] == NO_ZONE).all()
        and out.scores[~acts].isnan().all()
        and not (out.zones[acts] == NO_ZONE).any()
    )
    assert not out.by_row()[0].isnan().any()
    assert trained_blocks(out.zones.where(~acts, int(Zone.ROUTE))) == {
        "deployed": False,
        "quarantine": True,
    }
    zones = lambda control: Gate(score, control, cut="zero")(policy, batch, origin_of(batch)).zones  # noqa: E731
    unlike = lambda: sum(
        counts(zones(HaarScore(score, seed))) != counts(zones(None)) for seed in range(8)
    )
    found, right = unlike(), gates.predicts
    gates.predicts = lambda batch: torch.ones_like(batch.attention_mask, dtype=torch.bool)
    mutant, gates.predicts = unlike(), right
    assert mutant > 4 and not found, (
        f"a placebo's shares differ for {found} of 8 draws, and for {mutant} where padding is dealt"
    )
    whole = probe_gradients(policy, batch, positions="all", **PROBE)
    tokens = probe_gradients(policy, batch, by_token=True, **PROBE)
    assert torch.allclose(tokens.sum(1, keepdim=True), whole, atol=1e-5) and not torch.allclose(
        tokens[:, :1], whole, atol=1e-3
    )
    acts = activations(policy, batch, space="residual", token_budget=20, layer=1)
    assert torch.allclose(
        acts, activations(policy, batch, space="residual", token_budget=4000, layer=1), atol=1e-5
    )
    print(
        "ok  token granularity: zones for what predicts a token, a matched placebo (not where padding is dealt), gradients that sum up"
    )


def check_controls_and_oracle() -> None:
    policy, (batch, label) = tiny_policy(), styled_batch(60, 2)
    origin = origin_of(batch, label)
    exact = Oracle(1.0, 0.0, 0)(policy, batch, origin).scores
    assert torch.equal(exact.bool(), label)
    zones = Gate(Oracle(1.0, 0.0, 0), cut="flag")(policy, batch, origin).zones
    assert torch.equal(zones == Zone.ROUTE, label) and torch.equal(zones == Zone.RETAIN, ~label)
    noisy = torch.stack([Oracle(0.5, 0.1, s)(policy, batch, origin).scores for s in range(200)])
    assert abs(noisy[:, label].mean() - 0.5) < 0.03 and abs(noisy[:, ~label].mean() - 0.1) < 0.02
    try:
        Oracle(1.0, 0.0, 0)(policy, batch, origin_of(batch))
        raise AssertionError("an oracle without labels ran")
    except ValueError:
        pass
    assert torch.equal(
        Confound("length")(policy, batch, origin).scores, batch.completion_mask.sum(1).float()
    )
    a, b, c = (RandomScore(s)(policy, batch, origin).scores for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert {name for name, arm in ARMS.items() if arm.oracle} == {"oracle", "filter_oracle"}
    print(
        "ok  oracle: exact, or at its recall and false-positive rate, and refused without labels; confound and random controls"
    )


def check_actions() -> None:
    rewards, group = torch.tensor([3.5, 0.5, 0.5, 3.5, 0.5, 3.5]), torch.tensor([0, 0, 0, 1, 1, 1])
    batch = replace(
        random_batch(6), rewards=rewards, group=group, advantages=grpo.advantages(rewards, group)
    )
    zones = torch.tensor([2, 0, 0, 2, 0, 0])
    out = GateOutput(zones, torch.tensor([3.0, 0.0, 0.0, 3.0, 0.0, 0.1]), 0.0, 1.0)
    origin = origin_of(batch)
    same, _, routed = route(batch, origin, out, Options())
    assert torch.equal(same.advantages, batch.advantages) and torch.equal(routed.zones, zones)
    again, _, _ = route(batch, origin, out, Options(retained_advantages=True))
    assert torch.allclose(again.advantages, grpo.retained_advantages(rewards, group, zones))
    left, who, dropped = drop(batch, origin, out, Options())
    assert (
        len(left.advantages) == len(who.student) == len(dropped.zones) == 4
        and (dropped.zones == Zone.ABSORB).all()
    )
    assert torch.allclose(left.advantages, torch.tensor([0.0, 0.0, -1.5, 1.5]))
    alone = Options(
        zone=Zone.RETAIN
    )  # where one block is deployed, the others learn nothing from what is left
    assert all(
        (act(batch, origin, out, alone)[2].zones == Zone.RETAIN).all() for act in (drop, penalise)
    )
    fined, _, absorbed = penalise(batch, origin, out, Options(alpha=2.0))
    z = group_z(out.scores, group)
    want = grpo.advantages(rewards * (1 - 2 * torch.sigmoid(z) * (z > 0)), group)
    assert (
        torch.allclose(fined.advantages, want)
        and fined.advantages[0] < batch.advantages[0]
        and (absorbed.zones == Zone.ABSORB).all()
    )
    unfined, _, _ = penalise(batch, origin, out, Options(alpha=0.0))
    assert torch.allclose(unfined.advantages, batch.advantages) and not torch.allclose(
        want, batch.advantages
    )
    everything, _, _ = drop(batch, origin, replace(out, zones=torch.full((6,), 2)), Options())
    assert len(everything.advantages) == 1 and everything.advantages[0] == 0
    print(
        "ok  route keeps, filter drops and re-centres, penalise lowers what it flags; α = 0 penalises nothing"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in (check_scores_find_a_style, check_rounded_products, check_quarantine_ratio, check_replaced_quarantine, check_llr_restores,
                  check_folds, check_tokens, check_controls_and_oracle, check_actions):  # fmt: skip
        check()
