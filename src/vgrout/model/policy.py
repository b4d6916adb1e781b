"""A model with its adapter, the one log-prob function, and sampling.

Log-probs are temperature-scaled and untruncated everywhere; top-p shapes what is drawn and never what is scored.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedTokenizerBase

from vgrout.model.batch import Batch
from vgrout.model.fused import TokenLogps
from vgrout.model.lora2r import Lora2r
from vgrout.model.packing import pack, packed_model
from vgrout.model.products import Rounded

LOGIT_CHUNK = 2**26  # logits held at once, in elements: 256 MiB in fp32


@dataclass
class Policy:
    """A frozen base model, its tokenizer and its adapter."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapter: Lora2r
    eos_ids: frozenset[int]
    pad_id: int
    share_prompts: bool = True  # pack rows, each distinct prompt once; False: every row in full

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def shares(self, training: bool) -> bool:
        """Rows of one prompt share it in a pass; not where gradient checkpointing runs layers again in its backward pass."""
        return self.share_prompts and not (
            training
            and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        )

    @property
    def context(self) -> int | None:
        """Tokens that the model has positions for; None where its family names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def multiplies_bfloat16(self) -> bool:
        """The device has instructions for products of bf16."""
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return any(torch.cpu.get_capabilities().get(k, False) for k in ("avx512_bf16", "amx_bf16"))

    @contextmanager
    def training(self):
        """Training mode, for passes with a gradient alone: gradient checkpointing needs it, and would spoil what is sampled."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()


def logps(
    policy: Policy,
    batch: Batch,
    temperature: float,
    *,
    share: bool = True,
    prompt_grad: bool = True,
) -> Float[Tensor, "g t"]:
    """log p(completion token | prefix) at `temperature`, 0 outside the mask; logits only at completion positions, in chunks.

    `share` and `prompt_grad` are those of `completion_states`.
    """
    hidden = completion_states(policy, batch, share=share, prompt_grad=prompt_grad)[-1]
    row, column = batch.completion_mask.nonzero(as_tuple=True)
    states, targets = hidden[row, column], batch.completion_ids[row, column]
    chunk = max(1, LOGIT_CHUNK // policy.model.config.get_text_config().vocab_size)
    parts = zip(states.split(chunk), targets.split(chunk))
    if len(states) > chunk and torch.is_grad_enabled():
        scored = [
            checkpoint(_token_logps, policy, h, y, temperature, use_reentrant=False)
            for h, y in parts
        ]
    else:
        scored = [_token_logps(policy, h, y, temperature) for h, y in parts]
    out = torch.zeros(batch.completion_ids.shape, device=hidden.device, dtype=torch.float32)
    return out.index_put((row, column), torch.cat(scored))


def completion_states(
    policy: Policy,
    batch: Batch,
    *,
    share: bool = True,
    prompt_grad: bool = True,
    layers: bool = False,
) -> list[Float[Tensor, "g t d"]]:
    """The states that predict each completion token (position start + j − 1 for token j): the last, or with `layers` of each layer.

    Rows of one prompt in one zone share it, and all are packed without padding (`packing.py`). The same function of the parameters as
    running every row in full (`share` False, a policy that does not share, or masks by token), up to rounding.
    Without `prompt_grad` a shared prompt is a constant of the backward pass; a row in full knows no such constant.
    """
    call = partial(policy.model.base_model, output_hidden_states=layers, use_cache=False)
    pick = lambda out: list(out.hidden_states[1:]) if layers else [out.last_hidden_state]  # noqa: E731
    before = batch.completion_start - 1
    if (
        not (share and policy.shares(policy.model.training))
        or policy.adapter.by_token
        or int(before.min()) < 1
    ):
        with policy.adapter.whole(batch.input_ids):
            out = call(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return [predicting(batch, x) for x in pick(out)]
    column = torch.arange(int(before.max()), device=before.device)
    first, prompt = policy.adapter.distinct(
        batch.input_ids[:, : len(column)].where(column < before[:, None], -1)
    )
    prompts = pack(batch, first, torch.zeros_like(first), before[first])
    order = policy.adapter.ordered(len(before)).to(before.device)
    rows = pack(
        batch, order, before[order], batch.completion_mask.sum(1)[order], prompts, prompt[order]
    )
    with packed_model(policy.model) as inner, policy.adapter.unchanged():
        with (
            policy.adapter.packed(prompts),
            torch.set_grad_enabled(prompt_grad and torch.is_grad_enabled()),
        ):
            call(input_ids=prompts.ids, position_ids=prompts.position, packing=prompts, inner=inner)
        with policy.adapter.packed(rows):
            out = call(input_ids=rows.ids, position_ids=rows.position, packing=rows, inner=inner)
    spread = rows.spread[order.argsort()]
    return [x[0, spread] for x in pick(out)]


def predicting(batch: Batch, x: Float[Tensor, "g s k"]) -> Float[Tensor, "g t k"]:
    """x at the positions whose outputs predict the completion tokens."""
    return x.gather(1, _predicting_positions(batch)[:, :, None].expand(-1, -1, x.shape[-1]))


def _predicting_positions(batch: Batch) -> Int[Tensor, "g t"]:
    """start + j − 1 for token j; past a row's end, the row's last position."""
    t, s = batch.completion_ids.shape[1], batch.input_ids.shape[1]
    return (
        batch.completion_start[:, None] - 1 + torch.arange(t, device=batch.input_ids.device)
    ).clamp(max=s - 1)


def _token_logps(
    policy: Policy, states: Float[Tensor, "n d"], targets: Tensor, temperature: float
) -> Float[Tensor, " n"]:
    return TokenLogps.apply(_logits(policy, states), targets, temperature)


def _logits(policy: Policy, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
    """Logits as fp32 (the product of a bf16 model's head is rounded to bf16), soft-capped where the architecture caps them."""
    head, dtype = policy.model.get_output_embeddings(), policy.adapter.products
    rounded = dtype != torch.float32 == states.dtype == head.weight.dtype
    logits = (
        Rounded.apply(states, head.weight, head.bias, dtype) if rounded else head(states).float()
    )
    cap = getattr(policy.model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


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
) -> list[list[tuple[list[int], list[float]]]]:
    """Draw `num_generations[i]` completions of prompt i on merged weights, in as few batches as `token_budget` allows.

    Returns, by prompt, (completion ids ending with EOS unless truncated, log-probs of the drawn tokens under the sampler:
    temperature-scaled, untruncated). The draws are a function of the generator and of the batches, which lengths and budget set.
    """
    out: list[list[tuple[list[int], list[float]]]] = [[] for _ in prompts]
    if not (
        batches := decoding_batches(
            [*map(len, prompts)], num_generations, max_completion_length, token_budget
        )
    ):
        return out  # nothing is merged for no rows
    with policy.adapter.merged(ablated):
        for part in batches:
            chosen, rows = zip(*part)
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
            for i, n in part:
                out[i] += islice(drawn, n)
    return out


def decoding_batches(
    lengths: Sequence[int],
    num_generations: Sequence[int],
    max_completion_length: int,
    token_budget: int,
) -> list[list[tuple[int, int]]]:
    """Batches of (prompt, rows) whose rows × (longest prompt + completion) fit in `token_budget`: the bound of the KV cache.

    All rows in one batch where they fit. Else whole groups, sorted by length; a group is divided only where it alone exceeds the
    budget, and a batch has at least one row.
    Example: lengths [3, 9, 4], 2 rows each, completions of 1, budget 20 → [[(0, 2), (2, 2)], [(1, 2)]]; budget 10 divides the last.
    """
    groups = [(i, n) for i, n in enumerate(num_generations) if n]
    if sum(num_generations) * (max(lengths, default=0) + max_completion_length) <= token_budget:
        return [groups] if groups else []
    batches: list[list[tuple[int, int]]] = [[]]
    for i, n in sorted(groups, key=lambda group: lengths[group[0]]):
        most = max(
            1, token_budget // (lengths[i] + max_completion_length)
        )  # rows; prompt i is the longest so far
        for part in [most] * (n // most) + [n % most] * (n % most > 0):
            if batches[-1] and sum(rows for _, rows in batches[-1]) + part > most:
                batches.append([])
            batches[-1].append((i, part))
    return batches


def _decode(
    policy: Policy, prompts: Sequence[list[int]], num_generations: Sequence[int], max_completion_length: int, temperature: float,
    top_p: float, generator: torch.Generator,
) -> list[tuple[list[int], list[float]]]:  # fmt: skip
    """One batch of `sample`: (ids, log-probs) of all rows, in the prompts' order.

    Prompts are left-padded and prefilled once each; the cache is then repeated over the group, and rows leave the batch as they
    finish.
    """
    device, width = policy.device, max(map(len, prompts))
    ids = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    eos = torch.tensor(sorted(policy.eos_ids), device=device)
    repeats = torch.tensor(num_generations, device=device)
    cache = DynamicCache(config=policy.model.config)
    rows = torch.arange(sum(num_generations), device=device)
    drawn = torch.full((len(rows), max_completion_length), policy.pad_id, device=device)
    lengths = torch.full((len(rows),), max_completion_length, device=device)
    logps = torch.zeros(drawn.shape, device=device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    states = _next(policy, ids, mask, position, cache)
    cache.batch_repeat_interleave(repeats)
    states, mask, position = (
        x.repeat_interleave(repeats, 0) for x in (states, mask, position[:, -1:])
    )
    for step in range(max_completion_length):
        scores = torch.log_softmax(_logits(policy, states) / temperature, dim=-1)
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
    return policy.model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]


def _nucleus(probs: Float[Tensor, "n v"], top_p: float) -> Float[Tensor, "n v"]:
    """Keep the smallest set of tokens whose mass reaches top_p (https://arxiv.org/abs/1904.09751)."""
    if top_p >= 1:
        return probs
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    drop = sorted_probs.cumsum(-1) - sorted_probs >= top_p
    return probs.masked_fill(drop.scatter(-1, order, drop), 0.0)
