"""The loss equals one written as loops, advantages are Dr. GRPO's, micro-batches add up."""

import math

import torch
from scripts.verify.tiny import EOS, PAD, perturb, random_batch, tiny_policy

from vgrout.core import UserError, Zone
from vgrout.model import grpo, tokens
from vgrout.model.policy import logps

EPSILON, BETA, NORMALISER = 0.2, 0.05, 40.0
HOW = dict(epsilon=EPSILON, beta=BETA, normaliser=NORMALISER)


def loop_loss(
    new, old, ref, mask, A, *, epsilon=EPSILON, linear_from=grpo.KL_LINEAR_FROM, corrected=False
) -> float:
    """The definition with scalars."""
    total = 0.0
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(new[i, t] - old[i, t])
        advantage = float(A[i])
        clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
        total -= min(ratio * advantage, clipped * advantage)
        weight = BETA * ratio if corrected else BETA
        total += weight * k3(float(ref[i, t] - new[i, t]), linear_from)
    return total / NORMALISER


def k3(gap: float, linear_from: float) -> float:
    near = min(gap, linear_from)
    slope = math.exp(near) - 1
    return slope - near + slope * (gap - near)


def random_parts() -> list[torch.Tensor]:
    """Log-probs new, old, of the reference; mask; advantages."""
    g = torch.Generator().manual_seed(0)
    new, old, ref = (
        -torch.rand(
            5,
            7,
            generator=g,
        )
        * 2
        for _ in range(3)
    )
    return [
        new,
        old,
        ref,
        torch.rand(5, 7, generator=g) > 0.3,
        torch.randn(5, generator=g),
    ]


def check_loss() -> None:
    parts = random_parts()
    ref, mask = parts[2:4]
    loss, by_token = grpo.grpo_loss(*parts, **HOW)
    wanted = loop_loss(*parts)
    assert abs(float(loss) - wanted) < 1e-5, (float(loss), wanted)
    assert abs(loop_loss(*parts, epsilon=math.inf) - wanted) > 1e-3, "the clip is never active"
    corrected = float(grpo.grpo_loss(*parts, **HOW, corrected=True)[0])
    assert abs(corrected - loop_loss(*parts, corrected=True)) < 1e-5
    assert 0 < float(by_token["clipped"][mask].mean()) < 1
    assert float(by_token["kl"].min()) >= 0
    ref[tuple(mask.nonzero()[0])] += 20  # a token that the policy has all but given up
    far = float(grpo.grpo_loss(*parts, **HOW)[0])
    linear = loop_loss(*parts)
    unbounded = loop_loss(*parts, linear_from=math.inf)
    assert abs(far - linear) < 1e-4 * linear and unbounded > linear + 1, (far, linear, unbounded)
    print("ok  loss = loop-written reference; without the clip or k3's bound it is another")


def check_scored_loss() -> None:
    """Pass 1 scores what pass 2 applies: at ratio 1 both losses have one gradient."""
    new, old, _, mask, A = random_parts()
    new.requires_grad_()
    rows = grpo.scored_loss(new, mask, A, NORMALISER)
    assert torch.allclose(
        rows[0],
        -A[0] * new[0][mask[0]].sum() / NORMALISER,
    )
    how = HOW | {"beta": 0.0}
    losses = [
        grpo.grpo_loss(
            new,
            x,
            None,
            mask,
            A,
            **how,
        )[0]
        for x in (new.detach(), old)
    ]
    applied, other, scored = (
        torch.autograd.grad(
            x,
            new,
        )[0]
        for x in (*losses, rows.sum())
    )
    assert torch.allclose(applied, scored)
    assert not torch.allclose(other, scored), "a ratio goes unnoticed"
    print("ok  at ratio 1 the GRPO gradient is the scored loss's; at another it is not")


def check_kl_estimators() -> None:
    """On policy, in expectation: k3 descends KL(ref‖π), the corrected estimator KL(π‖ref)."""
    logits = torch.tensor([0.5, -1.0, 0.2, 1.5], requires_grad=True)
    ref = torch.tensor([-0.3, 0.4, 1.0, 0.1]).log_softmax(0)
    logp = logits.log_softmax(0)
    p, q = logp.exp(), ref.exp()
    forward, reverse = (
        torch.autograd.grad(kl.sum(), logits, retain_graph=True)[0]
        for kl in (q * (ref - logp), p * (logp - ref))
    )
    every = torch.ones(4, 1, dtype=torch.bool)
    how = HOW | {"beta": 1.0, "normaliser": 1.0}

    def expected(corrected: bool) -> torch.Tensor:
        """Σ p ∇loss over the outcomes, each outcome a row of one token."""
        columns = [x[:, None] for x in (logp, logp.detach(), ref)]
        columns[0].register_hook(lambda grad: grad * p.detach()[:, None])
        loss, _ = grpo.grpo_loss(*columns, every, torch.zeros(4), **how, corrected=corrected)
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    for corrected, wanted, other in ((False, forward, reverse), (True, reverse, forward)):
        assert torch.allclose(expected(corrected), wanted, atol=1e-6), corrected
        assert not torch.allclose(expected(corrected), other, atol=1e-2), "not told apart"
    print("ok  k3's on-policy gradient is KL(ref‖π)'s, the corrected one's is KL(π‖ref)'s")


def check_advantages() -> None:
    rewards = torch.tensor([3.5, 0.5, 0.5, 0.5, 3.5, 3.5])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    zones = torch.tensor([2, 0, 1, 0, 0, 2])
    plain = grpo.advantages(rewards, group)
    assert torch.allclose(
        plain,
        torch.tensor(
            [
                2.0,
                -1,
                -1,
                -2,
                1,
                1,
            ]
        ),
    )
    retained = grpo.retained_advantages(rewards, group, zones)
    assert torch.allclose(
        retained,
        torch.tensor(
            [
                2.0,
                0,
                0,
                -1.5,
                1.5,
                1,
            ]
        ),
    ), retained
    routed = torch.full((6,), int(Zone.ROUTE))
    whole = grpo.retained_advantages(rewards, group, routed)
    assert torch.allclose(whole, plain), "groups routed whole keep their advantages"
    print("ok  A = r − mean of the group; retained rows share a baseline, ROUTE rows keep theirs")


def check_micro_batches() -> None:
    policy, batch = tiny_policy(), random_batch(8)
    perturb(policy)
    whole = logps(policy, batch, 1.0)
    for budget, count in ((1, 8), (40, None), (10_000, 1)):
        parts = tokens.micro_batches(batch, budget)
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
        assert count in (None, len(parts)), (budget, len(parts))
        for rows in parts:
            part = tokens.select(batch, rows)
            assert len(rows) == 1 or part.input_ids.numel() <= budget, (budget, rows)
            lp = logps(policy, part, 1.0)
            assert torch.allclose(lp, whole[rows, : lp.shape[1]], atol=1e-5)
    shifted = tokens.select(batch, torch.arange(8))
    shifted.completion_start = shifted.completion_start + 1
    assert not torch.allclose(logps(policy, shifted, 1.0), whole, atol=1e-3), "off by one"
    print("ok  micro-batches cover every row once, within the budget, with the whole's log-probs")


def check_layout() -> None:
    rows = (
        [
            [
                5,
                6,
                7,
            ],
            [8, 9],
        ],
        [[4], [3, EOS]],
    )
    batch = tokens.collate(
        *rows,
        [0.0, 1.0],
        [0, 0],
        [-0.5, 0.5],
        PAD,
        "cpu",
    )
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 4],
        [
            8,
            9,
            3,
            EOS,
        ],
    ]
    assert batch.completion_start.tolist() == [3, 2]
    assert batch.completion_ids.tolist() == [[4, PAD], [3, EOS]]
    assert batch.completion_mask.tolist() == [[True, False], [True, True]]
    tokens.check_prompt_lengths({"p7": [1] * 8}, 8, 4, 12)
    for length, completion, context, words in ((9, 1, None, "p7"), (8, 5, 12, "context of 12")):
        try:
            tokens.check_prompt_lengths({"p7": [1] * length}, 8, completion, context)
            raise AssertionError("a prompt over the limit, or without room behind it, is accepted")
        except UserError as error:
            assert words in str(error), error
    print("ok  collation as in its docstring; a prompt over the limit, or without room, is refused")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_loss()
    check_scored_loss()
    check_kl_estimators()
    check_advantages()
    check_micro_batches()
    check_layout()
