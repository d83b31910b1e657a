"""GroupNorm, FiLM, SiLU, dropout and convolution in one, which is half of a residual block: of all its stages training keeps the input alone.

Gradients go by plain formulas, the same on CPUs and GPUs. Maps are (B, C, H, W) in any layout, which the results have too; all but the convolution
is float32 whatever their type.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unclip_pl.networks.layers import GroupNorm32
from unclip_pl.networks.winograd import convolution, convolution_backward

PART = 2**20
"""Numbers of a feature map that a CPU works on together where a map is larger: of what comes and goes meanwhile little is needed, and caches hold it."""
NATIVE = ("cpu", "meta")
"""Devices whose GroupNorm takes maps in channels_last as they are; that of CUDA refuses them."""

Rows = list[Tensor | None]


def _parts(x: Tensor, skip: Tensor | None = None) -> list[slice]:
    """Samples of x (B, ...), with those of skip, as many together as `PART` allows."""
    numbers = sum(part.shape[1:].numel() for part in (x, skip) if part is not None)
    each = max(1, PART // max(1, numbers) if x.device.type == "cpu" else len(x))
    return [slice(i, i + each) for i in range(0, len(x), each)] or [slice(0)]


def _of(some: slice, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor[some] for tensor in tensors]


def _joined(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat([x, skip], dim=1)


def _dense(x: Tensor) -> Tensor:
    """x without gaps, in the order that it has, NCHW or channels last: kernels that are called directly do not look."""
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def _by_parts(x: Tensor, skip: Tensor | None, compute: Callable[[slice], tuple[Rows, Rows]]) -> tuple[Rows, Rows]:
    """What `compute` finds for some samples of x, for all: a row for each sample in the first list, sums over samples in the second."""
    first, *others = _parts(x, skip)
    rows, sums = compute(first)
    if not others:
        return rows, sums
    found: Rows = [None if row is None else row.new_empty_strided((len(x), *row.shape[1:]), (row[0].numel(), *row.stride()[1:])) for row in rows]
    for some in (first, *others):
        if some is not first:
            rows, more = compute(some)
            sums = [a if a is None or b is None else a + b for a, b in zip(sums, more)]
        for whole, row in zip(found, rows):
            if whole is not None and row is not None:
                whole[some] = row
    return found, sums


class _NormSiLU(torch.autograd.Function):
    """conv(dropout(silu((1 + scale) GN(x) + shift))), or without the convolution; keeps x, the moments and what dropout kept, and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
        kernel: Tensor | None, kernel_bias: Tensor | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        kept = torch.empty_like(_joined(x, skip), dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None

        def compute(some: slice) -> tuple[Rows, Rows]:
            part, behind, factor, addend, places = _of(some, x, skip, scale, shift, kept)
            y, mean, rstd = _normalised(_joined(part, behind).float(), weight, bias, factor, addend, groups, eps)
            y = F.silu(y, inplace=True)
            y = y if places is None else y.mul_(places).mul_(1 / (1 - dropout))
            return [y.to(x.dtype) if kernel is None else convolution(y.to(kernel.dtype), kernel, kernel_bias), mean, rstd], []

        (out, mean, rstd), _ = _by_parts(x, skip, compute)
        ctx.save_for_backward(x, skip, mean, rstd, weight, bias, scale, shift, kernel, kept)
        ctx.dropout = dropout
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, skip, mean, rstd, weight, bias, scale, shift, kernel, kept = ctx.saved_tensors

        def compute(some: slice) -> tuple[Rows, Rows]:
            return _gradients(weight, bias, kernel, ctx.dropout, ctx.needs_input_grad[8:10], *_of(some, grad, x, skip, mean, rstd, scale, shift, kept))

        (grad_x, grad_skip, grad_scale, grad_shift), (grad_weight, grad_bias, grad_kernel, grad_kernel_bias) = _by_parts(x, skip, compute)
        return grad_x, grad_skip, grad_weight, grad_bias, grad_scale, grad_shift, None, None, grad_kernel, grad_kernel_bias, None


def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(1 + scale) GN(x) + shift of a float32 x, and of its groups of channels mean and 1 / standard deviation, (B, groups) each."""
    if x.device.type in NATIVE:
        y, mean, rstd = torch.native_group_norm(_dense(x), weight, bias, len(x), x.shape[1], x.shape[2:].numel(), groups, eps)
        return y if scale is None or shift is None else torch.addcmul(shift, y, 1 + scale), mean, rstd
    variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0)
    rstd = torch.rsqrt(variance + eps)
    slope, offset = _modulated(*_line(x, mean, rstd, weight, bias), scale, shift)
    return torch.addcmul(offset, x, slope), mean, rstd


def _channels(value: Tensor, like: Tensor) -> Tensor:
    """(B, groups) -> (B, C), for the channels of `like`."""
    return value[..., None].expand(-1, -1, like.shape[1] // value.shape[1]).flatten(1)


def _line(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset (B, C, 1, 1) of GN(x) = slope x + offset."""
    slope = _channels(rstd, x) * weight
    return slope[..., None, None], torch.addcmul(bias, _channels(mean, x), slope, value=-1)[..., None, None]


def _modulated(slope: Tensor, offset: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Slope and offset of (1 + scale) GN(x) + shift."""
    return (slope, offset) if scale is None or shift is None else (slope * (1 + scale), torch.addcmul(shift, offset, 1 + scale))


def _gradients(
    weight: Tensor, bias: Tensor, kernel: Tensor | None, dropout: float, wanted: tuple[bool, bool],
    grad: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, scale: Tensor | None, shift: Tensor | None, kept: Tensor | None,
) -> tuple[Rows, Rows]:  # fmt: skip
    """Of x, skip, scale and shift, and of weight, bias, kernel and its bias (`wanted`), from that of the output.

    With g the gradient of what goes into SiLU, all but the kernel's comes from two sums a channel, of g and of g x.
    """
    dtype, channels, x = x.dtype, x.shape[1], _joined(x, skip).float()
    slope, offset = _line(x, mean, rstd, weight, bias)
    whole, start = _modulated(slope, offset, scale, shift)
    before = torch.addcmul(start, x, whole)
    grad_kernel = grad_kernel_bias = None
    if kernel is not None:
        y = F.silu(before)
        y = y if kept is None else y.mul_(kept).mul_(1 / (1 - dropout))
        found, grad_kernel, grad_kernel_bias = convolution_backward(grad, y.to(kernel.dtype), kernel, (True, *wanted))
        grad = cast(Tensor, found)
        del y, found
    grad = grad.float() if kept is None else grad.float() * kept * (1 / (1 - dropout))
    grad = torch.ops.aten.silu_backward(grad, before)
    del before
    sums, products = grad.sum((2, 3)), (grad * x).sum((2, 3))  # (B, C)
    grad_scale = grad_shift = None
    if scale is not None:
        grad_shift = sums[..., None, None]
        grad_scale = slope * products[..., None, None] + offset * grad_shift
        film = (1 + scale)[..., 0, 0]
        sums, products = sums * film, products * film
    groups = mean.shape[1]
    own, with_x = ((weight * value).unflatten(1, (groups, -1)).sum(-1) for value in (sums, products))  # (B, groups)
    count = max(1, math.prod(x.shape[1:]) // groups)
    bend = rstd**3 * (mean * own - with_x) / count
    rest = -mean * bend - rstd * own / count
    grad_x = torch.addcmul(_channels(rest, x)[..., None, None], x, _channels(bend, x)[..., None, None]).addcmul_(grad, whole)
    grad_weight = (_channels(rstd, x) * (products - _channels(mean, x) * sums)).sum(0)
    grad_x = grad_x.to(dtype)
    # apart, for the gradient of a skip waits long, and would hold the memory of all channels
    first, behind = (grad_x, None) if skip is None else (_dense(grad_x[:, :channels]), _dense(grad_x[:, channels:]))
    return [first, behind, grad_scale, grad_shift], [grad_weight, sums.sum(0), grad_kernel, grad_kernel_bias]


def norm_silu(
    norm: GroupNorm32, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, conv: nn.Conv2d | None = None, dropout: float = 0.0,
    skip: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """silu((1 + scale) norm(x) + shift), then dropout and the convolution if given: half of a residual block, of which training keeps x alone.

    x (B, C, H, W); scale and shift (B, C, 1, 1), both or neither; conv 3x3 with padding 1; skip (B, C', H, W): further channels behind
    those of x, as if joined -> (B, C + C' or out, H, W) in the type of x.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler finds its own way
        parts = (None, None) if scale is None or shift is None else (scale.float(), shift.float())
        kernel, bias = (None, None) if conv is None else (conv.weight, conv.bias)
        if conv is not None and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            kernel, bias = (value if value is None else value.to(torch.get_autocast_dtype(x.device.type)) for value in (kernel, bias))
        with torch.autocast(x.device.type, enabled=False):
            return cast(Tensor, _NormSiLU.apply(x, skip, norm.weight.float(), norm.bias.float(), *parts, norm.num_groups, norm.eps, kernel, bias, dropout))
    y = norm(_joined(x, skip))
    if scale is not None and shift is not None:
        y = torch.addcmul(shift, y, 1 + scale)
    y = F.dropout(F.silu(y, inplace=not torch.is_grad_enabled()), dropout, training=dropout > 0)
    return y if conv is None else conv(y)
