"""The loss equals one written as loops, advantages are Dr. GRPO's, micro-batches add up; the token layout is as documented."""

import math

import torch
from scripts.verify.tiny import EOS, PAD, perturb, random_batch, tiny_policy

from vgrout.core import UserError, Zone
from vgrout.model import grpo, tokens
from vgrout.model.policy import logps


def loop_loss(
    new, old, ref, mask, A, epsilon, beta, normaliser, clip=True, linear_from=grpo.KL_LINEAR_FROM
) -> float:
    """The definition with scalars."""
    total = 0.0
    for i in range(len(A)):
        for t in range(new.shape[1]):
            if mask[i, t]:
                ratio = math.exp(new[i, t] - old[i, t])
                clipped = min(max(ratio, 1 - epsilon), 1 + epsilon) if clip else ratio
                gap = float(ref[i, t] - new[i, t])
                total += -min(ratio * float(A[i]), clipped * float(A[i])) + beta * k3(
                    gap, linear_from
                )
    return total / normaliser


def k3(gap: float, linear_from: float) -> float:
    if gap > linear_from:
        return (
            math.exp(linear_from)
            - linear_from
            - 1
            + (math.exp(linear_from) - 1) * (gap - linear_from)
        )
    return math.exp(gap) - gap - 1


def check_loss() -> None:
    g = torch.Generator().manual_seed(0)
    new, old, ref = (-torch.rand(5, 7, generator=g) * 2 for _ in range(3))
    mask, A = torch.rand(5, 7, generator=g) > 0.3, torch.randn(5, generator=g)
    loss, stats = grpo.grpo_loss(new, old, ref, mask, A, epsilon=0.2, beta=0.05, normaliser=40.0)
    want = loop_loss(new, old, ref, mask, A, 0.2, 0.05, 40.0)
    assert abs(float(loss) - want) < 1e-5, (float(loss), want)
    assert abs(loop_loss(new, old, ref, mask, A, 0.2, 0.05, 40.0, clip=False) - want) > 1e-3, (
        "the clip is never active"
    )
    assert 0 < float(stats["clipped"][mask].mean()) < 1 and float(stats["kl"].min()) >= 0
    ref[mask.nonzero()[0].tolist()[0], mask.nonzero()[0].tolist()[1]] += (
        20  # a token that the policy has all but given up
    )
    far = float(grpo.grpo_loss(new, old, ref, mask, A, epsilon=0.2, beta=0.05, normaliser=40.0)[0])
    linear, free = (
        loop_loss(new, old, ref, mask, A, 0.2, 0.05, 40.0, linear_from=start)
        for start in (grpo.KL_LINEAR_FROM, math.inf)
    )
    assert abs(far - linear) < 1e-4 * linear and free > linear + 1, (far, linear, free)
    scored = grpo.scored_loss(new, mask, A, 9)
    assert torch.allclose(
        scored, torch.stack([-A[i] * new[i][mask[i]].sum() / 9 for i in range(5)])
    )
    print(
        "ok  loss = loop-written reference; without the clip, or with k3 unbounded, it is another number"
    )


def check_gradient_of_first_step() -> None:
    """At ratio 1 the GRPO gradient is the scored loss's, up to the normaliser: pass 1 scores what pass 2 applies."""
    policy, batch = tiny_policy(), random_batch()
    perturb(policy)
    params = policy.adapter.parameters("deployed")
    new = logps(policy, batch, 0.7)
    loss, _ = grpo.grpo_loss(
        new,
        new.detach(),
        None,
        batch.completion_mask,
        batch.advantages,
        epsilon=0.2,
        beta=0.0,
        normaliser=8.0,
    )
    a = torch.autograd.grad(loss, params)
    b = torch.autograd.grad(
        grpo.scored_loss(
            logps(policy, batch, 0.7), batch.completion_mask, batch.advantages, 8
        ).sum(),
        params,
    )
    c = torch.autograd.grad(
        grpo.scored_loss(
            logps(policy, batch, 1.0), batch.completion_mask, batch.advantages, 8
        ).sum(),
        params,
    )
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b)) and not all(
        torch.allclose(x, y, atol=1e-5) for x, y in zip(a, c)
    )
    print("ok  at ratio 1 the GRPO gradient is the scored loss's; another temperature's is not")


def check_advantages() -> None:
    r, group = torch.tensor([3.5, 0.5, 0.5, 0.5, 3.5, 3.5]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.allclose(grpo.advantages(r, group), torch.tensor([2.0, -1, -1, -2, 1, 1]))
    zones = torch.tensor(
        [Zone.ROUTE, Zone.RETAIN, Zone.ABSORB, Zone.RETAIN, Zone.RETAIN, Zone.ROUTE]
    )
    got = grpo.retained_advantages(r, group, zones)
    assert torch.allclose(got, torch.tensor([2.0, 0, 0, -1.5, 1.5, 1])), got
    assert not torch.allclose(got, grpo.advantages(r, group))
    alone = grpo.retained_advantages(r[:3], group[:3], torch.full((3,), int(Zone.ROUTE)))
    assert torch.allclose(alone, grpo.advantages(r[:3], group[:3])), (
        "a group routed whole keeps its advantages"
    )
    print(
        "ok  A = r − mean of the group; retained rows take their baseline among themselves, ROUTE rows keep the group's"
    )


def check_micro_batches() -> None:
    policy, batch = tiny_policy(), random_batch(8)
    perturb(policy)
    whole = logps(policy, batch, 1.0)
    for budget in (1, 16, 40, 10_000):
        parts = tokens.micro_batches(batch, budget)
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
        for rows in parts:
            part = tokens.select(batch, rows)
            size = part.input_ids.numel()
            assert len(rows) == 1 or size <= budget, (budget, size)
            got = logps(policy, part, 1.0)
            assert torch.allclose(got, whole[rows, : got.shape[1]], atol=1e-5)
    assert (
        len(tokens.micro_batches(batch, 1)) == 8 and len(tokens.micro_batches(batch, 10_000)) == 1
    )
    shifted = tokens.select(batch, torch.arange(8))
    shifted.completion_start = shifted.completion_start + 1
    assert not torch.allclose(logps(policy, shifted, 1.0), whole, atol=1e-3), (
        "an off-by-one position goes unnoticed"
    )
    print(
        "ok  micro-batches cover every row once, within the budget, with the log-probs of the whole; an off-by-one start is noticed"
    )


def check_layout() -> None:
    batch = tokens.collate(
        [[5, 6, 7], [8, 9]], [[4], [3, EOS]], [0.0, 1.0], [0, 0], [-0.5, 0.5], PAD, "cpu"
    )
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 4],
        [8, 9, 3, EOS],
    ] and batch.completion_start.tolist() == [3, 2]
    assert batch.completion_ids.tolist() == [
        [4, PAD],
        [3, EOS],
    ] and batch.completion_mask.tolist() == [[True, False], [True, True]]
    for prompt, completion, context, word in ((9, 1, None, "p7"), (8, 5, 12, "context of 12")):
        try:
            tokens.check_prompt_lengths({"p7": [1] * prompt}, 8, completion, context)
            raise AssertionError(
                "a prompt over the limit, or without room behind it, was not refused"
            )
        except UserError as error:
            assert word in str(error), error
    tokens.check_prompt_lengths({"p7": [1] * 8}, 8, 4, 12)
    print(
        "ok  collation as its docstring's example; a prompt over the limit is refused by id, and one without room behind it"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in (
        check_loss,
        check_gradient_of_first_step,
        check_advantages,
        check_micro_batches,
        check_layout,
    ):
        check()
