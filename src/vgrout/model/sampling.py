"""Sampling: batches within a budget of tokens, on merged weights. Top-p shapes what is drawn and
never what is scored."""

from collections.abc import Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from vgrout.model.policy import Policy, logits

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

    Prompts are left-padded and prefilled once each; the cache is then repeated over the group, and
    rows leave the batch as they finish.
    """
    device, width = policy.device, max(map(len, prompts))
    padded = [[policy.pad_id] * (width - len(p)) + p for p in prompts]
    padding = torch.tensor([width - len(p) for p in prompts])
    ids = torch.tensor(padded, device=device)
    mask = (torch.arange(width) >= padding[:, None]).long().to(device)
    eos = torch.tensor(sorted(policy.eos_ids), device=device)
    cache = DynamicCache(config=policy.model.config)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    states = _next(policy, ids, mask, position, cache)
    repeats = torch.tensor(num_generations, device=device)
    cache.batch_repeat_interleave(repeats)
    states, mask, position = (
        x.repeat_interleave(repeats, 0) for x in (states, mask, position[:, -1:])
    )
    rows = torch.arange(len(mask), device=device)
    drawn = torch.full((len(rows), max_completion_length), policy.pad_id, device=device)
    lengths = torch.full((len(rows),), max_completion_length, device=device)
    logps = torch.zeros(drawn.shape, device=device)
    for step in range(max_completion_length):
        scores = torch.log_softmax(logits(policy, states) / temperature, dim=-1)
        token = torch.multinomial(_nucleus(scores.exp(), top_p), 1, generator=generator)
        drawn[rows, step] = token[:, 0]
        logps[rows, step] = scores.gather(1, token)[:, 0]
        live = ~torch.isin(token[:, 0], eos)
        lengths[rows[~live]] = step + 1
        if not live.any() or step + 1 == max_completion_length:
            break
        if not live.all():
            rows, token, mask, position = rows[live], token[live], mask[live], position[live]
            cache.batch_select_indices(live.nonzero()[:, 0])
        mask, position = F.pad(mask, (0, 1), value=1), position + 1
        states = _next(policy, token, mask, position, cache)
    return [(d[:n], lp[:n]) for d, lp, n in zip(drawn.tolist(), logps.tolist(), lengths.tolist())]


def _next(
    policy: Policy, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache
) -> Float[Tensor, "n d"]:
    """The last position's hidden states; `cache` grows by the tokens of `ids`."""
    out = policy.model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


def _nucleus(probs: Float[Tensor, "n v"], top_p: float) -> Float[Tensor, "n v"]:
    """Keep the smallest set of tokens whose mass reaches top_p
    (https://arxiv.org/abs/1904.09751)."""
    if top_p >= 1:
        return probs
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    drop = sorted_probs.cumsum(-1) - sorted_probs >= top_p
    return probs.masked_fill(drop.scatter(-1, order, drop), 0.0)
