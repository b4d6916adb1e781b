"""The loss equals one written as loops, advantages are Dr. GRPO's, micro-batches add up."""

import math
from typing import get_args

import torch
from scripts.verify.stored import refused
from scripts.verify.tiny import EOS, PAD, planted
from torch import Tensor
from torch.autograd import grad

from vgrout.config import AbsorbBy, GRPOConfig, PhaseConfig
from vgrout.core import Zone
from vgrout.model import grpo, tokens
from vgrout.model.absorb import token_weights
from vgrout.model.batch import Behaviour, Trained
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import logps
from vgrout.model.update import update

EPSILON, BETA, NORMALISER = 0.2, 0.05, 40.0
HOW = {
    "epsilon": EPSILON,
    "beta": BETA,
    "normaliser": NORMALISER,
}


def loop_loss(
    parts: list[Tensor], epsilon: float = EPSILON, linear_from: float = grpo.KL_LINEAR_FROM
) -> float:
    """The definition with scalars."""
    new, old, ref, mask, A, weight = parts
    total = 0.0
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(new[i, t] - old[i, t])
        clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
        total -= float(weight[i, t]) * min(ratio * float(A[i]), clipped * float(A[i]))
        gap = float(ref[i, t] - new[i, t])
        near = min(gap, linear_from)
        slope = math.exp(near) - 1
        total += BETA * (slope - near + slope * (gap - near))
    return total / NORMALISER


def random_parts() -> list[Tensor]:
    """Log-probs new, old, of the reference; mask; advantages."""
    g = torch.Generator().manual_seed(0)
    new, old, ref = -2 * torch.rand(3, 5, 7, generator=g)
    mask = torch.rand(5, 7, generator=g) > 0.3
    return [new, old, ref, mask, torch.randn(5, generator=g)]


def check_loss() -> None:
    parts = [*random_parts(), torch.rand(5, 7)]
    ref, mask = parts[2:4]
    ref[tuple(mask.nonzero()[0])] += 20  # a token that the policy has all but given up
    found = float(grpo.grpo_loss(*parts, **HOW)[0])
    assert abs(found - loop_loss(parts)) < 1e-4, (
        found,
        loop_loss(parts),
    )
    assert abs(found - loop_loss(parts, epsilon=math.inf)) > 1e-3, "the clip is never active"
    assert loop_loss(parts, linear_from=math.inf) > found + 1, "k3 is not bounded"
    print("ok  loss = loop-written reference; without the clip or k3's bound it is another")


def check_scored_loss() -> None:
    """Pass 1 scores what pass 2 applies: at ratio 1 both losses have one gradient."""
    new, old, _, mask, A = random_parts()
    new.requires_grad_()
    options = HOW | {"beta": 0.0}
    same, other = (grpo.grpo_loss(new, x, None, mask, A, **options)[0] for x in (new.detach(), old))
    scored = grad(grpo.scored_loss(new, mask, A, NORMALISER).sum(), new)[0]
    assert torch.allclose(grad(same, new)[0], scored)
    assert not torch.allclose(grad(other, new)[0], scored), "a ratio goes unnoticed"
    print("ok  at ratio 1 the GRPO gradient is the scored loss's; at another it is not")


def check_kl_estimators() -> None:
    """On policy, in expectation: k3 descends KL(ref‖π), the corrected estimator KL(π‖ref), also
    where an outcome is all but given up."""
    ref = torch.tensor([-0.3, 0.4, 1.0, 0.1]).log_softmax(0)
    how = HOW | {"beta": 1.0, "normaliser": 1.0}
    every, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1)
    for corrected, given_up in ((False, -1.0), (True, -1.0), (True, -9.0)):
        logits = torch.tensor([0.5, given_up, 0.2, 1.5], requires_grad=True)
        logp = logits.log_softmax(0)
        p, q = logp.exp(), ref.exp()
        forward, reverse = (
            grad(kl.sum(), logits, retain_graph=True)[0]
            for kl in (q * (ref - logp), p * (logp - ref))
        )
        wanted, other = (reverse, forward) if corrected else (forward, reverse)
        expected = 0.0
        for i, chance in enumerate(p.tolist()):  # each outcome is a row of one token
            token = [x[i].view(1, 1) for x in (logp, logp.detach(), ref)]
            loss, _ = grpo.grpo_loss(
                *token,
                every,
                zero,
                **how,
                corrected=corrected,
            )
            expected += chance * loss
        found = grad(expected, logits, retain_graph=True)[0]
        assert torch.allclose(found, wanted, atol=1e-6), (corrected, given_up)
        assert not torch.allclose(found, other, atol=1e-2), "not told apart"
    print("ok  k3's on-policy gradient is KL(ref‖π)'s, the corrected one's is KL(π‖ref)'s")


def absorbing(ablated: bool) -> tuple:
    """(policy, optimizer without a rate, rows in ABSORB, sampler), the learner thrice as sure."""
    policy, batch = planted()
    zones = torch.full_like(batch.group, int(Zone.ABSORB))
    trained = Trained(batch, zones, batch.group.argsort())
    with torch.no_grad(), policy.adapter.route(zones):
        sampled = logps(policy, batch, 0.7) - math.log(3)
    behaviour = Behaviour(torch.full_like(zones, ablated, dtype=torch.bool), sampled)
    optimizer = BlockOptimizer(policy.adapter, 0.0, 0.0, math.inf)
    return policy, optimizer, trained, behaviour


def check_importance() -> None:
    """A learner three times as sure as the sampler: the cap lets through 1, 2 or all 3."""
    parts = absorbing(ablated=False)
    found = []
    for cap in (0.0, 2.0, 9.0):
        config = GRPOConfig(beta=0.0, importance_cap=cap)
        found.append(update(*parts, config, PhaseConfig()))
    norms = torch.tensor([figures["grad_norm_deployed"] for figures in found])
    assert torch.allclose(
        norms / norms[0],
        torch.tensor([1.0, 2.0, 3.0]),
        rtol=1e-3,
    ), norms
    assert abs(found[0]["sampler_k3"] - 2 + math.log(3)) < 1e-3, found[0]
    print("ok  --importance-cap weighs rows by learner / sampler up to the cap, 0 leaves ratio 1")


def check_absorb() -> None:
    """What a row in ABSORB takes from the quarantine: its weights, and which blocks they train."""
    rho = torch.tensor([[0.5, 1.0, 2.0, 1.1, 9.0]])
    mask, odds = torch.tensor([[True] * 4 + [False]]), (rho.log(), torch.zeros_like(rho))
    for how, better, worse in (
        ("clip", [0.5, 1, 0, 1.1], [0, 1, 2, 1.1]),
        ("silence", [1, 1, 0, 1], [0, 1, 1, 1]),
        ("ratio", [0.5, 1, 2, 1.1], [0.5, 1, 2, 1.1]),
    ):
        for A, wanted in ((1.0, better), (-1.0, worse)):
            found = token_weights(how, *odds, mask, torch.tensor([A]), 0.2)[0, :4]
            assert torch.allclose(found, torch.tensor(wanted).float()), (how, A, found)
    dealt = token_weights(
        "shuffled",
        *odds,
        mask,
        torch.ones(1),
        0.2,
    )[0, :4]
    assert dealt.tolist() != [0.5, 1, 0, 1.1], "the placebo is what it stands for"
    assert sorted(dealt.tolist()) == sorted(rho.masked_fill(rho == 2, 0)[0, :4].tolist())

    parts = absorbing(ablated=True)
    forms = get_args(AbsorbBy)
    figures = {
        how: update(
            *parts,
            GRPOConfig(),
            PhaseConfig(absorb_by=how),
        )
        for how in forms
    }
    trains = {how: found["grad_norm_quarantine"] > 0 for how, found in figures.items()}
    assert [how for how in forms if trains[how]] == ["both", "push"], trains
    clipped = [figures[how]["clip_share"] for how in ("both", "clip", "ratio")]
    assert clipped[0] == clipped[1] > clipped[2] == 0, clipped
    ratios = {how: found["ratio_mean_absorb"] for how, found in figures.items()}
    assert ratios["push"] == 1 and abs(ratios["both"] - 3) < 1e-3, ratios
    print("ok  --absorb-by: push has ratio 1, the filters PPO's weights; they hold the quarantine")


def check_advantages() -> None:
    rewards = torch.tensor([3.5, 0.5, 0.5, 0.5, 3.5, 3.5])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    mixed = torch.tensor([2, 0, 1, 0, 0, 2])
    plain = [2.0, -1.0, -1.0, -2.0, 1.0, 1.0]
    assert grpo.advantages(rewards, group).tolist() == plain
    for zones, wanted in (
        (mixed, [2.0, 0.0, 0.0, -1.5, 1.5, 1.0]),
        (
            torch.full((6,), int(Zone.ROUTE)),
            plain,
        ),  # groups routed whole
    ):
        assert grpo.retained_advantages(rewards, group, zones).tolist() == wanted, zones
    print("ok  A = r − mean of the group; retained rows share a baseline, ROUTE rows keep theirs")


def check_micro_batches() -> None:
    policy, batch = planted(8)
    whole = logps(
        policy,
        batch,
        1.0,
    )
    for budget in (1, 40, 10_000):
        parts = tokens.micro_batches(batch, budget)
        assert sorted(torch.cat(parts).tolist()) == [*range(8)]
        assert budget < 10_000 or len(parts) == 1
        for rows in parts:
            part = tokens.select(batch, rows)
            assert len(rows) == 1 or part.input_ids.numel() <= budget, (budget, rows)
            scored = logps(policy, part, 1.0)
            assert torch.allclose(
                scored,
                whole[rows, : scored.shape[1]],
                atol=1e-5,
            )
    batch.completion_start = batch.completion_start + 1
    assert not torch.allclose(
        logps(policy, batch, 1.0),
        whole,
        atol=1e-3,
    ), "off by one"
    print("ok  micro-batches cover every row once, within the budget, with the whole's log-probs")


def check_layout() -> None:
    prompts, completions = [[5, 6, 7], [8, 9]], [[4], [3, EOS]]
    batch = tokens.collate(
        prompts,
        completions,
        [0.0, 1.0],
        [0, 0],
        [-0.5, 0.5],
        PAD,
        "cpu",
    )
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 4],
        [8, 9, 3, EOS],
    ]
    assert batch.completion_start.tolist() == [3, 2]
    assert batch.completion_ids.tolist() == [[4, PAD], [3, EOS]]
    assert batch.completion_mask.tolist() == [
        [True, False],
        [True, True],
    ]
    check = tokens.check_prompt_lengths
    refused(
        "p7",
        check,
        {"p7": [1] * 9},
        8,
        1,
        None,
    )
    print("ok  collation as in its docstring; a prompt over the limit, or without room, is refused")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_loss()
    check_scored_loss()
    check_importance()
    check_absorb()
    check_kl_estimators()
    check_advantages()
    check_micro_batches()
    check_layout()
