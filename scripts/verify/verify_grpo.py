"""The loss equals one written as loops, advantages are Dr. GRPO's, micro-batches add up."""

import math

import torch
from scripts.verify.tiny import EOS, PAD, perturb, random_batch, tiny_policy

from vgrout.core import UserError, Zone
from vgrout.model import grpo, tokens
from vgrout.model.policy import logps

EPSILON, BETA, NORMALISER = 0.2, 0.05, 40.0


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
        total += weight * k3(
            float(ref[i, t] - new[i, t]),
            linear_from,
        )
    return total / NORMALISER


def k3(gap: float, linear_from: float) -> float:
    near = min(gap, linear_from)
    slope = math.exp(near) - 1
    return slope - near + slope * (gap - near)


def check_loss() -> None:
    g = torch.Generator().manual_seed(0)
    new, old, ref = (-torch.rand(5, 7, generator=g) * 2 for _ in range(3))
    mask = torch.rand(5, 7, generator=g) > 0.3
    A = torch.randn(5, generator=g)
    parts = new, old, ref, mask, A
    how = dict(epsilon=EPSILON, beta=BETA, normaliser=NORMALISER)
    loss, by_token = grpo.grpo_loss(*parts, **how)
    wanted = loop_loss(*parts)
    assert abs(float(loss) - wanted) < 1e-5, (float(loss), wanted)
    assert abs(loop_loss(*parts, epsilon=math.inf) - wanted) > 1e-3, "the clip is never active"
    corrected = float(grpo.grpo_loss(*parts, **how, corrected=True)[0])
    assert abs(corrected - loop_loss(*parts, corrected=True)) < 1e-5
    assert abs(corrected - wanted) > 1e-3, "the correction of the KL does nothing"
    assert 0 < float(by_token["clipped"][mask].mean()) < 1
    assert float(by_token["kl"].min()) >= 0
    ref[tuple(mask.nonzero()[0])] += 20  # a token that the policy has all but given up
    far = float(grpo.grpo_loss(*parts, **how)[0])
    linear = loop_loss(*parts)
    unbounded = loop_loss(*parts, linear_from=math.inf)
    assert abs(far - linear) < 1e-4 * linear and unbounded > linear + 1, (far, linear, unbounded)
    rows = torch.stack([-A[i] * new[i][mask[i]].sum() / 9 for i in range(5)])
    assert torch.allclose(grpo.scored_loss(new, mask, A, 9), rows)
    print("ok  loss = loop-written reference; without the clip or k3's bound it is another")


def check_gradient_of_first_step() -> None:
    """Pass 1 scores what pass 2 applies: at ratio 1 both losses have one gradient."""
    policy, batch = tiny_policy(), random_batch()
    perturb(policy)
    masked = batch.completion_mask, batch.advantages
    new = logps(policy, batch, 0.7)
    how = dict(epsilon=EPSILON, beta=0.0, normaliser=8.0)
    losses = [
        grpo.grpo_loss(
            new,
            new.detach(),
            None,
            *masked,
            **how,
        )[0]
    ]
    losses += [
        grpo.scored_loss(
            logps(policy, batch, t),
            *masked,
            8,
        ).sum()
        for t in (0.7, 1.0)
    ]
    parameters = policy.adapter.parameters("deployed")
    applied, scored, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses
    )
    assert torch.allclose(applied, scored, atol=1e-5)
    assert not torch.allclose(applied, other, atol=1e-5), "another temperature goes unnoticed"
    print("ok  at ratio 1 the GRPO gradient is the scored loss's; another temperature's is not")


def check_advantages() -> None:
    rewards = torch.tensor([3.5, 0.5, 0.5, 0.5, 3.5, 3.5])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    zones = torch.tensor([2, 0, 1, 0, 0, 2])
    plain = grpo.advantages(rewards, group)
    assert torch.allclose(
        plain,
        torch.tensor([2.0, -1, -1, -2, 1, 1]),
    )
    retained = grpo.retained_advantages(rewards, group, zones)
    assert torch.allclose(
        retained,
        torch.tensor([2.0, 0, 0, -1.5, 1.5, 1]),
    ), retained
    assert not torch.allclose(retained, plain)
    routed = torch.full((6,), int(Zone.ROUTE))
    whole = grpo.retained_advantages(rewards, group, routed)
    assert torch.allclose(whole, plain), "groups routed whole keep their advantages"
    print("ok  A = r − mean of the group; retained rows share a baseline, ROUTE rows keep theirs")


def check_micro_batches() -> None:
    policy, batch = tiny_policy(), random_batch(8)
    perturb(policy)
    whole = logps(policy, batch, 1.0)
    for budget, count in ((1, 8), (16, None), (40, None), (10_000, 1)):
        parts = tokens.micro_batches(batch, budget)
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
        assert count in (None, len(parts)), (budget, len(parts))
        for rows in parts:
            part = tokens.select(batch, rows)
            assert len(rows) == 1 or part.input_ids.numel() <= budget, (budget, rows)
            lp = logps(policy, part, 1.0)
            assert torch.allclose(
                lp,
                whole[rows, : lp.shape[1]],
                atol=1e-5,
            )
    shifted = tokens.select(batch, torch.arange(8))
    shifted.completion_start = shifted.completion_start + 1
    assert not torch.allclose(
        logps(policy, shifted, 1.0),
        whole,
        atol=1e-3,
    ), "off by one"
    print("ok  micro-batches cover every row once, within the budget, with the whole's log-probs")


def check_layout() -> None:
    prompts = [[5, 6, 7], [8, 9]]
    completions = [[4], [3, EOS]]
    batch = tokens.collate(
        prompts,
        completions,
        [0.0, 1.0],
        [0, 0],
        [-0.5, 0.5],
        PAD,
        "cpu",
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 4], [8, 9, 3, EOS]]
    assert batch.completion_start.tolist() == [3, 2]
    assert batch.completion_ids.tolist() == [[4, PAD], [3, EOS]]
    assert batch.completion_mask.tolist() == [[True, False], [True, True]]
    tokens.check_prompt_lengths({"p7": [1] * 8}, 8, 4, 12)
    for length, limit, context, words in ((9, 1, None, "p7"), (8, 5, 12, "context of 12")):
        try:
            tokens.check_prompt_lengths(
                {"p7": [1] * length},
                8,
                limit,
                context,
            )
            raise AssertionError("a prompt over the limit, or without room behind it, is accepted")
        except UserError as error:
            assert words in str(error), error
    print("ok  collation as in its docstring; a prompt over the limit, or without room, is refused")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_loss()
    check_gradient_of_first_step()
    check_advantages()
    check_micro_batches()
    check_layout()
