"""The direction and the gate: v_grad, its placebo, the band, matched shares. Each check with its mutation."""

import torch
from scripts.verify.tiny import perturb, random_batch, tiny_policy

from vgrout.core import Zone
from vgrout.gate.direction import (
    contrast,
    haar,
    out_of_sample,
    probe_gradients,
    project,
    unit_per_module,
)
from vgrout.gate.gate import Gate, PinnedGate, match_shares, zones_from_band, zones_from_edge
from vgrout.gate.scores import DirectionScore, HaarScore
from vgrout.model.batch import Batch, Origin
from vgrout.model.grpo import scored_loss
from vgrout.model.policy import logps
from vgrout.stats import auroc

PROBE = dict(max_completion_length=8, temperature=1.0, token_budget=1000, state="as_trained")


def pairs_of(seed: int = 3):
    """Eight rows as hack sides, eight as clean sides, at A = +1, on eight prompts."""
    batch = random_batch(16, seed)
    batch.advantages = torch.ones(16)
    batch.group = torch.arange(8).repeat(2)
    return batch


def check_swap() -> None:
    policy, pairs = tiny_policy(), pairs_of()
    perturb(policy)
    g = probe_gradients(policy, pairs, **PROBE)
    hack, clean = g[:8, 0], g[8:, 0]
    v, midpoint = contrast(hack, clean)
    back, same = contrast(clean, hack)
    assert torch.allclose(back, -v, atol=1e-6) and torch.allclose(
        v.norm(dim=1), torch.ones(len(v)), atol=1e-5
    )
    assert torch.allclose(midpoint, same)
    with policy.adapter.probing(
        16
    ) as c:  # the definition: ∂L/∂c at A = +1 on the hack, −1 on the clean side
        lp = logps(policy, pairs, 1.0)
        loss = scored_loss(
            lp, pairs.completion_mask, torch.cat([torch.ones(8), -torch.ones(8)]), 8
        ).sum()
        s = torch.stack([x[:, 0] for x in torch.autograd.grad(loss, list(c.values()))], 1)
    assert torch.allclose(unit_per_module((s[:8] + s[8:]).mean(0)), v, atol=1e-5), (
        "not −∇logp(hack) + ∇logp(clean)"
    )
    summed = unit_per_module((hack + clean).mean(0))  # mutation: forgets the sign of the clean side
    assert not torch.allclose(back, -summed, atol=1e-3)
    print(
        "ok  swapping hack and clean negates v_grad; v_grad = unit of the mean of ∂L at A = +1 (hack) and A = −1 (clean)"
    )


def check_planted() -> None:
    g = torch.Generator().manual_seed(0)
    m, r, n = 28, 8, 200
    planted = unit_per_module(torch.randn(m, r, generator=g))
    hack = torch.arange(n) < n // 2
    rows = torch.randn(n, m, r, generator=g) + 0.9 * hack[:, None, None] * planted
    pair = lambda shift: torch.randn(24, m, r, generator=g) + shift * planted  # noqa: E731
    v, _ = contrast(pair(0.9), pair(0.0))
    real = auroc(project(rows, v).numpy(), hack.numpy())
    draws = [auroc(project(rows, haar(m, r, s)).numpy(), hack.numpy()) for s in range(1, 41)]
    mean = sum(draws) / len(draws)
    assert real > 0.95 and abs(mean - 0.5) < 0.06 and max(draws) < real, (real, mean, max(draws))
    blind = auroc(project(rows - 0.9 * hack[:, None, None] * planted, v).numpy(), hack.numpy())
    assert abs(blind - 0.5) < 0.12, "AUROC is high without a planted direction"
    assert not torch.equal(haar(m, r, 1), haar(m, r, 2)) and torch.equal(
        haar(m, r, 1), haar(m, r, 1)
    )
    print(
        f"ok  planted direction: AUROC {real:.3f}; Haar {mean:.3f} on average over 40 draws; without the plant {blind:.2f}"
    )


def check_leave_one_out() -> None:
    """On pure noise the in-sample scores separate hack from clean, the out-of-sample scores do not."""
    label, prompt, outs, insides = torch.arange(48).numpy() < 24, torch.arange(24) // 2, [], []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        hack, clean = torch.randn(24, 4, 8, generator=g), torch.randn(24, 4, 8, generator=g)
        hs, cs = out_of_sample(hack, clean, prompt)
        v, _ = contrast(hack, clean)
        outs.append(auroc(torch.cat([hs, cs]).numpy(), label))
        insides.append(auroc(torch.cat([project(hack, v), project(clean, v)]).numpy(), label))
    out, inside = sum(outs) / 8, sum(insides) / 8
    assert inside > 0.85 and 0.35 < out < 0.6, (inside, out)
    again, _ = out_of_sample(torch.cat([hack[:2] * 5, hack[2:]]), clean, prompt)
    assert torch.allclose(again[:2], hs[:2], atol=1e-5), "a pair's own prompt is in its direction"
    one, _ = out_of_sample(hack, clean, torch.zeros(24, dtype=torch.long))
    assert one.isnan().all()
    print(
        f"ok  out-of-sample pair scores: AUROC {out:.2f} on noise, where in-sample scores show {inside:.2f}"
    )


def check_band() -> None:
    scores, A = torch.tensor([-0.5, 0.1, 0.5, 0.9, 0.9]), torch.tensor([1.0, 1, 1, 1, 0])
    want = [Zone.RETAIN, Zone.ABSORB, Zone.ABSORB, Zone.ROUTE, Zone.RETAIN]
    assert zones_from_band(scores, A, 0.0, 0.6).tolist() == want
    for lower, upper in ((0.6, 0.0), (0.3, 0.3), (float("nan"), 0.6)):
        assert (zones_from_band(scores, A, lower, upper) == Zone.RETAIN).all(), (
            "a collapsed band routes"
        )
    assert zones_from_edge(scores, A, 0.3, 0.3).tolist() == [
        2 * int(s > 0.3 and a != 0) for s, a in zip(scores, A)
    ]
    assert (
        zones_from_edge(torch.zeros(6), torch.ones(6), 0.0, 0.0).sum()
        == 0
        == zones_from_edge(scores, A, float("nan"), 0.0).sum()
    )
    print(
        "ok  band: below RETAIN, between ABSORB, above ROUTE, A = 0 RETAIN; an empty, inverted or undefined band routes nothing"
    )


def check_matched_shares() -> None:
    g = torch.Generator().manual_seed(2)
    for _ in range(50):
        shadow = torch.randint(0, 3, (40,), generator=g)
        strata, scores = torch.randint(0, 4, (40,), generator=g), torch.randn(40, generator=g)
        zones = match_shares(shadow, scores, strata)
        for s in strata.unique():
            rows = strata == s
            assert (
                zones[rows].bincount(minlength=3).tolist()
                == shadow[rows].bincount(minlength=3).tolist()
            )
            order = zones[rows][scores[rows].argsort()]
            assert (order.diff() >= 0).all(), "a lower score got the stronger zone"
    assert match_shares(
        torch.tensor([2, 0, 1]), torch.tensor([0.1, 0.9, 0.5]), torch.zeros(3, dtype=torch.long)
    ).tolist() == [0, 2, 1]
    pooled = match_shares(
        shadow, scores, torch.zeros(40, dtype=torch.long)
    )  # mutation: one stratum for all rows
    assert any(
        pooled[strata == s].bincount(minlength=3).tolist()
        != shadow[strata == s].bincount(minlength=3).tolist()
        for s in range(4)
    )
    print(
        "ok  a control copies the real gate's counts in every stratum and deals them by its own score; pooled strata do not match"
    )


def origin_of(batch: Batch) -> Origin:
    none = torch.zeros(len(batch.advantages), dtype=torch.bool)
    return Origin(
        ~none, none, torch.zeros(batch.completion_ids.shape), batch.advantages.sign().long() * 2 + 1
    )


def check_placebo_differs_in_direction_only() -> None:
    policy, pairs, batch = tiny_policy(), pairs_of(), random_batch(12)
    perturb(policy)
    origin, gates, outs = origin_of(batch), {}, []
    for seed in (None, 1, 2):
        real = DirectionScore(pairs, space="c_probe", probe=PROBE)
        gates[seed] = Gate(real, None if seed is None else HaarScore(real, seed))
        gates[seed].refresh(policy)
        outs.append(gates[seed](policy, batch, origin))
    real, one, two = outs
    assert real.lower == one.lower and real.upper == one.upper
    assert not torch.equal(real.scores, one.scores) and not torch.equal(one.scores, two.scores)
    for zone in Zone:
        assert int((real.zones == zone).sum()) == int((one.zones == zone).sum())
    gates[1].refresh(policy)
    assert not torch.equal(gates[1](policy, batch, origin).scores, one.scores), (
        "the placebo is not drawn anew at a refresh"
    )
    score = DirectionScore(pairs, space="c_probe", probe=PROBE)
    saved = Gate(score, HaarScore(score, 2))
    saved.load_state_dict(gates[2].state_dict())
    again = saved(policy, batch, origin)
    assert torch.equal(again.scores, two.scores) and torch.equal(again.zones, two.zones)
    pinned = PinnedGate(Zone.ABSORB)(policy, batch, origin)
    assert (pinned.zones == Zone.ABSORB).all() and pinned.scores.isnan().all()
    shared = [
        PinnedGate(Zone.RETAIN, 0.5, seed)(policy, batch, origin).zones for seed in (1, 1, 2, 3)
    ]
    assert {*torch.cat(shared).tolist()} == {int(Zone.RETAIN), int(Zone.ABSORB)}, (
        "a share of rows, by chance, in ABSORB"
    )
    assert torch.equal(shared[0], shared[1]) and not all(
        torch.equal(shared[0], z) for z in shared[2:]
    )
    signed = Gate(score, signed=True)
    signed.refresh(policy)
    assert (signed(policy, batch, origin).zones[batch.advantages < 0] == Zone.RETAIN).all()
    print(
        "ok  placebo and real gate share batch, band and counts; only the scores differ; a gate's state restores exactly"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in (check_swap, check_planted, check_leave_one_out, check_band, check_matched_shares,
                  check_placebo_differs_in_direction_only):  # fmt: skip
        check()
