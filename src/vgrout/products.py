"""The products of an adapted Linear, with gradients that know masks and the probe c: autograd functions alone, no state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class MaskedUp(torch.autograd.Function):
    """y = (h ⊙ keep) Uᵀ, with the gradient of (h ⊙ learn) Uᵀ: columns that are kept but do not learn are constants.

    h [g, s, k], U [d_out, k], keep and learn [g, 1 or s, k], or None for all ones. A probe c [g, 1 or s, r], equal to 1, is read as
    multiplying the live bottleneck A x = h[:r] + h[r:2r] in front of B = U[:, :r]: it changes no value and has a gradient.
    """

    @staticmethod
    def forward(ctx, h, U, keep, learn, c, where):
        ctx.save_for_backward(h, U, learn, c, where)
        return (h if keep is None else h * keep) @ U.T

    @staticmethod
    def backward(ctx, grad):
        h, U, learn, c, where = ctx.saved_tensors
        grad_h = grad_U = grad_c = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
            through = grad @ U
            grad_h = through if learn is None else through * learn
        if ctx.needs_input_grad[1]:
            grad_U = torch.einsum("gso,gsk->ok", grad, h if learn is None else h * learn)
        if ctx.needs_input_grad[4]:
            r = c.shape[-1]
            grad_c = probe_gradient(through[..., :r] * (h[..., :r] + h[..., r : 2 * r]), c, where)
        return grad_h, grad_U, None, None, grad_c, None


class Merged(torch.autograd.Function):
    """y = x (W + U D + constant)ᵀ + b: the same as W x + b + U D x for rows that share their masks, in one product; in fp32 alone, where
    W does not round U D away. The gradients of U and D go through the rank, as those of the two products do. `constant` [o, i] or None
    is the delta of a block that is kept but does not learn: no gradient goes through it, to x neither. Probe as in `MaskedUp`.
    The two products with a whole weight, x Wᵀ and its gradient to x, are computed as `dtype` says; the thin ones are always in fp32.
    """

    @staticmethod
    def forward(ctx, x, W, constant, b, D, U, c, where, dtype):
        weight = torch.addmm(W, U, D)
        ctx.save_for_backward(x, weight, D, U, c, where)
        ctx.dtype = dtype
        with factors_rounded(dtype):
            return F.linear(x, weight if constant is None else weight + constant, b)

    @staticmethod
    def backward(ctx, grad):
        x, weight, D, U, c, where = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x = grad_D = grad_U = grad_c = None
        if need[0]:
            with factors_rounded(ctx.dtype):
                grad_x = grad @ weight
        if need[4] or need[5]:
            flat, out = x.flatten(0, -2), grad.flatten(0, -2)
            grad_D, grad_U = (out @ U).T @ flat, out.T @ (flat @ D.T)
        if need[6]:
            r = c.shape[-1]
            grad_c = probe_gradient((grad @ U[:, :r]) * F.linear(x, D[:r] + D[r : 2 * r]), c, where)
        return grad_x, None, None, None, grad_D, grad_U, grad_c, None, None


@contextmanager
def factors_rounded(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products whose factors the device rounds to bf16 if `dtype` is bfloat16, sums and results in fp32; exact for float32.

    The precision is torch's own switch (torch.set_float32_matmul_precision), which a device without such products ignores.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
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
