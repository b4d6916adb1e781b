"""Sampling: batches within a budget of tokens, on merged weights. Top-p shapes what is drawn and
never what is scored."""

from collections.abc import Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.model.decoding import decoder, prefill
from vgrout.model.policy import Policy

Drawn = list[tuple[list[int], list[float]]]  # completion ids, and the log-prob of each


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[list[int]],
    num_generations: Sequence[int],
    *,
    max_completion_length: int,
    temperature: float,
    top_p: float,
    token_budget: int,
    generator: torch.Generator,
    ablated: bool = False,
) -> list[Drawn]:
    """Draw `num_generations[i]` completions of prompt i, in as few batches as `token_budget`
    allows.

    Returns, by prompt, (completion ids ending with EOS unless truncated, log-probs of the drawn
    tokens under the sampler: temperature-scaled, untruncated). The draws are a function of the
    generator and of the batches, which lengths and budget set.
    """
    completions: list[Drawn] = [[] for _ in prompts]
    lengths = [len(p) for p in prompts]
    batches = decoding_batches(lengths, num_generations, max_completion_length, token_budget)
    if not batches:  # nothing is merged for no rows
        return completions
    with policy.adapter.merged(ablated):
        for batch in batches:
            chosen, rows = zip(*batch)
            drawn = iter(
                _decode(
                    policy,
                    [prompts[i] for i in chosen],
                    rows,
                    max_completion_length,
                    temperature,
                    top_p,
                    generator,
                )
            )
            for i, n in batch:
                completions[i] += islice(drawn, n)
    return completions


def decoding_batches(
    lengths: Sequence[int],
    num_generations: Sequence[int],
    max_completion_length: int,
    token_budget: int,
) -> list[list[tuple[int, int]]]:
    """Batches of (prompt, rows) with rows × (longest prompt + completion) within `token_budget`,
    the bound of the KV cache.

    All rows in one batch where they fit. Else whole groups, sorted by length; a group is divided
    only where it alone exceeds the budget, and a batch has at least one row.
    Example: lengths [3, 9, 4], 2 rows each, completions of 1, budget 20 → [[(0, 2), (2, 2)], [(1,
    2)]]; budget 10 divides the last.
    """
    groups = [(i, n) for i, n in enumerate(num_generations) if n]
    widest = max(lengths, default=0) + max_completion_length
    if sum(num_generations) * widest <= token_budget:
        return [groups] if groups else []
    batches: list[list[tuple[int, int]]] = [[]]
    for i, n in sorted(groups, key=lambda group: lengths[group[0]]):
        longest = lengths[i] + max_completion_length  # prompt i is the longest so far
        most = max(1, token_budget // longest)
        while n:
            part = min(n, most)
            if batches[-1] and sum(rows for _, rows in batches[-1]) + part > most:
                batches.append([])
            batches[-1].append((i, part))
            n -= part
    return batches


def _decode(
    policy: Policy,
    prompts: Sequence[list[int]],
    num_generations: Sequence[int],
    max_completion_length: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> Drawn:
    """One batch of `sample`, all rows in the prompts' order.

    Prompts are prefilled once each. Rows leave the batch when they have finished: at once, or on
    CUDA at the next look, down to a number of rows that has a graph.
    """
    device, longest = policy.device, max(map(len, prompts)) + max_completion_length
    cache, seen, behind = prefill(policy, prompts)
    repeats = torch.tensor(num_generations, device=device)
    decoding = decoder(policy, sum(num_generations), longest)
    decoding.start(cache, seen, repeats)
    scored = behind.repeat_interleave(repeats, 0)
    rows = torch.arange(len(scored), device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    drawn = torch.full((len(rows), max_completion_length), policy.pad_id, device=device)
    lengths = torch.full((len(rows),), max_completion_length, device=device)
    logps = torch.zeros(drawn.shape, device=device)
    eos = torch.tensor(sorted(policy.eos_ids), device=device)
    for step in range(max_completion_length):
        scores = torch.log_softmax(scored / temperature, dim=-1)
        token = torch.multinomial(nucleus(scores.exp(), top_p), 1, generator=generator)
        drawn[rows, step] = token[:, 0]
        logps[rows, step] = scores.gather(1, token)[:, 0]
        ends = torch.isin(token[:, 0], eos) & ~done
        lengths[rows] = torch.where(ends, step + 1, lengths[rows])
        done |= ends
        if step + 1 == max_completion_length:
            break
        if step % decoding.look_every == 0:
            live = int((~done).sum())
            if not live:
                break
            if (room := decoding.room(live)) < len(rows):
                order = done.long().argsort(stable=True)[:room]  # the live rows as they were
                rows, token, done = rows[order], token[order], done[order]
                decoding.keep(order)
        scored = decoding.step(token)
    return [(d[:n], lp[:n]) for d, lp, n in zip(drawn.tolist(), logps.tolist(), lengths.tolist())]


def nucleus(probs: Float[Tensor, "n v"], top_p: float) -> Float[Tensor, "n v"]:
    """Keep the smallest set of tokens whose mass reaches top_p
    (https://arxiv.org/abs/1904.09751); of tokens of one probability all or none.

    A token stays where those above it have less mass than top_p. That is so from some probability
    on, which a bisection finds without a sort: positive floats are ordered like their bits.
    """
    if top_p >= 1:
        return probs
    low = torch.zeros(len(probs), 1, dtype=torch.int32, device=probs.device)
    high = probs.amax(1, keepdim=True).view(torch.int32)
    for _ in range(31):  # low: too many stay; high: the mass above is small enough
        middle = low + (high - low) // 2
        above = torch.where(probs > middle.view(torch.float32), probs, 0.0).sum(1, keepdim=True)
        enough = above < top_p
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle + 1)
    return torch.where(probs >= high.view(torch.float32), probs, 0.0)
