"""Where autograd would take many passes over memory: the norm, and the log-prob of a token. Autograd functions, no state."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RMS_NORMS = {
    "LlamaRMSNorm",
    "Qwen2RMSNorm",
    "Qwen3RMSNorm",
}  # y = w x / √(mean x² + variance_epsilon), by their class


class RootMeanSquare(torch.autograd.Function):
    """y = w ⊙ x / √(mean(x²) + ε) over the last axis (https://arxiv.org/abs/1910.07467), and the gradient of x; w is frozen."""

    @staticmethod
    def forward(ctx, x, w, epsilon):
        scale = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            .square_()
            .div_(x.shape[-1])
            .add_(epsilon)
            .rsqrt_()
        )
        unit = x * scale
        ctx.save_for_backward(unit, scale, w)
        return unit * w

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, scale, w = ctx.saved_tensors
        grad = grad * w
        along = torch.linalg.vecdot(grad, unit)[..., None].div_(-unit.shape[-1])
        return grad.addcmul_(unit, along).mul_(scale), None, None


class TokenLogps(torch.autograd.Function):
    """log softmax(z / T) [n] at the targets, for logits z [n, v]; the gradient of z is (onehot − softmax) / T."""

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        scores = torch.log_softmax(logits / temperature, dim=-1)
        ctx.save_for_backward(scores, targets)
        ctx.temperature = temperature
        return scores.gather(1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, targets = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        return scores.exp().mul_(-grad).scatter_add_(1, targets[:, None], grad), None, None


def fuse_norms(model: nn.Module) -> None:
    """Let a frozen model's fp32 norms of known classes compute by `RootMeanSquare`: the same function, up to rounding."""
    for norm in model.modules():
        if type(norm).__name__ in RMS_NORMS:
            norm.forward = partial(_norm, norm)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if x.dtype == norm.weight.dtype == torch.float32:
        return RootMeanSquare.apply(x, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, x)
