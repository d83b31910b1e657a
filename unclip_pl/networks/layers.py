"""Parts that networks share: units, fp32 norms, timestep embedding, attention heads, zero initialisation (guided-diffusion's choices).

Attention takes tokens (B, N, heads, head width), context keys first, and one bool mask (True: visible) only where something is hidden.
"""

import math
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from unclip_pl.networks.recompute import recomputed

Module = TypeVar("Module", bound=nn.Module)


class Unit(nn.Module):
    """A part of a network that `run` computes at one go: its activations are computed again together, its weights gathered together (FSDP)."""

    entries: tuple[str, ...] = ()
    """Methods beside `forward` that use its weights and are called from outside."""


class LayerNorm32(nn.LayerNorm):
    """LayerNorm with statistics and weights in float32 whatever the input's type, which the output has again. (..., width) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with 32 groups whose statistics are float32 whatever the input's type, which the output has again. (B, C, ...) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return F.interpolate(grad * 0.25, scale_factor=2.0, mode="nearest")


def halved(x: Tensor) -> Tensor:
    """Means of 2x2 pixels: (B, C, 2H, 2W) -> (B, C, H, W). Unlike torch's, its gradient does not keep x."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.avg_pool2d(x, 2)
    return cast(Tensor, _Halved.apply(x))


def upsampled_conv(conv: nn.Conv2d, x: Tensor, checkpointing: bool = False) -> Tensor:
    """`conv` (3x3, padding 1) of x (B, C, H, W) made twice as large by nearest neighbour -> (B, out, 2H, 2W), from 4 products a pixel in place of 9.

    Enlarging is a transposed convolution with a 2x2 box, so both together are one with the box convolved by the turned kernel, 4x4; the large x is never made,
    and that kernel made again in the backward pass, unless all is (`checkpointing`).
    """

    def box(weight: Tensor) -> tuple[Tensor]:
        turned = weight.flip(2, 3)
        rows = F.pad(turned, (0, 0, 0, 1)) + F.pad(turned, (0, 0, 1, 0))
        return (F.pad(rows, (0, 1)) + F.pad(rows, (1, 0)),)  # sums in the weights' own type, also under autocast

    with recomputed(box, conv.weight, wanted=not checkpointing) as (kernel,):
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
