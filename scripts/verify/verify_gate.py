"""The direction and the gate: v_grad, its placebo, the band, matched shares; with mutations."""

import torch
from scripts.verify.styled import PROBE, area, behind, pairs_of, refreshed
from scripts.verify.tiny import perturb, random_batch, tiny_policy

from vgrout.core import Zone
from vgrout.gate.controls import Control, Haar, match_shares, strata
from vgrout.gate.gate import Gate, PinnedGate, zones_from_band, zones_from_edge
from vgrout.gate.v_grad import (
    DirectionScore,
    contrast,
    out_of_sample,
    probe_gradients,
    project,
    unit_per_module,
)
from vgrout.model.grpo import scored_loss
from vgrout.model.policy import logps


def check_swap() -> None:
    policy = tiny_policy()
    pairs = pairs_of(random_batch(16, 3))
    perturb(policy)
    hack, clean = probe_gradients(policy, pairs, PROBE)[:, 0].chunk(2)
    v, midpoint = contrast(hack, clean)
    back, same = contrast(clean, hack)
    assert torch.allclose(back, -v, atol=1e-6)
    assert torch.allclose(midpoint, same)
    assert torch.allclose(
        v.norm(dim=1),
        torch.ones(len(v)),
        atol=1e-5,
    )
    sides = torch.ones(16)
    sides[8:] = -1  # the definition: ∂L/∂c at A = +1 on the hack, −1 on the clean side
    with policy.adapter.probing(16) as c:
        scored = logps(policy, pairs, 1.0)
        loss = scored_loss(scored, pairs.completion_mask, sides, 8).sum()
        gradients = torch.autograd.grad(loss, list(c.values()))
    summed = (
        torch.stack(
            [g[:, 0] for g in gradients],
            1,
        ).sum(0)
        / 8
    )
    assert torch.allclose(unit_per_module(summed), v, atol=1e-5), "not ∇logp(clean) − ∇logp(hack)"
    forgets = unit_per_module((hack + clean).mean(0))  # mutation: without the clean side's sign
    assert not torch.allclose(back, -forgets, atol=1e-3)
    print("ok  swapping the sides negates v_grad, the unit mean of ∂L at A = +1 and A = −1")


def check_leave_one_out() -> None:
    """On pure noise in-sample scores separate the sides, out-of-sample scores do not."""
    label = torch.arange(48) < 24
    prompt = torch.arange(24) // 2
    found = []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        hack, clean = torch.randn(2, 24, 4, 8, generator=g)
        v, _ = contrast(hack, clean)
        held = torch.cat(out_of_sample(hack, clean, prompt))
        seen = project(torch.cat([hack, clean]), v)
        found.append([area(x, label) for x in (held, seen)])
    out, inside = torch.tensor(found).mean(0).tolist()
    assert inside > 0.85 and 0.35 < out < 0.6, (inside, out)
    louder = torch.cat([hack[:2] * 5, hack[2:]])
    again, _ = out_of_sample(louder, clean, prompt)
    assert torch.allclose(
        again[:2],
        held[:2],
        atol=1e-5,
    ), "its own prompt is in its direction"
    alone, _ = out_of_sample(
        hack,
        clean,
        torch.zeros(24, dtype=torch.long),
    )
    assert alone.isnan().all()
    print(f"ok  pair scores on noise: AUROC {out:.2f} out of sample, {inside:.2f} in sample")


def check_band() -> None:
    scores = torch.tensor([-0.5, 0.1, 0.5, 0.9, 0.9])
    A = torch.tensor([1.0, 1, 1, 1, 0])
    wanted = [
        Zone.RETAIN,
        Zone.ABSORB,
        Zone.ABSORB,
        Zone.ROUTE,
        Zone.RETAIN,
    ]
    assert zones_from_band(scores, A, 0.0, 0.6).tolist() == wanted
    for lower, upper in ((0.6, 0.0), (0.3, 0.3), (float("nan"), 0.6)):
        zones = zones_from_band(scores, A, lower, upper)
        assert (zones == Zone.RETAIN).all(), "a collapsed band routes"
    edges = {
        0.3: [
            0,
            0,
            2,
            2,
            0,
        ],
        0.9: [0] * 5,
        float("nan"): [0] * 5,
    }
    for edge, wanted in edges.items():
        assert zones_from_edge(scores, A, edge, edge).tolist() == wanted, edge
    print("ok  band: RETAIN, ABSORB, ROUTE; A = 0, an empty or undefined band: nothing is routed")


def check_matched_shares() -> None:
    def counts(zones: torch.Tensor) -> list[list[int]]:
        return [zones[stratum == s].bincount(minlength=3).tolist() for s in range(4)]

    g = torch.Generator().manual_seed(2)
    pooled = 0
    for _ in range(50):
        shadow = torch.randint(0, 3, (40,), generator=g)
        stratum = torch.randint(0, 4, (40,), generator=g)
        scores = torch.randn(40, generator=g)
        zones = match_shares(shadow, scores, stratum)
        assert counts(zones) == counts(shadow)
        for s in range(4):
            order = zones[stratum == s][scores[stratum == s].argsort()]
            assert (order.diff() >= 0).all(), "a lower score has the stronger zone"
        one = match_shares(shadow, scores, torch.zeros_like(stratum))  # mutation: one stratum
        pooled += counts(one) != counts(shadow)
    assert pooled > 25, "pooled strata go unnoticed"
    student = behind(random_batch(6), teachers=2).student
    signs = torch.tensor([1.0, -1, 0, 1, -1, 0])
    assert strata(student, signs).tolist() == [
        2,
        -2,
        1,
        3,
        -1,
        1,
    ], "sign of A × student"
    print("ok  a control deals the gate's counts in every stratum by its own score")


def check_placebo() -> None:
    """A placebo differs from the real gate in its scores alone; it is drawn anew, and restores."""
    policy, batch = tiny_policy(), random_batch(12)
    perturb(policy)
    pairs = pairs_of(random_batch(16, 3))
    composed = behind(batch)
    score = DirectionScore(pairs, space="c_probe", probe=PROBE)
    gate = refreshed(Gate(score), policy)
    real = gate(policy, batch)
    placebos = [
        refreshed(
            Control(gate, Haar(score, seed)),
            policy,
        )
        for seed in (1, 2)
    ]
    one, two = (placebo(policy, composed, real) for placebo in placebos)
    assert (real.lower, real.upper) == (one.lower, one.upper)
    assert torch.equal(real.zones.bincount(), one.zones.bincount())
    assert not torch.equal(real.scores, one.scores)
    assert not torch.equal(one.scores, two.scores)
    saved = Control(gate, Haar(score, 2))
    saved.load_state_dict(placebos[1].state_dict())
    assert torch.equal(saved(policy, composed, real).scores, two.scores)
    anew = refreshed(saved, policy)(policy, composed, real)
    assert not torch.equal(anew.scores, two.scores), "a refresh draws nothing anew"
    copy = Gate(DirectionScore(pairs, space="c_probe", probe=PROBE))
    copy.load_state_dict(gate.state_dict())
    assert torch.equal(copy(policy, batch).zones, real.zones)
    flagged = torch.full((12,), int(Zone.ROUTE))
    discouraged = batch.advantages < 0
    for signed, retained in ((True, discouraged), (False, discouraged & False)):
        signed_gate = Gate(score, signed=signed)
        zones = signed_gate.gated(batch, flagged, real.scores, real.scored).zones
        assert torch.equal(zones == Zone.RETAIN, retained), "--signed retains rows with A < 0 alone"
    print("ok  placebo and gate share batch, band and counts; a gate's state restores exactly")


def check_pinned() -> None:
    policy, batch = tiny_policy(), random_batch(12)
    pinned = PinnedGate(Zone.ABSORB)(policy, batch)
    assert (pinned.zones == Zone.ABSORB).all()
    assert pinned.scores.isnan().all()
    seeds = [1, *range(200)]
    zones = torch.stack(
        [
            PinnedGate(
                Zone.RETAIN,
                0.3,
                s,
            )(policy, batch).zones
            for s in seeds
        ]
    )
    assert torch.equal(zones[0], zones[2]), "one seed, two draws"
    assert {*zones.flatten().tolist()} == {Zone.RETAIN, Zone.ABSORB}
    absorbed = (zones == Zone.ABSORB).float()
    assert abs(float(absorbed.mean()) - 0.3) < 0.05
    assert len(zones.unique(dim=0)) > 20, "the seed has no part in it"
    print("ok  a pinned zone, and a share of the rows by chance in ABSORB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_swap()
    check_leave_one_out()
    check_band()
    check_matched_shares()
    check_placebo()
    check_pinned()
