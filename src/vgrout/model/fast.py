"""What makes a pass fast: rows as one sequence without padding, behind a prompt that they share.

Every Linear, norm and MLP sees the tokens of all rows one after the other; attention alone sees
rows, padded, and gives each the keys and values of its prompt, which ran before. So a pass costs
what its tokens cost. It is the same function of the parameters as rows in full, up to rounding. It
needs layers of full or sliding-window attention, and a model that calls transformers' attention
interface (https://huggingface.co/docs/transformers/attention_interface).
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vgrout.core import UserError
from vgrout.model.batch import Batch
from vgrout.model.lora2r import Lora2r, State

NAME = "vgrout_packed"


@dataclass(slots=True)
class Packing:
    """Some tokens of every row: n in all, at most t of a row.

    Example, two rows of 4 and 3 tokens, of which the last 2 and 1 are packed: position [2, 3, 2],
    row [0, 0, 1], places [[2, 3], [2, −1]], spread [[0, 1], [2, 2]], back [0, 1, 2].
    """

    ids: Int[Tensor, "1 n"]
    position: Int[Tensor, "1 n"]
    row: Int[Tensor, " n"]  # of the batch
    places: Int[Tensor, "g t"]  # positions of the padded rows, −1 for padding
    spread: Int[Tensor, "g t"]  # the tokens of the padded rows; padding repeats the last one
    back: Int[Tensor, " n"]  # each token's place in `spread`, flattened
    prompts: "Packing | None" = None  # what ran before
    prompt: Int[Tensor, " g"] | None = None  # which of its rows each row is behind
    kept: dict[nn.Module, list] = field(default_factory=lambda: defaultdict(list))
    calls: Counter = field(default_factory=Counter)  # of each attention, by rows behind prompts
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # window → additive mask

    def mask(
        self,
        window: int | None,
        like: Tensor,
    ) -> Float[Tensor, "g 1 t k"]:
        """0 where a query sees a key: at its own place or before it, within the window."""
        if window not in self.masks:
            keys = self.places
            if self.prompts is not None:
                keys = torch.cat([self.prompts.places[self.prompt], keys], dim=1)
            last = self.places.amax(1, keepdim=True)
            query = torch.where(self.places < 0, last, self.places)[:, :, None]
            distance = query - keys[:, None]
            seen = (keys[:, None] >= 0) & (distance >= 0) & (distance < (window or sys.maxsize))
            zeros = torch.zeros(seen.shape, device=seen.device, dtype=like.dtype)
            self.masks[window] = zeros.masked_fill(~seen, torch.finfo(like.dtype).min)[:, None]
        return self.masks[window]

    def padded(self, x: Float[Tensor, "1 h n d"]) -> Float[Tensor, "g h t d"]:
        rows = rearrange(x, "1 h n d -> n (h d)").index_select(0, self.spread.flatten())
        return rearrange(rows, "(g t) (h d) -> g h t d", t=self.spread.shape[1], h=x.shape[1])

    def behind_prompts(
        self,
        attention: nn.Module,
        key: Tensor,
        value: Tensor,
    ) -> list[Tensor]:
        """Keys and values with those of the prompts before them; a packing of prompts keeps its
        own.

        Gradient checkpointing runs a layer, and all calls of its attention, once more in their
        order.
        """
        if self.prompts is None:
            self.kept[attention].append((key, value))
            return [key, value]
        kept = self.prompts.kept[attention]
        before = kept[self.calls[attention] % len(kept)]
        self.calls[attention] += 1
        return [
            torch.cat([p.index_select(0, self.prompt), x], dim=2)
            for p, x in zip(before, (key, value))
        ]

    def state(self, state: State) -> State:
        """Every token has its row's masks and probe; a prompt has neither probe nor recording."""
        masks = {"learn": state.learn, "constant": state.constant}
        for name, mask in masks.items():
            if mask is not None and len(mask) > 1:
                masks[name] = mask[self.row, 0][None]
        c, seen = state.c, state.seen
        if self.prompts is None:
            c = seen = None
        elif c is not None:
            c = {name: x[self.row, 0][None] for name, x in c.items()}
        return replace(state, **masks, c=c, seen=seen, where=None, shape=(1, len(self.row)))


def pack(
    batch: Batch,
    rows: Int[Tensor, " g"],
    start: Int[Tensor, " g"],
    length: Int[Tensor, " g"],
    prompts: Packing | None = None,
    prompt: Int[Tensor, " g"] | None = None,
) -> Packing:
    """Tokens [start, start + length) of some rows of the batch, behind `prompts`; lengths are ≥
    1."""
    t = torch.arange(int(length.max()), device=length.device)
    places = torch.where(t < length[:, None], start[:, None] + t, -1)
    real, ends = places >= 0, length.cumsum(0)
    spread = torch.minimum((ends - length)[:, None] + t, ends[:, None] - 1)
    row, position = rows[:, None].expand(places.shape)[real], places[real]
    back = real.flatten().nonzero()[:, 0]
    ids = batch.input_ids[row, position][None]
    return Packing(ids, position[None], row, places, spread, back, prompts, prompt)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packing: Packing | None = None,
    inner: str = "",
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Float[Tensor, "1 n h d"], None]:
    """Attention of padded rows, behind their prompts, by the model's own implementation `inner`."""
    if packing is None:
        raise UserError(
            f"{type(module).__name__} is not told of packed rows by its model: "
            "set --no-share-prompts"
        )
    plain = all(kwargs.get(name) is None for name in ("softcap", "position_bias"))
    if inner == "sdpa" and query.device.type == "cpu" and plain:
        attend = grouped_attention
    else:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)
    q, k, v = (packing.padded(x) for x in (query, key, value))
    k, v = packing.behind_prompts(module, k, v)
    out, _ = attend(module, q, k, v, packing.mask(sliding_window, query), **kwargs)
    return out.flatten(0, 1).index_select(0, packing.back)[None], None


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Float[Tensor, "g t h d"], None]:
    """What transformers' "sdpa" computes, without a copy of keys and values for each head of a
    group: a CPU's kernel reads them where they are. (A GPU's fused kernels do so only without a
    mask.)"""
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)


def can_pack(model: nn.Module) -> bool:
    """Every layer is one of attention that takes a mask, called through transformers' interface."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        layers <= {"full_attention", "sliding_attention"}
        and config._attn_implementation in ("sdpa", "eager")
        and bool(getattr(model, "_supports_attention_backend", False))
    )


def can_share(
    adapter: Lora2r,
    batch: Batch,
) -> bool:
    """No mask or probe differs from token to token, and every row has something to share."""
    state = adapter.state
    by_token = any(mask is not None and mask.shape[1] > 1 for mask in (state.learn, state.constant))
    return not by_token and int(batch.completion_start.min()) > 1


def packed_pass(
    adapter: Lora2r,
    model: nn.Module,
    batch: Batch,
    call: Callable[..., Any],
    prompt_grad: bool,
) -> tuple[Any, Int[Tensor, "g t"]]:
    """(what the model gives for all rows' tokens from the prompt's last to the completion's last
    but one, where each row's are in it).

    What `seen` records is led back to rows. Without `prompt_grad` a shared prompt is a constant of
    the backward pass.
    """
    before, state = batch.completion_start - 1, adapter.state
    column = torch.arange(int(before.max()), device=before.device)
    kind = [batch.input_ids[:, : len(column)].where(column < before[:, None], -1)]
    kind += [m[:, 0].long() for m in (state.learn, state.constant) if m is not None and len(m) > 1]
    number: dict[tuple, int] = {}  # rows share a prompt if they have its tokens and masks
    shared = [number.setdefault(tuple(k), len(number)) for k in torch.cat(kind, dim=1).tolist()]
    first = torch.tensor([shared.index(i) for i in number.values()], device=before.device)
    prompts = pack(batch, first, torch.zeros_like(first), before[first])
    every, prompt = torch.arange(len(before)).to(before), torch.tensor(shared).to(before)
    rows = pack(batch, every, before, batch.completion_mask.sum(1), prompts, prompt)
    with attention(model, NAME) as inner:
        for packing, grad in ((prompts, prompt_grad), (rows, True)):
            with (
                adapter.using(packing.state(state)),
                torch.set_grad_enabled(grad and torch.is_grad_enabled()),
            ):
                out = call(
                    input_ids=packing.ids,
                    position_ids=packing.position,
                    packing=packing,
                    inner=inner,
                )
    for name, x in (state.seen or {}).items():
        state.seen[name] = x[0, rows.spread]
    return out, rows.spread


@contextmanager
def attention(
    model: nn.Module,
    implementation: str,
) -> Iterator[str]:
    """For a while attention goes through another implementation; yields the name of the own one."""
    config = model.config.get_text_config()
    own = config._attn_implementation
    config._attn_implementation_internal = implementation
    try:
        yield own
    finally:
        config._attn_implementation_internal = own


def checkpoint_contexts(
    model: nn.Module,
    adapter: Lora2r,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Those of a checkpointed layer's two runs: the second, in the backward pass, is under the
    state and the attention of the first (`context_fn` of torch.utils.checkpoint)."""
    state, implementation = adapter.state, model.config.get_text_config()._attn_implementation

    @contextmanager
    def again() -> Iterator[None]:
        with adapter.using(state), attention(model, implementation):
            yield

    return nullcontext(), again()
