"""A model with its adapter, and the one log-prob function.

Log-probs are temperature-scaled and untruncated everywhere.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from vgrout.model import fast, tokens
from vgrout.model.batch import Batch
from vgrout.model.lora2r import Lora2r

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
    token_budget: int = 8192  # padded tokens of one micro-batch
    decoder: Any = None  # of the last batch sampled on CUDA, with its graphs (`decoding.py`)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def context(self) -> int | None:
        """Tokens that the model has positions for; None where its family names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def micro_batches(self, batch: Batch, shared: bool | None = None) -> list[Int[Tensor, " n"]]:
        """Row indices within the token budget; rows that share a prompt stay together."""
        by_prompt = self.share_prompts if shared is None else shared
        return tokens.micro_batches(batch, self.token_budget, by_prompt)

    @contextmanager
    def training(self):
        """Training mode, for passes with a gradient alone: gradient checkpointing needs it, and
        would spoil what is sampled."""
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
    """log p(completion token | prefix) at `temperature`, 0 outside the mask.

    Logits are made at completion positions alone, in chunks. `share` and `prompt_grad` are those of
    `completion_states`.
    """
    hidden = completion_states(policy, batch, share=share, prompt_grad=prompt_grad)[-1]
    places = batch.completion_mask.nonzero(as_tuple=True)
    states, targets = hidden[places], batch.completion_ids[places]
    chunk = max(1, LOGIT_CHUNK // policy.model.config.get_text_config().vocab_size)

    def score(states: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        scores = torch.log_softmax(logits(policy, states) / temperature, dim=-1)
        return scores.gather(1, targets[:, None])[:, 0]

    if len(states) > chunk and torch.is_grad_enabled():
        score = partial(checkpoint, score, use_reentrant=False)
    scored = [score(*part) for part in zip(states.split(chunk), targets.split(chunk))]
    empty = torch.zeros(batch.completion_ids.shape, device=hidden.device)
    return empty.index_put(places, torch.cat(scored))


def completion_states(
    policy: Policy,
    batch: Batch,
    *,
    share: bool = True,
    prompt_grad: bool = True,
    layers: bool = False,
) -> list[Float[Tensor, "g t d"]]:
    """The states that predict each completion token (position start + j − 1 for token j): the
    last, or with `layers` those of each layer.

    Rows of one prompt in one zone share it, and all are packed without padding (`fast.py`). It is
    the same function of the parameters as running every row in full (`share` False, a policy that
    does not share, or masks by token), up to rounding. Without `prompt_grad` a shared prompt is a
    constant of the backward pass; a row in full knows no such constant.
    """
    model, adapter = policy.model.base_model, policy.adapter
    call = partial(model, output_hidden_states=layers, use_cache=False)
    packed = share and policy.share_prompts and fast.can_share(adapter, batch)
    if packed:
        out, places = fast.packed_pass(adapter, policy.model, batch, call, prompt_grad)
    else:
        with adapter.changed(shape=tuple(batch.input_ids.shape)):
            out = call(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    states = out.hidden_states[1:] if layers else [out.last_hidden_state]
    return [x[0, places] if packed else predicting(batch, x) for x in states]


def predicting(batch: Batch, x: Float[Tensor, "g s k"]) -> Float[Tensor, "g t k"]:
    """x at the positions that predict the completion tokens, start + j − 1 for token j; past a
    row's end, at the last position."""
    j = torch.arange(batch.completion_ids.shape[1], device=x.device)
    position = (batch.completion_start[:, None] - 1 + j).clamp(max=x.shape[1] - 1)
    return x.gather(1, position[:, :, None].expand(-1, -1, x.shape[-1]))


def logits(
    policy: Policy,
    states: Float[Tensor, "*n d"],
) -> Float[Tensor, "*n v"]:
    """Logits as fp32 (the product of a bf16 model's head is rounded to bf16), soft-capped where the
    architecture caps them."""
    scores = policy.model.get_output_embeddings()(states).float()
    cap = getattr(policy.model.config.get_text_config(), "final_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)
