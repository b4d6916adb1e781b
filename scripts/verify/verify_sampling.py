"""The sampler: what it draws is the policy's, whatever the batches; a batch stays within its budget of tokens.

A plain sampler (no cache, one row at a time in the batch's order of draws) is the reference. Greedy tokens do not depend on the
batches, drawn ones follow the policy's probabilities in all of them, and no call of the model holds more than the budget.

    uv run python scripts/verify/verify_sampling.py
"""

import torch
from scripts.verify.tiny import EOS, VOCAB, perturb, tiny_policy

from vgrout.model import sampling as module
from vgrout.model.policy import Policy
from vgrout.model.sampling import decoding_batches, sample

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [17, 18, 19], [20]]
NEW = 12  # tokens
Drawn = list[list[tuple[list[int], list[float]]]]  # by prompt: (ids, log-probs)


def draw(
    policy: Policy, budget: int, temperature: float = 0.7, rows: list[int] | None = None
) -> Drawn:
    return sample(policy, PROMPTS, rows or [3] * len(PROMPTS), max_completion_length=NEW, temperature=temperature, top_p=1.0,
                  token_budget=budget, generator=torch.Generator().manual_seed(3))  # fmt: skip


@torch.no_grad()
def reference(policy: Policy, temperature: float, rows: int = 3) -> list[list[list[int]]]:
    """The same draws from whole sequences: no cache, no padding, no batch; the generator is asked once a step for all live rows."""
    generator, sequences = (
        torch.Generator().manual_seed(3),
        [list(p) for p in PROMPTS for _ in range(rows)],
    )
    live = list(range(len(sequences)))
    with policy.adapter.merged():
        for _ in range(NEW):
            logits = torch.cat(
                [policy.model(torch.tensor([sequences[i]])).logits[:, -1] for i in live]
            )
            tokens = torch.multinomial(
                torch.softmax(logits / temperature, -1), 1, generator=generator
            )[:, 0].tolist()
            for i, token in zip(live, tokens):
                sequences[i].append(token)
            live = [i for i, token in zip(live, tokens) if token != EOS]
    parts = [s[len(PROMPTS[i // rows]) :] for i, s in enumerate(sequences)]
    return [parts[i : i + rows] for i in range(0, len(parts), rows)]


def ids(groups: Drawn) -> list[list[list[int]]]:
    return [[row for row, _ in group] for group in groups]


def check_reference(policy: Policy) -> None:
    want = reference(policy, 0.7)
    assert ids(draw(policy, 10_000)) == want, "one batch does not draw what a plain sampler draws"
    assert ids(draw(policy, 10_000, temperature=0.71)) != want, "another temperature goes unnoticed"
    uneven = draw(policy, 10_000, rows=[2, 0, 1, 4, 1])
    assert [len(group) for group in uneven] == [2, 0, 1, 4, 1]
    print(
        "ok  one batch draws, token for token, what a sampler without cache, padding and batch draws from the same generator"
    )


def check_greedy(policy: Policy) -> None:
    """At T → 0 the batches must not matter. Mutation: rows handed to the wrong prompt."""
    want = ids(draw(policy, 10_000, temperature=1e-4))
    budgets = (1, 25, 60, 100, 200)
    for budget in budgets:
        assert ids(draw(policy, budget, temperature=1e-4)) == want, (
            f"a budget of {budget} changes greedy tokens"
        )
    decode, module._decode = (
        module._decode,
        lambda policy, prompts, *rest: decode(policy, prompts[::-1], *rest),
    )
    assert ids(draw(policy, 120, temperature=1e-4)) != want, "rows of the wrong prompt go unnoticed"
    module._decode = decode
    print(
        f"ok  greedy tokens are the same for {len(budgets)} budgets; rows that reach the wrong prompt are noticed"
    )


def peak(policy: Policy, budget: int) -> tuple[int, int]:
    """(most rows × (prompt + completion) of a decoding batch, most tokens that one call of the model attends to)."""
    calls, seen = [], []
    hook = policy.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    decode = module._decode

    def counted(policy, prompts, rows, new, *rest):
        calls.append(sum(rows) * (max(map(len, prompts)) + new))
        return decode(policy, prompts, rows, new, *rest)

    module._decode = counted
    draw(policy, budget)
    module._decode = decode
    hook.remove()
    return max(calls), max(seen)


def check_bound(policy: Policy) -> None:
    longest = max(map(len, PROMPTS)) + NEW
    for budget in (longest, 45, 60, 100, 200, 10_000):
        assert max(peak(policy, budget)) <= budget, (budget, peak(policy, budget))
    assert peak(policy, 1)[0] == longest, (
        "a row that exceeds the budget by itself SHOULD be decoded alone"
    )
    real, module.decoding_batches = (
        module.decoding_batches,
        lambda lengths, rows, new, budget: [list(enumerate(rows))],
    )
    assert peak(policy, 60)[0] > 60, "the bound ignored goes unnoticed"
    module.decoding_batches = real
    print("ok  no decoding batch exceeds its budget of tokens; a bound that is ignored is noticed")


def check_batches() -> None:
    """All rows exactly once; one batch where they fit; whole groups where a group fits."""
    lengths, rows, g = [3, 9, 4], [2, 2, 2], torch.Generator().manual_seed(0)
    assert decoding_batches(lengths, rows, 1, 60) == [[(0, 2), (1, 2), (2, 2)]]
    assert decoding_batches(lengths, rows, 1, 20) == [[(0, 2), (2, 2)], [(1, 2)]]
    assert decoding_batches(lengths, rows, 1, 10) == [[(0, 2)], [(2, 2)], [(1, 1)], [(1, 1)]]
    assert decoding_batches([], [], 1, 9) == [] == decoding_batches([4], [0], 1, 9)
    for _ in range(200):
        n = int(torch.randint(1, 9, (), generator=g))
        lengths, rows = (
            torch.randint(0 if low else 1, 30, (n,), generator=g).tolist() for low in (False, True)
        )
        new, budget = (int(torch.randint(1, high, (), generator=g)) for high in (30, 2000))
        batches = decoding_batches(lengths, rows, new, budget)
        for i, n in enumerate(rows):
            parts = [k for batch in batches for j, k in batch if j == i]
            assert sum(parts) == n and all(parts), "rows are lost or doubled"
            assert len(parts) <= 1 or n * (lengths[i] + new) > budget, (
                "a group that fits is divided"
            )
        for batch in batches:
            used = sum(k for _, k in batch)
            assert used == 1 or used * (max(lengths[j] for j, _ in batch) + new) <= budget
    print("ok  200 random divisions keep every row, the budget, and groups that fit whole")


def check_distribution(policy: Policy) -> None:
    """First tokens of 4,000 rows in many batches follow the policy: total variation within 5 standard deviations of its mean."""
    n, t = 4000, 0.7
    with torch.no_grad(), policy.adapter.merged():
        p = torch.softmax(policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / t, -1)

    def variation() -> float:
        rows = sample(policy, PROMPTS[:1], [n], max_completion_length=1, temperature=t, top_p=1.0, token_budget=400,
                      generator=torch.Generator().manual_seed(0))  # fmt: skip
        drawn = torch.tensor([row[0] for row, _ in rows[0]]).bincount(minlength=VOCAB) / n
        return float((drawn - p).abs().sum() / 2)

    expected = float(
        (2 * p * (1 - p) / (torch.pi * n)).sqrt().sum() / 2
    )  # E|X − p| of a binomial share, summed
    limit = expected + 5 * (1 / (4 * n)) ** 0.5
    decode = module._decode
    assert variation() < limit, (variation(), limit)
    module._decode = lambda *a: decode(
        *a[:-1], torch.Generator().manual_seed(0)
    )  # mutation: every batch draws the same
    assert variation() > limit, "batches that repeat each other's draws go unnoticed"
    module._decode = decode
    print(
        f"ok  {n} rows in batches of 100 follow the policy's probabilities; batches that repeat each other's draws are noticed"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny = tiny_policy()
    perturb(tiny)
    check_reference(tiny)
    check_greedy(tiny)
    check_bound(tiny)
    check_batches()
    check_distribution(tiny)
