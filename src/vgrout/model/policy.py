"""A model with its adapter, and the one log-prob function.

Log-probs are temperature-scaled and untruncated everywhere; top-p shapes what is drawn and never what is scored.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

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
    return TokenLogps.apply(logits(policy, states), targets, temperature)


def logits(policy: Policy, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
    """Logits as fp32 (the product of a bf16 model's head is rounded to bf16), soft-capped where the architecture caps them."""
    head, dtype = policy.model.get_output_embeddings(), policy.adapter.products
    rounded = dtype != torch.float32 == states.dtype == head.weight.dtype
    logits = (
        Rounded.apply(states, head.weight, head.bias, dtype) if rounded else head(states).float()
    )
    cap = getattr(policy.model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
