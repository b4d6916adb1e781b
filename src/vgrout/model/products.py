"""The products of an adapted Linear, with gradients that know masks and the probe c: autograd functions alone, no state."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class MaskedUp(torch.autograd.Function):
    """y = (h ⊙ keep) Uᵀ, with the gradient of (h ⊙ learn) Uᵀ: columns that are kept but do not learn are constants.

    h [g, s, k], U [d_out, k]; keep and learn [g, 1 or s, 2] say it for both halves of k, the blocks, or are None for all ones. A probe
    c [g, 1 or s, r], equal to 1, is read as multiplying the live bottleneck A x = h[:r] + h[r:2r] in front of B = U[:, :r]: it changes
    no value and has a gradient.
    """

    @staticmethod
    def forward(ctx, h, U, keep, learn, c, where):
        ctx.save_for_backward(h, U, learn, c, where)
        return _masked(h, keep) @ U.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, U, learn, c, where = ctx.saved_tensors
        grad_h = grad_U = grad_c = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
            through = grad @ U
            grad_h = _masked(through, learn)
        if ctx.needs_input_grad[1]:
            grad_U = torch.einsum("gso,gsk->ok", grad, _masked(h, learn))
        if ctx.needs_input_grad[4]:
            r = c.shape[-1]
            grad_c = probe_gradient(through[..., :r] * (h[..., :r] + h[..., r : 2 * r]), c, where)
        return grad_h, grad_U, None, None, grad_c, None


def _masked(
    h: Float[Tensor, "g s k"], mask: Float[Tensor, "rows tokens 2"] | None
) -> Float[Tensor, "g s k"]:
    return (
        h if mask is None else (h.unflatten(-1, (2, -1)) * mask[..., None].to(h.dtype)).flatten(-2)
    )


Columns = tuple[int, int]  # of U, and rows of D: from, to


class Run(NamedTuple):
    """Neighbouring tokens that share their masks: what is in the forward, what of it learns, and their number (0: all there are)."""

    keep: Columns
    learn: Columns
    tokens: int

    @staticmethod
    def slices(runs: list["Run"]) -> list[slice]:
        """Each run's tokens. Example: 2 and 3 tokens → [0:2, 2:5]."""
        ends = [*accumulate(run.tokens for run in runs)]
        return (
            [slice(None)]
            if len(runs) == 1
            else [slice(end - run.tokens, end) for run, end in zip(runs, ends)]
        )


class Merged(torch.autograd.Function):
    """y = x (W + U D)ᵀ + b, run by run, U and D limited to the columns that the run keeps: the same as W x + b + U (D x), in one product;
    in fp32 alone, where W does not round U D away. `weights` holds W + U D for every set of columns that a run names. Gradients of U and D
    go through the rank, as those of the two products do, and are of the columns that learn; what is kept and does not learn is a constant,
    to x too. Probe as in `MaskedUp`, of a single run.
    The two products with a whole weight, y and the gradient of x, are computed as `dtype` says; the thin ones are always in fp32.
    """

    @staticmethod
    def forward(ctx, x, b, D, U, c, where, weights, runs, dtype):
        ctx.save_for_backward(x, D, U, c, where, *(weights[run.learn] for run in runs))
        ctx.runs, ctx.dtype = runs, dtype
        y = x.new_empty(*x.shape[:-1], len(U))
        rows, out = x.flatten(0, -2), y.view(-1, len(U))
        assert len(runs) == 1 or sum(run.tokens for run in runs) == len(rows), (
            "runs of other tokens"
        )
        with factors_rounded(dtype):
            for run, part in zip(runs, Run.slices(runs)):
                torch.mm(rows[part], weights[run.keep].T, out=out[part])
        return y if b is None else y.add_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, D, U, c, where, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x = grad_D = grad_U = grad_c = None
        rows, out = x.flatten(0, -2), grad.flatten(0, -2)
        parts = Run.slices(ctx.runs)
        if need[0]:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            with factors_rounded(ctx.dtype):
                for weight, part in zip(weights, parts):
                    torch.mm(out[part], weight, out=grad_x.view(rows.shape)[part])
        if need[2] or need[3]:
            grad_D, grad_U = torch.zeros_like(D), torch.zeros_like(U)
            for run, part in zip(ctx.runs, parts):
                k = slice(*run.learn)
                grad_D[k].addmm_((out[part] @ U[:, k]).T, rows[part])
                grad_U[:, k].addmm_(out[part].T, rows[part] @ D[k].T)
        if need[4]:
            r = c.shape[-1]
            grad_c = probe_gradient((grad @ U[:, :r]) * F.linear(x, D[:r] + D[r : 2 * r]), c, where)
        return grad_x, None, grad_D, grad_U, grad_c, None, None, None, None


class Rounded(torch.autograd.Function):
    """y = x Wᵀ + b of a frozen Linear, and the gradient of x, as `dtype` says."""

    @staticmethod
    def forward(ctx, x, W, b, dtype):
        ctx.save_for_backward(W)
        ctx.dtype = dtype
        with factors_rounded(dtype):
            return F.linear(x, W, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (W,) = ctx.saved_tensors
        with factors_rounded(ctx.dtype):
            return grad @ W, None, None, None


@contextmanager
def factors_rounded(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products whose factors the device rounds if `dtype` is bfloat16, sums and results in fp32; exact for float32.

    The precision is torch's own switch (torch.set_float32_matmul_precision, "medium" and "highest"): a CPU rounds to bf16, a CUDA GPU
    to TF32, and a device without such products not at all.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def probe_gradient(
    by_token: Float[Tensor, "g s r"], c: Float[Tensor, "rows tokens r"], where: Tensor | None
) -> Float[Tensor, "rows tokens r"]:
    """∂/∂c from ∂/∂c at every token: of the positions `where` [g, s] (None: all), or by row in a packed pass, where = `Packing.row`."""
    by_token = by_token.to(c.dtype)
    if where is not None and where.ndim == 1:
        return by_token.new_zeros(len(c), c.shape[2]).index_add(0, where, by_token[0])[:, None]
    if c.shape[1] == 1:
        return (by_token if where is None else by_token * where[..., None]).sum(1, keepdim=True)
    return by_token
