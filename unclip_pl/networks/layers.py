"""Parts that networks share: units, fp32 norms, timestep embedding, attention heads, zero initialisation (guided-diffusion's choices).

Attention takes tokens (B, N, heads, head width), context keys first, and one bool mask (True: visible) only where something is hidden.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from unclip_pl.networks import formulas
from unclip_pl.networks.winograd import convolution, convolution_backward

Module = TypeVar("Module", bound=nn.Module)


class Unit(nn.Module):
    """A part of a network that `run` computes at one go: its activations are computed again together, its weights gathered together (FSDP)."""

    entries: tuple[str, ...] = ()
    """Methods beside `forward` that use its weights and are called from outside."""


class LayerNorm32(nn.LayerNorm):
    """LayerNorm with statistics and weights in float32 whatever the input's type, which the output has again. (..., width) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


NATIVE = ("cpu", "meta")
"""Devices whose GroupNorm takes maps in channels_last as they are: training works with it there, and on others with that of `formulas`."""


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with 32 groups whose statistics are float32 whatever the input's type, which the output has again. (B, C, ...) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps, in the order (NCHW or channels last) of `like`, or its own: kernels that are called directly do not look."""
    like = x if like is None else like
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


PART = 2**20
"""Numbers of a feature map that a CPU works on together where a map is larger: of what comes and goes meanwhile little is needed, and caches hold it."""


def _parts(x: Tensor) -> list[slice]:
    """Samples of x (B, ...), as many together as `PART` allows."""
    each = max(1, PART // max(1, x[0].numel())) if x.device.type == "cpu" and len(x) else max(1, len(x))
    return [slice(i, i + each) for i in range(0, len(x), each)] or [slice(0)]


def _of(some: slice, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor[some] for tensor in tensors]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Of some samples -> of all; None of None."""
    return parts[0] if parts[0] is None or len(parts) == 1 else torch.cat(cast(list[Tensor], list(parts)))


class _NormSiLU(torch.autograd.Function):
    """conv(dropout(silu((1 + scale) GN(x) + shift))), all but the convolution in float32, or without one: of all its stages it keeps x and the statistics.

    What the convolution was given is computed again in the backward pass, from one multiplication, one addition and one SiLU an element.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
        kernel: Tensor | None, kernel_bias: Tensor | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        found = []
        for some in _parts(x):
            part, a, b = _of(some, x, scale, shift)
            size, channels, *sides = part.shape
            y, *statistics = torch.native_group_norm(dense(part.float()), weight, bias, size, channels, math.prod(sides), groups, eps)
            if scale is not None:
                y = torch.addcmul(b, y, 1 + a)
            y, kept = torch.native_dropout(F.silu(y, inplace=True), dropout, True) if dropout else (F.silu(y, inplace=True), None)
            found.append((y.to(x.dtype) if kernel is None else convolution(y.to(kernel.dtype), kernel, kernel_bias), *statistics, kept))
        out, mean, rstd, kept = map(_joined, zip(*found))
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd, kernel, kept)
        ctx.groups, ctx.dropout = groups, dropout
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, mean, rstd, kernel, kept = ctx.saved_tensors
        found = [
            _NormSiLU._part(ctx.groups, ctx.dropout, ctx.needs_input_grad[7:9], weight, bias, kernel, *_of(some, grad, x, scale, shift, mean, rstd, kept))
            for some in _parts(x)
        ]
        grad_x, grad_scale, grad_shift, *shares = zip(*found)
        grad_weight, grad_bias, grad_kernel, grad_kernel_bias = (None if share[0] is None else functools.reduce(torch.add, share) for share in shares)
        return (
            _joined(grad_x), grad_weight, grad_bias, _joined(grad_scale), _joined(grad_shift), None, None, grad_kernel, grad_kernel_bias, None
        )  # fmt: skip

    @staticmethod
    def _part(
        groups: int, dropout: float, wanted: Sequence[bool], weight: Tensor, bias: Tensor, kernel: Tensor | None,
        grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, kept: Tensor | None,
    ) -> list[Tensor | None]:  # fmt: skip
        """For some samples the gradients of x, scale and shift, and their shares of those of the norm's weight and bias, the kernel and its bias."""
        size, channels, *sides = x.shape
        slope = rstd.repeat_interleave(channels // groups, 1) * weight  # GN(x) = slope x + offset, (B, C)
        offset = bias - mean.repeat_interleave(channels // groups, 1) * slope
        slope, offset = slope[..., None, None], offset[..., None, None]
        film = None if scale is None else 1 + scale
        dtype, x = x.dtype, x.float()
        before = torch.addcmul(offset, x, slope) if film is None or shift is None else torch.addcmul(torch.addcmul(shift, offset, film), x, slope * film)
        grad_kernel = grad_kernel_bias = None
        if kernel is not None:
            y = F.silu(before) if kept is None else torch.ops.aten.native_dropout_backward(F.silu(before), kept, 1 / (1 - dropout))
            found, grad_kernel, grad_kernel_bias = convolution_backward(grad, y.to(kernel.dtype), kernel, (True, *wanted))
            grad = cast(Tensor, found)
            del y
        grad = grad.float() if kept is None else torch.ops.aten.native_dropout_backward(grad.float(), kept, 1 / (1 - dropout))
        grad = torch.ops.aten.silu_backward(grad, before)
        del before
        grad_scale = grad_shift = None
        if film is not None:
            grad_shift = grad.sum((2, 3), keepdim=True)
            grad_scale = slope * (grad * x).sum((2, 3), keepdim=True) + offset * grad_shift
            grad *= film
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
            dense(grad, x), dense(x), mean, rstd, weight, size, channels, math.prod(sides), groups, [True, True, True]
        )
        return [grad_x.to(dtype), grad_scale, grad_shift, grad_weight, grad_bias, grad_kernel, grad_kernel_bias]


def norm_silu(
    norm: GroupNorm32, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, conv: nn.Conv2d | None = None, dropout: float = 0.0
) -> Tensor:
    """silu((1 + scale) norm(x) + shift), then dropout and the convolution if given: half of a residual block, of which training keeps x alone.

    x (B, C, H, W); scale and shift (B, C, 1, 1), both or neither; conv 3x3 with padding 1 -> (B, C or out, H, W) in the type of x.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler finds its own way
        parts = (None, None) if scale is None or shift is None else (scale.float(), shift.float())
        kernel, bias = (None, None) if conv is None else (conv.weight, conv.bias)
        if conv is not None and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            kernel, bias = (value if value is None else value.to(torch.get_autocast_dtype(x.device.type)) for value in (kernel, bias))
        function = _NormSiLU if x.device.type in NATIVE else formulas.NormSiLU
        with torch.autocast(x.device.type, enabled=False):
            return function.apply(x, norm.weight.float(), norm.bias.float(), *parts, norm.num_groups, norm.eps, kernel, bias, dropout)
    y = norm(x)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift, y, 1 + scale)
    y = F.dropout(F.silu(y, inplace=not torch.is_grad_enabled()), dropout, training=dropout > 0)
    return y if conv is None else conv(y)


def upsampled_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` (3x3, padding 1) of x (B, C, H, W) made twice as large by nearest neighbour -> (B, out, 2H, 2W), from 4 products a pixel in place of 9.

    Enlarging is a transposed convolution with a 2x2 box, so both together are one with the box convolved by the turned kernel, 4x4; the large x is never made.
    """
    turned = conv.weight.flip(2, 3)
    rows = F.pad(turned, (0, 0, 0, 1)) + F.pad(turned, (0, 0, 1, 0))
    kernel = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))  # sums in the weights' own type, also under autocast
    return F.conv_transpose2d(x, kernel.transpose(0, 1), conv.bias, stride=2, padding=1)


def zero_module(module: Module) -> Module:
    """The module with all its parameters set to zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of t, cosines first (Vaswani et al. 2017 in guided-diffusion's order). (B,) int or float -> (B, width) float32; width even."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(max_period) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q: Tensor, kv: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, softmax in float32.

    Args:
        q: (B, N, heads, head width).
        kv: (B, M, 2, heads, head width), keys and values.
        mask: (B, M) bool, True where the key may be seen; None: all. Each row needs one True.
        causal: the queries belong to the last N keys, and each sees the keys up to its own.

    Returns:
        (B, N, heads * head width).
    """
    visible = None if mask is None else mask[:, None, None]  # (B, 1, 1, M)
    queries, keys = q.shape[1], kv.shape[1]
    if causal and queries > 1 and (mask is not None or queries != keys):
        upto = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        visible, causal = upto if visible is None else visible & upto, False
    causal = causal and queries > 1
    cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False) if cpu else nullcontext():  # on CPUs the backward pass of bfloat16 is 4 times as slow
        q, (k, v) = (q.float(), kv.float().unbind(2)) if cpu else (q, kv.unbind(2))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, is_causal=causal)
    out = out.bfloat16() if cpu else out
    return out.transpose(1, 2).flatten(2)


def run(module: nn.Module, checkpointing: bool, *inputs: Any) -> Any:
    """`module(*inputs)`; with `checkpointing`, and where a gradient is wanted, its activations are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)
