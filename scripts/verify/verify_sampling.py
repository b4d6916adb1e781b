"""The sampler draws what the policy would, whatever the batches; a batch is within its budget.

The reference is a plain sampler: no cache, no padding, one row at a time in the batch's order of
draws. Greedy tokens do not depend on the batches, and drawn ones follow the policy's probabilities.
"""

from unittest.mock import patch

import torch
from scripts.verify.tiny import (
    EOS,
    VOCAB,
    draw,
    perturb,
    tiny_policy,
)

from vgrout.model import sampling
from vgrout.model.policy import Policy
from vgrout.model.sampling import decoding_batches

PROMPTS = [
    [5, 6, 7],
    [8, 9],
    [10, 11, 12, 13, 14, 15, 16],
    [17, 18, 19],
    [20],
]
ENDS = frozenset({EOS, 9, 30})  # several tokens end a completion
ROWS = 3  # of each prompt
NEW = 12  # tokens
LONGEST = max(map(len, PROMPTS)) + NEW
decode = sampling._decode
Ids = list[list[list[int]]]  # by prompt and row


def drawn(
    policy: Policy,
    budget: int = 10_000,
    temperature: float = 0.7,
) -> Ids:
    options = {"token_budget": budget, "temperature": temperature}
    groups = draw(policy, PROMPTS, [ROWS] * len(PROMPTS), **options)
    return [[ids for ids, _ in group] for group in groups]


@torch.no_grad()
def reference(policy: Policy, temperature: float) -> Ids:
    """The same draws from whole sequences; the generator is asked once a step for all live rows."""
    generator = torch.Generator().manual_seed(3)
    groups = [[list(prompt) for _ in range(ROWS)] for prompt in PROMPTS]
    live = [sequence for group in groups for sequence in group]
    with policy.adapter.merged():
        for _ in range(NEW):
            outputs = [policy.model(torch.tensor([sequence])) for sequence in live]
            logits = torch.cat([output.logits[:, -1] for output in outputs])
            probs = torch.softmax(logits / temperature, -1)
            tokens = torch.multinomial(probs, 1, generator=generator)
            for sequence, token in zip(live, tokens[:, 0].tolist()):
                sequence.append(token)
            live = [sequence for sequence in live if sequence[-1] not in ENDS]
    return [[row[len(prompt) :] for row in group] for prompt, group in zip(PROMPTS, groups)]


def check_reference(policy: Policy) -> None:
    want = reference(policy, 0.7)
    assert drawn(policy) == want, "one batch does not draw what a plain sampler draws"
    assert drawn(policy, temperature=0.71) != want, "another temperature goes unnoticed"
    print("ok  one batch draws, token for token, what a sampler without cache and padding draws")


def check_greedy(policy: Policy) -> None:
    """At T → 0 the batches must not matter. Mutation: rows handed to the wrong prompt."""
    want = drawn(policy, temperature=1e-4)
    for budget in (1, 60, 100):
        assert drawn(policy, budget, 1e-4) == want, f"a budget of {budget} changes greedy tokens"

    def misplaced(policy: Policy, prompts: list, *rest) -> list:
        return decode(policy, prompts[::-1], *rest)

    with patch.object(sampling, "_decode", misplaced):
        assert drawn(policy, 120, 1e-4) != want, "rows of the wrong prompt go unnoticed"
    print("ok  greedy tokens are the same for all budgets; rows of the wrong prompt are noticed")


def peak(policy: Policy, budget: int) -> int:
    """Most rows × (prompt + completion) tokens that a decoding batch may reach."""
    reached = []

    def counted(
        policy: Policy,
        prompts: list,
        rows: list,
        new: int,
        *rest,
    ) -> list:
        reached.append(sum(rows) * (max(map(len, prompts)) + new))
        return decode(policy, prompts, rows, new, *rest)

    with patch.object(sampling, "_decode", counted):
        drawn(policy, budget)
    return max(reached)


def check_bound(policy: Policy) -> None:
    for budget in (LONGEST, 60, 200):
        assert peak(policy, budget) <= budget
    assert peak(policy, 1) == LONGEST, "a row over the budget SHOULD be decoded alone"
    with patch.object(
        sampling,
        "decoding_batches",
        lambda _, rows, *__: [[*enumerate(rows)]],
    ):
        assert peak(policy, 60) > 60, "the bound ignored goes unnoticed"
    print("ok  no decoding batch exceeds its budget; a bound that is ignored is noticed")


def check_batches() -> None:
    """The docstring's examples."""
    lengths, rows = [3, 9, 4], [2, 2, 2]
    for budget, wanted in (
        (60, [[(0, 2), (1, 2), (2, 2)]]),
        (20, [[(0, 2), (2, 2)], [(1, 2)]]),
        (10, [[(0, 2)], [(2, 2)], [(1, 1)], [(1, 1)]]),
    ):
        assert decoding_batches(lengths, rows, 1, budget) == wanted
    assert not decoding_batches([], [], 1, 9) and not decoding_batches([4], [0], 1, 9)
    print("ok  one batch where all rows fit, else whole groups where one fits")


def check_distribution(policy: Policy) -> None:
    """First tokens of 4,000 rows in batches of 25 follow the policy.

    Their total variation is within 5 standard deviations of its mean. Mutation: every batch draws
    the same.
    """
    n, temperature = 4000, 0.7
    with torch.no_grad(), policy.adapter.merged():
        logits = policy.model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    p = torch.softmax(logits / temperature, -1)

    def variation() -> float:
        options = {
            "max_completion_length": 1,
            "token_budget": 400,
        }
        (rows,) = draw(policy, PROMPTS[:1], [n], **options)
        first = torch.tensor([ids[0] for ids, _ in rows])
        return float((first.bincount(minlength=VOCAB) / n - p).abs().sum() / 2)

    def repeated(*given) -> list:
        return decode(*given[:-1], torch.Generator().manual_seed(0))

    deviations = (2 * p * (1 - p) / (torch.pi * n)).sqrt()  # E|X − p| of a binomial share
    limit = float(deviations.sum() / 2) + 5 * (1 / (4 * n)) ** 0.5
    assert variation() < limit
    with patch.object(sampling, "_decode", repeated):
        assert variation() > limit, "batches that repeat each other's draws go unnoticed"
    print(f"ok  {n} rows follow the policy's probabilities; batches that repeat draws are noticed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny = tiny_policy()
    tiny.eos_ids = ENDS
    perturb(tiny)
    check_reference(tiny)
    check_greedy(tiny)
    check_bound(tiny)
    check_distribution(tiny)
    check_batches()
