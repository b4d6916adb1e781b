"""Rows of a batch as one sequence without padding, behind a prompt that they share.

Every Linear, norm and MLP of the model sees the tokens of all rows one after the other; attention alone sees rows, padded, and gives each
the keys and values of its prompt, which ran before. So a forward pass costs what its tokens cost. The same function of the parameters
as rows in full, up to rounding. What it needs: layers of full or sliding-window attention, and a model that calls transformers'
attention interface (https://huggingface.co/docs/transformers/attention_interface).
"""

import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vgrout.core import UserError
from vgrout.model.batch import Batch

NAME = "vgrout_packed"


@dataclass(slots=True)
class Packing:
    """Some tokens of every row: n in all, at most t of a row.

    Example, two rows of 4 and 3 tokens, of which the last 2 and 1 are packed: position [2, 3, 2], row [0, 0, 1],
    places [[2, 3], [2, -1]], spread [[0, 1], [2, 2]], back [0, 1, 2].
    """

    ids: Int[Tensor, "1 n"]
    position: Int[Tensor, "1 n"]
    row: Int[Tensor, " n"]  # of the batch
    places: Int[Tensor, "g t"]  # positions of the padded rows, −1 for padding
    spread: Int[Tensor, "g t"]  # the tokens of the padded rows; padding repeats the last one
    back: Int[Tensor, " n"]  # each token's place in `spread`, flattened
    prompts: "Packing | None" = None  # what ran before, and which of its rows each row is behind
    prompt: Int[Tensor, " g"] | None = None
    kept: dict[nn.Module, deque] = field(
        default_factory=lambda: defaultdict(deque)
    )  # attention → prompts' keys and values, by call
    masks: dict[int | None, Tensor] = field(
        default_factory=dict
    )  # window → additive mask, made at the first layer that asks

    def mask(self, window: int | None, like: Tensor) -> Float[Tensor, "g 1 t k"]:
        """0 where a query sees a key: at its own place or before it, within the window."""
        if window not in self.masks:
            keys = (
                self.places
                if self.prompts is None
                else torch.cat([self.prompts.places[self.prompt], self.places], dim=1)
            )
            query = torch.where(self.places < 0, self.places.amax(1, keepdim=True), self.places)[
                :, :, None
            ]
            seen = (
                (keys[:, None] >= 0)
                & (query >= keys[:, None])
                & (query - keys[:, None] < (window or sys.maxsize))
            )
            zeros = torch.zeros(seen.shape, device=seen.device, dtype=like.dtype)
            self.masks[window] = zeros.masked_fill(~seen, torch.finfo(like.dtype).min)[:, None]
        return self.masks[window]


def pack(
    batch: Batch, rows: Int[Tensor, " g"], start: Int[Tensor, " g"], length: Int[Tensor, " g"],
    prompts: Packing | None = None, prompt: Int[Tensor, " g"] | None = None,
) -> Packing:  # fmt: skip
    """Tokens [start, start + length) of some rows of the batch, behind `prompts`; each length is 1 at least."""
    t = torch.arange(int(length.max()), device=length.device)
    places = torch.where(t < length[:, None], start[:, None] + t, -1)
    real, ends = places >= 0, length.cumsum(0)
    spread = torch.minimum((ends - length)[:, None] + t, ends[:, None] - 1)
    row, position = rows[:, None].expand(places.shape)[real], places[real]
    back = real.flatten().nonzero()[:, 0]
    return Packing(
        batch.input_ids[row, position][None],
        position[None],
        row,
        places,
        spread,
        back,
        prompts,
        prompt,
    )


class Spread(torch.autograd.Function):
    """x[index], where every row of x has one place in index, `back`, that counts; what else repeats it gets no gradient."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(index, back)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        _, back = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class Gather(torch.autograd.Function):
    """x[back], for distinct places; what is left out gets a gradient of 0."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.save_for_backward(back)
        ctx.rows = len(x)
        return x.index_select(0, back)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, back, grad), None


def _padded(x: Float[Tensor, "1 h n d"], packing: Packing) -> Float[Tensor, "g h t d"]:
    rows = Spread.apply(x[0].transpose(0, 1).flatten(1), packing.spread.flatten(), packing.back)
    return rows.unflatten(0, packing.spread.shape).unflatten(2, (-1, x.shape[3])).transpose(1, 2)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, packing: Packing | None = None,
    inner: str = "", sliding_window: int | None = None, **kwargs,
) -> tuple[Float[Tensor, "1 n h d"], None]:  # fmt: skip
    """Attention of padded rows, behind their prompts, by the model's own implementation `inner`."""
    if packing is None:
        raise UserError(
            f"{type(module).__name__} is not told of packed rows by its model: set --no-share-prompts"
        )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    plain = all(
        kwargs.get(k) is None for k in ("softcap", "position_bias")
    )  # arguments that `inner` may know, or refuse
    grouped = inner == "sdpa" and query.device.type == "cpu" and plain
    attend = grouped_attention if grouped else ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)
    q, k, v = (_padded(x, packing) for x in (query, key, value))
    if packing.prompts is None:
        packing.kept[module].append((k, v))
    else:
        before = packing.prompts.kept[module].popleft()
        k, v = (
            torch.cat([p.index_select(0, packing.prompt), x], dim=2) for p, x in zip(before, (k, v))
        )
    out, _ = attend(module, q, k, v, packing.mask(sliding_window, query), **kwargs)
    return Gather.apply(out.flatten(0, 1), packing.back)[None], None


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None,
    dropout: float = 0.0, **kwargs,
) -> tuple[Float[Tensor, "g t h d"], None]:  # fmt: skip
    """What transformers' "sdpa" computes, without a copy of the keys and values for each head of a group: the CPU's kernel reads them
    where they are. (A GPU's fused kernels do so only without a mask.)"""
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)


def can_pack(model: nn.Module) -> bool:
    """Every layer is one of attention that takes a mask, called through transformers' interface."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    known = layers <= {"full_attention", "sliding_attention"} and config._attn_implementation in (
        "sdpa",
        "eager",
    )
    return known and bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def packed_model(model: nn.Module) -> Iterator[str]:
    """For a while attention goes through `packed_attention`; yields the name of the implementation that it calls."""
    config = model.config.get_text_config()
    inner = config._attn_implementation
    config._attn_implementation_internal = NAME
    try:
        yield inner
    finally:
        config._attn_implementation_internal = inner
