"""Layers that all networks share: norms in float32, timestep embedding, attention, zero init.

Attention takes tokens (B, N, heads, head_width) and one bool mask, True where a key is visible.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Block(nn.Module):
    """A repeated part of a network, such as a Transformer layer.

    Activation checkpointing, FSDP2 and regional compilation act on blocks; see `checkpointing.py`,
    `compilation.py` and `cluster/sharded.py`.
    """

    fsdp_methods: tuple[str, ...] = ()
    """Methods other than `forward` that use the block's weights and are called from outside."""
    compile_dynamic: bool | None = None
    """`dynamic` of torch.compile. False: compiled per shape, for blocks that differ in size."""


class LayerNorm32(nn.LayerNorm):
    """LayerNorm computed in float32 for inputs of any type. (..., width) -> the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with 32 groups, computed in float32. (B, C, ...) -> the input's type."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def zero_module(module: Module) -> Module:
    """The module with all parameters set to zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of t, cosines first (Vaswani et al. 2017, in guided-diffusion's order).

    (B,) int or float -> (B, width) float32; width must be even.
    """
    half = width // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention, softmax in float32.

    Most of torch's fused kernels have neither second nor forward-mode derivatives. A network that
    is to have them is called within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        q: (B, N, heads, head_width).
        k: (B, M, heads, head_width).
        v: (B, M, heads, head_width).
        mask: (B, M) bool, True where the key is visible; None: all. Each row needs one True.
        causal: the queries belong to the last N keys, and each sees the keys up to its own.

    Returns:
        (B, N, heads * head_width).
    """
    queries, keys = q.shape[1], k.shape[1]
    visible = None if mask is None else mask[:, None, None]  # (B, 1, 1, M)
    causal = causal and queries > 1
    if causal and (mask is not None or queries != keys):
        upto = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        visible = upto if visible is None else visible & upto
        causal = False
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
    return out.transpose(1, 2).flatten(2)
