"""The blocks of the ADM U-Net: residual block, attention over pixels and context, and both in one.

Images are NCHW. `emb` is the timestep embedding with all that is added to it, after its SiLU.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.layers import Block, GroupNorm32, attention, zero_module

Resample = Literal["none", "up", "down"]


class ResBlock(nn.Module):
    """Norm, SiLU, convolution; FiLM by the timestep; norm, SiLU, dropout, convolution; shortcut.

    Args:
        in_channels, out_channels: multiples of 32.
        emb_channels: width of `emb`.
        dropout: probability, before the second convolution.
        film: the timestep scales and shifts after the second norm (ADM); otherwise it is added
            before it (DDPM).
        resample: "up" doubles the side by nearest neighbour, "down" halves it by averages; both in
            front of the first convolution and on the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        film: bool = True,
        resample: Resample = "none",
    ) -> None:
        super().__init__()
        self.film = film
        self.resample = make_resample(resample)
        self.norm1 = GroupNorm32(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_channels, 2 * out_channels if film else out_channels)
        self.norm2 = GroupNorm32(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W')."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        emb = self.emb_proj(emb).to(h.dtype)[..., None, None]
        if self.film:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(self.resample(x)) + h


class Attention(nn.Module):
    """Residual self-attention over pixels; context tokens are further keys and values (GLIDE).

    Context keys come in front of the image's own, and one softmax covers both.
    """

    def __init__(self, channels: int, head_width: int, context_width: int = 0) -> None:
        super().__init__()
        self.heads = channels // head_width
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels) if context_width else None
        self.proj = zero_module(nn.Linear(channels, channels))

    def project_context(self, context: Tensor) -> Tensor:
        """(B, S, context_width) -> keys and values (B, S, 2, heads, head_width)."""
        assert self.context_kv is not None
        return self.context_kv(context).unflatten(-1, (2, self.heads, -1))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from every pixel.

        Args:
            x: (B, C, H, W).
            context: (B, S, context_width), or the result of `project_context`.
            mask: (B, S) bool, True where the context token is visible; None: all.

        Returns:
            (B, C, H, W).
        """
        pixels = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C)
        q, k, v = self.qkv(pixels).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if context is not None:
            context_kv = context if context.dim() == 5 else self.project_context(context)
            context_k, context_v = context_kv.to(k.dtype).unbind(2)
            k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)
            mask = None if mask is None else F.pad(mask, (0, pixels.shape[1]), value=True)
        out = self.proj(attention(q, k, v, mask))
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class UNetBlock(Block):
    """What lies between two skip connections of the U-Net.

    It is a ResBlock, then attention and a second ResBlock if there are any.
    """

    fsdp_methods = ("project_context",)
    compile_dynamic = False

    def __init__(
        self, res1: ResBlock, attention: Attention | None = None, res2: ResBlock | None = None
    ) -> None:
        super().__init__()
        self.res1, self.attention, self.res2 = res1, attention, res2

    def project_context(self, context: Tensor) -> Tensor:
        """Keys and values of the context for the attention, which there must be."""
        assert self.attention is not None
        return self.attention.project_context(context)

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None,
        emb: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W); skip (B, C', H, W), joined behind x; the rest as in the parts."""
        h = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.res1(h, emb)
        if self.attention is not None:
            h = self.attention(h, context, mask)
        return h if self.res2 is None else self.res2(h, emb)


def make_resample(kind: Resample) -> nn.Module:
    """A module without weights that doubles or halves the side of images, or leaves them."""
    if kind == "up":
        return nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.AvgPool2d(2) if kind == "down" else nn.Identity()
