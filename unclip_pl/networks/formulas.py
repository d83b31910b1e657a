"""GroupNorm, FiLM, SiLU, dropout and convolution in one by plain formulas, forward and backward: for GPUs, whose own GroupNorm takes NCHW alone.

Maps are (B, C, H, W) in any layout, which the results have too; arithmetic is float32 whatever their type. `kept` (B, C, H, W) bool is what dropout at the
rate `dropout` has left, None without it; scale and shift (B, C, 1, 1), both or neither.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unclip_pl.networks.winograd import convolution, convolution_backward


class NormSiLU(torch.autograd.Function):
    """conv(dropout(silu((1 + scale) GN(x) + shift))), or without the convolution; keeps x, the moments and what dropout kept, and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
        kernel: Tensor | None, kernel_bias: Tensor | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        mean, rstd = moments(x, groups, eps)
        y = activated(x, mean, rstd, weight, bias, scale, shift, kept, dropout, x.dtype if kernel is None else kernel.dtype)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, kernel, kept)
        ctx.dropout = dropout
        return y if kernel is None else convolution(y, kernel, kernel_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, scale, shift, kernel, kept = ctx.saved_tensors
        given = x, mean, rstd, weight, bias, scale, shift, kept, ctx.dropout
        grad_kernel = grad_kernel_bias = None
        if kernel is not None:
            y = activated(*given, kernel.dtype)
            found, grad_kernel, grad_kernel_bias = convolution_backward(grad, y, kernel, (True, *ctx.needs_input_grad[7:9]))
            grad = cast(Tensor, found)
            del y
        return *gradients(grad, *given), None, None, grad_kernel, grad_kernel_bias, None


def moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each group of channels of x: (B, groups) float32 each."""
    variance, mean = torch.var_mean(x.float().unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0)
    return mean, torch.rsqrt(variance + eps)


def _channels(value: Tensor, like: Tensor) -> Tensor:
    """(B, groups) -> (B, C), for the channels of `like`."""
    return value[..., None].expand(-1, -1, like.shape[1] // value.shape[1]).flatten(1)


def _line(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset (B, C, 1, 1) of GN(x) = slope x + offset."""
    slope = _channels(rstd, x) * weight
    return slope[..., None, None], (bias - _channels(mean, x) * slope)[..., None, None]


def _modulated(slope: Tensor, offset: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Slope and offset of (1 + scale) GN(x) + shift."""
    return (slope, offset) if scale is None or shift is None else (slope * (1 + scale), torch.addcmul(shift, offset, 1 + scale))


def activated(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, kept: Tensor | None,
    dropout: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dropout(silu((1 + scale) GN(x) + shift)) from the moments of x, in `dtype`."""
    slope, offset = _modulated(*_line(x, mean, rstd, weight, bias), scale, shift)
    y = F.silu(torch.addcmul(offset, x.float(), slope), inplace=True)
    return (y if kept is None else y * kept * (1 / (1 - dropout))).to(dtype)


def gradients(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, kept: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Of x, weight, bias, scale and shift, from that of the output.

    With g the gradient of what goes into SiLU, all of it comes from two sums a channel, of g and of g x.
    """
    slope, offset = _line(x, mean, rstd, weight, bias)
    whole, start = _modulated(slope, offset, scale, shift)
    wide = x.float()
    grad = grad.float() if kept is None else grad.float() * kept * (1 / (1 - dropout))
    grad = torch.ops.aten.silu_backward(grad, torch.addcmul(start, wide, whole))
    sums, products = grad.sum((2, 3)), (grad * wide).sum((2, 3))  # (B, C)
    grad_scale = grad_shift = None
    if scale is not None:
        grad_shift = sums[..., None, None]
        grad_scale = slope * products[..., None, None] + offset * grad_shift
        film = (1 + scale)[..., 0, 0]
        sums, products = sums * film, products * film
    groups = mean.shape[1]
    own, with_x = ((weight * value).unflatten(1, (groups, -1)).sum(-1) for value in (sums, products))  # (B, groups)
    count = math.prod(x.shape[1:]) // groups
    bend = rstd**3 * (mean * own - with_x) / count
    rest = -mean * bend - rstd * own / count
    grad_x = whole * grad + _channels(bend, x)[..., None, None] * wide + _channels(rest, x)[..., None, None]
    grad_weight = (_channels(rstd, x) * (products - _channels(mean, x) * sums)).sum(0)
    return grad_x.to(x.dtype), grad_weight, sums.sum(0), grad_scale, grad_shift
