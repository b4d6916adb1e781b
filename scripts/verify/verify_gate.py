"""The direction and the gate: v_grad, its score, the band, matched shares; with mutations."""

import torch
from scripts.verify.styled import (
    PROBE,
    area,
    behind,
    pairs_of,
    refreshed,
)
from scripts.verify.tiny import planted, random_batch
from torch import Tensor

from vgrout.core import Zone
from vgrout.gate.controls import (
    Control,
    Haar,
    match_shares,
    strata,
)
from vgrout.gate.gate import (
    Gate,
    PinnedGate,
    zones_from_band,
    zones_from_edge,
)
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

NAN = float("nan")


def v_grad() -> DirectionScore:
    return DirectionScore(
        pairs_of(random_batch(16, 3)),
        space="c_probe",
        probe=PROBE,
    )


def check_definition() -> None:
    """v_grad: unit mean of ∂L/∂c at A = +1 on hack, −1 on clean sides; mean cosine · sign."""
    policy, batch = planted(12)
    score = refreshed(v_grad(), policy)
    sides = torch.ones(16)
    sides[8:] = -1
    with policy.adapter.probing(16) as c:
        scored = logps(policy, score.pairs, 1.0)
        loss = scored_loss(scored, score.pairs.completion_mask, sides, 8).sum()
        gradients = torch.autograd.grad(loss, list(c.values()))
    summed = torch.stack([g[:, 0] for g in gradients], 1).sum(0) / 8
    assert torch.allclose(unit_per_module(summed), score.v, atol=1e-5)
    hack, clean = probe_gradients(policy, score.pairs, PROBE)[:, 0].chunk(2)
    unsigned = unit_per_module((hack + clean).mean(0))  # mutation
    assert not torch.allclose(unsigned, score.v, atol=1e-3)
    features = probe_gradients(policy, batch, PROBE)[:, 0]
    cosines = torch.cosine_similarity(features, score.v, dim=-1)
    sign, found = (
        batch.advantages.sign(),
        score(policy, batch).scores,
    )
    assert torch.allclose(cosines.mean(1) * sign, found, atol=1e-5)
    whole = torch.cosine_similarity(features.flatten(1), score.v.flatten(), dim=-1)  # mutation
    assert not torch.allclose(whole * sign, found, atol=1e-2)
    print("ok  v_grad and its score by their definitions; without sign or modules they differ")


def check_leave_one_out() -> None:
    """On pure noise in-sample scores separate the sides, out-of-sample scores do not."""
    label = torch.arange(48) < 24
    prompt = torch.arange(24) // 2
    areas = []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        hack, clean = torch.randn(2, 24, 4, 8, generator=g)
        held = torch.cat(out_of_sample(hack, clean, prompt))
        seen = project(
            torch.cat([hack, clean]),
            contrast(hack, clean)[0],
        )
        areas.append([area(x, label) for x in (held, seen)])
    outside, inside = torch.tensor(areas).mean(0).tolist()
    assert inside > 0.85 and 0.35 < outside < 0.6, (
        inside,
        outside,
    )
    louder = torch.cat([hack[:2] * 5, hack[2:]])
    again, _ = out_of_sample(louder, clean, prompt)
    assert torch.allclose(again[:2], held[:2], atol=1e-5), "its own prompt is in its direction"
    assert out_of_sample(hack, clean, prompt * 0)[0].isnan().all()
    print(f"ok  pair scores on noise: AUROC {outside:.2f} out of sample, {inside:.2f} in sample")


def check_band() -> None:
    scores = torch.tensor([-0.5, 0.1, 0.5, 0.9, 0.9])
    A = torch.tensor([1.0, 1, 1, 1, 0])
    nowhere = [0] * 5
    for cut, lower, upper, wanted in (
        (zones_from_band, 0.0, 0.6, [0, 1, 1, 2, 0]),
        (zones_from_band, 0.6, 0.0, nowhere),
        (zones_from_band, 0.3, 0.3, nowhere),
        (zones_from_band, NAN, 0.6, nowhere),
        (zones_from_edge, 0.3, 0.3, [0, 0, 2, 2, 0]),
        (zones_from_edge, NAN, NAN, nowhere),
    ):
        assert cut(scores, A, lower, upper).tolist() == wanted, (cut, lower, upper)
    print("ok  band: RETAIN, ABSORB, ROUTE; A = 0, an empty or undefined band: nothing is routed")


def check_matched_shares() -> None:
    def counts(zones: Tensor) -> list[list[int]]:
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
    policy, batch = planted(12)
    score = v_grad()
    composed = behind(batch)
    gate = refreshed(Gate(score), policy)
    real = gate(policy, batch)
    placebos = [refreshed(Control(gate, Haar(score, seed)), policy) for seed in (1, 2)]
    one, two = (placebo(policy, composed, real) for placebo in placebos)
    assert (real.lower, real.upper) == (
        one.lower,
        one.upper,
    )
    assert torch.equal(real.zones.bincount(), one.zones.bincount())
    saved = Control(gate, Haar(score, 2))
    saved.load_state_dict(placebos[1].state_dict())
    assert torch.equal(saved(policy, composed, real).scores, two.scores)
    anew = refreshed(saved, policy)(policy, composed, real)
    for other in (one, two, anew):
        others = [x.scores for x in (real, one, two, anew) if x is not other]
        assert not any(torch.equal(other.scores, x) for x in others), "two share their scores"
    copy = Gate(v_grad())
    copy.load_state_dict(gate.state_dict())
    assert torch.equal(copy(policy, batch).zones, real.zones)
    flagged = torch.full((12,), int(Zone.ROUTE))
    signed = Gate(score, signed=True).gated(batch, flagged, real.scores, real.scored).zones
    assert torch.equal(signed == Zone.RETAIN, batch.advantages < 0), "--signed"
    print("ok  placebo and gate share batch, band and counts; a gate's state restores exactly")


def check_pinned() -> None:
    policy, batch = planted(12)
    pinned = PinnedGate(Zone.ABSORB)(policy, batch)
    assert (pinned.zones == Zone.ABSORB).all() and pinned.scores.isnan().all()
    gates = [PinnedGate(Zone.RETAIN, 0.3, seed) for seed in (1, *range(200))]
    zones = torch.stack([gate(policy, batch).zones for gate in gates])
    assert torch.equal(zones[0], zones[2]), "one seed, two draws"
    assert {*zones.flatten().tolist()} == {
        Zone.RETAIN,
        Zone.ABSORB,
    }
    assert abs(float((zones == Zone.ABSORB).float().mean()) - 0.3) < 0.05
    assert len(zones.unique(dim=0)) > 20, "the seed has no part in it"
    print("ok  a pinned zone, and a share of the rows by chance in ABSORB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_definition()
    check_leave_one_out()
    check_band()
    check_matched_shares()
    check_placebo()
    check_pinned()
