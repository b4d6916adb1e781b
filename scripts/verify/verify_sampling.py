"""The sampler draws what the policy would, whatever the batches; a batch is within its budget.

A plain sampler (no cache, one row at a time in the batch's order of draws) is the reference. Greedy
tokens do not depend on the batches, drawn ones follow the policy's probabilities in all of them,
and no call of the model holds more than the budget of tokens.

Run: python -m scripts.verify.verify_sampling
"""

from unittest.mock import patch

import torch
from scripts.verify.tiny import EOS, VOCAB, draw, perturb, tiny_policy

from vgrout.model import sampling
from vgrout.model.policy import Policy
from vgrout.model.sampling import decoding_batches

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [17, 18, 19], [20]]
THREE = [3] * len(PROMPTS)
NEW = 12  # tokens
Ids = list[list[list[int]]]  # by prompt and row


def drawn(policy: Policy, budget: int = 10_000, temperature: float = 0.7) -> Ids:
    options = {"token_budget": budget, "temperature": temperature}
    groups = draw(policy, PROMPTS, THREE, **options)
    return [[ids for ids, _ in group] for group in groups]


@torch.no_grad()
def reference(policy: Policy, temperature: float) -> Ids:
    """The same draws from whole sequences: no cache, no padding, no batch.

    The generator is asked once a step for all live rows.
    """
    generator = torch.Generator().manual_seed(3)
    sequences = [list(prompt) for prompt in PROMPTS for _ in range(3)]
    live = sequences
    with policy.adapter.merged():
        for _ in range(NEW):
            outputs = [policy.model(torch.tensor([sequence])) for sequence in live]
            logits = torch.cat([output.logits[:, -1] for output in outputs])
            probs = torch.softmax(logits / temperature, -1)
            tokens = torch.multinomial(probs, 1, generator=generator)[:, 0].tolist()
            for sequence, token in zip(live, tokens, strict=True):
                sequence.append(token)
            live = [sequence for sequence in live if sequence[-1] != EOS]
    rows = iter(sequences)
    return [[next(rows)[len(prompt) :] for _ in range(3)] for prompt in PROMPTS]


def check_reference(policy: Policy) -> None:
    want = reference(policy, 0.7)
    assert drawn(policy) == want, "one batch does not draw what a plain sampler draws"
    assert drawn(policy, temperature=0.71) != want, "another temperature goes unnoticed"
    uneven = [2, 0, 1, 4, 1]
    assert [len(group) for group in draw(policy, PROMPTS, uneven)] == uneven
    print("ok  one batch draws, token for token, what a sampler without cache and padding draws")


def check_greedy(policy: Policy) -> None:
    """At T → 0 the batches must not matter. Mutation: rows handed to the wrong prompt."""
    want, decode = drawn(policy, temperature=1e-4), sampling._decode
    for budget in (1, 25, 60, 100, 200):
        same = drawn(policy, budget, 1e-4) == want
        assert same, f"a budget of {budget} changes greedy tokens"

    def misplaced(policy: Policy, prompts: list, *rest) -> list:
        return decode(policy, prompts[::-1], *rest)

    with patch.object(sampling, "_decode", misplaced):
        assert drawn(policy, 120, 1e-4) != want, "rows of the wrong prompt go unnoticed"
    print("ok  greedy tokens are the same for all budgets; rows of the wrong prompt are noticed")


def peak(policy: Policy, budget: int) -> tuple[int, int]:
    """Most rows × (prompt + completion) tokens of a decoding batch, and of a call of the model."""
    batches, calls, decode = [], [], sampling._decode

    def seen(module: object, args: tuple, inputs: dict) -> None:
        calls.append(inputs["attention_mask"].numel())

    def counted(policy: Policy, prompts: list, rows: list, new: int, *rest) -> list:
        batches.append(sum(rows) * (max(map(len, prompts)) + new))
        return decode(policy, prompts, rows, new, *rest)

    hook = policy.model.base_model.register_forward_pre_hook(seen, with_kwargs=True)
    with patch.object(sampling, "_decode", counted):
        drawn(policy, budget)
    hook.remove()
    return max(batches), max(calls)


def check_bound(policy: Policy) -> None:
    longest = max(map(len, PROMPTS)) + NEW
    for budget in (longest, 45, 60, 100, 200, 10_000):
        found = peak(policy, budget)
        assert max(found) <= budget, (budget, found)
    assert peak(policy, 1)[0] == longest, "a row over the budget SHOULD be decoded alone"

    def unbound(lengths: list, rows: list, new: int, budget: int) -> list:
        return [[*enumerate(rows)]]

    with patch.object(sampling, "decoding_batches", unbound):
        assert peak(policy, 60)[0] > 60, "the bound ignored goes unnoticed"
    print("ok  no decoding batch exceeds its budget; a bound that is ignored is noticed")


def check_batches() -> None:
    """All rows exactly once; one batch where they fit; whole groups where a group fits."""
    lengths, rows, g = [3, 9, 4], [2, 2, 2], torch.Generator().manual_seed(0)
    assert decoding_batches(lengths, rows, 1, 60) == [[(0, 2), (1, 2), (2, 2)]]
    assert decoding_batches(lengths, rows, 1, 20) == [[(0, 2), (2, 2)], [(1, 2)]]
    assert decoding_batches(lengths, rows, 1, 10) == [[(0, 2)], [(2, 2)], [(1, 1)], [(1, 1)]]
    assert decoding_batches([], [], 1, 9) == [] == decoding_batches([4], [0], 1, 9)

    def random(low: int, high: int, n: int = 1) -> list[int]:
        return torch.randint(low, high, (n,), generator=g).tolist()

    for _ in range(200):
        (n,), (new,), (budget,) = random(1, 9), random(1, 30), random(1, 2000)
        lengths, rows = random(1, 30, n), random(0, 30, n)
        batches = decoding_batches(lengths, rows, new, budget)
        for i, n in enumerate(rows):
            parts = [k for batch in batches for j, k in batch if j == i]
            whole = len(parts) <= 1 or n * (lengths[i] + new) > budget
            assert sum(parts) == n and all(parts), "rows are lost or doubled"
            assert whole, "a group that fits is divided"
        for batch in batches:
            used = sum(k for _, k in batch)
            longest = max(lengths[j] for j, _ in batch) + new
            assert used == 1 or used * longest <= budget
    print("ok  200 random divisions keep every row, the budget, and groups that fit whole")


def check_distribution(policy: Policy) -> None:
    """First tokens of 4,000 rows in batches of 100 follow the policy.

    Their total variation is within 5 standard deviations of its mean. Mutation: every batch draws
    the same.
    """
    n, temperature, decode = 4000, 0.7, sampling._decode
    with torch.no_grad(), policy.adapter.merged():
        logits = policy.model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    p = torch.softmax(logits / temperature, -1)

    def variation() -> float:
        options = {"max_completion_length": 1, "token_budget": 400}
        (rows,) = draw(policy, PROMPTS[:1], [n], **options)
        first = torch.tensor([ids[0] for ids, _ in rows])
        return float((first.bincount(minlength=VOCAB) / n - p).abs().sum() / 2)

    def repeated(*given) -> list:
        return decode(*given[:-1], torch.Generator().manual_seed(0))

    deviations = (2 * p * (1 - p) / (torch.pi * n)).sqrt()  # E|X − p| of a binomial share
    limit = float(deviations.sum() / 2) + 5 * (1 / (4 * n)) ** 0.5
    assert (found := variation()) < limit, (found, limit)
    with patch.object(sampling, "_decode", repeated):
        assert variation() > limit, "batches that repeat each other's draws go unnoticed"
    print(f"ok  {n} rows follow the policy's probabilities; batches that repeat draws are noticed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny = tiny_policy()
    perturb(tiny)
    for check in (check_reference, check_greedy, check_bound, check_distribution):
        check(tiny)
    check_batches()
