"""The ADM U-Net (Dhariwal and Nichol 2021) with GLIDE's context attention and unCLIP's two ways in for a CLIP embedding (section 2.1).

Images NCHW, best in channels_last memory; context keys stand before the image's own; Karlo's decoder and ADM are configurations of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.layers import GroupNorm32, Unit, attend, halved, run, timestep_embedding, upsampled_conv, zero_module
from unclip_pl.networks.norm_silu import norm_silu
from unclip_pl.networks.recompute import recomputed
from unclip_pl.networks.winograd import Conv3x3


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net. Feature maps have sides image_size / patch_size / 2^level."""

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 6
    """Six: eps (or x0, v) and the learned variance."""
    width: int = 128
    """Channels at the top; a level has width * mult."""
    mults: tuple[int, ...] = (1, 2, 3, 4)
    depth: int = 3
    """Residual blocks a level on the way down; one more on the way up."""
    attention: tuple[int, ...] = (32, 16, 8)
    """Sides of feature maps that get attention; those that do not occur are ignored, () is none."""
    head_width: int = 64
    dropout: float = 0.1
    embed_dim: int = 0
    """Width of the CLIP image embedding, added to the time; 0: none."""
    embed_tokens: int = 4
    """Context tokens made of the embedding, in front of the others (if there is context_width)."""
    context_width: int = 0
    """Width of the context tokens; 0: no context."""
    low_res_channels: int = 0
    """Upsamplers: channels of the image concatenated to the input; 0: none."""
    scale_shift: bool = True
    """The time scales and shifts the second norm (FiLM); False: it is added before it."""
    patch_size: int = 1
    """Space to depth at the door, depth to space at the exit (simple diffusion, Hoogeboom et al. 2023): 2 is four times cheaper."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    middle_attention: bool = True

    def __post_init__(self) -> None:
        smallest = self.patch_size * 2 ** (len(self.mults) - 1)
        if min(self.image_size, self.width, self.depth, self.patch_size, self.head_width, *self.mults, 1) < 1 or not self.mults:
            raise ValueError("UNetConfig needs image_size, width, depth, patch_size, head_width and mults of at least 1.")
        if self.image_size % smallest:
            raise ValueError(f"UNetConfig.image_size {self.image_size} must be a multiple of {smallest} = patch_size * 2^(levels - 1).")
        if any(channels % 32 for channels in self.channels):
            raise ValueError(f"UNetConfig.width * mults gives {self.channels} channels: each must be a multiple of 32 for GroupNorm.")
        attended = {c for c, side in zip(self.channels, self.sides) if side in self.attention}
        attended |= {self.channels[-1]} if self.middle_attention else set()
        if bad := [channels for channels in sorted(attended) if channels % self.head_width]:
            raise ValueError(f"UNetConfig.head_width {self.head_width} must divide the channels of all attention layers, here {bad}.")
        if self.context_width and not attended:
            raise ValueError("UNetConfig has context_width and no attention to read it: set attention or middle_attention, or context_width 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"UNetConfig.dropout is {self.dropout}: it must be at least 0 and below 1.")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.width * mult for mult in self.mults)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the feature map of each level."""
        return tuple(self.image_size // self.patch_size // 2**level for level in range(len(self.mults)))


class EncodedContext(NamedTuple):
    """Conditions as the layers use them, the same for all timesteps: what `UNet.encode_context` returns."""

    added: Tensor | None
    """(B, 4 width), added to the time embedding."""
    keys_values: tuple[Tensor, ...] | Tensor | None
    """(B, S, 2, heads, head width) for each attention layer; or (B, S, context_width), not yet projected."""
    mask: Tensor | None
    """(B, S) bool."""


class ResBlock(nn.Module):
    """GN-SiLU-conv, FiLM, GN-SiLU-dropout-conv and a shortcut; `resize` 2 or 0.5 scales both paths before the first conv."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, resize: float = 1) -> None:
        super().__init__()
        self.resize, self.scale_shift, self.dropout, self.checkpointing = resize, config.scale_shift, config.dropout, config.checkpointing
        self.norm1 = GroupNorm32(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time = nn.Linear(4 * config.width, (2 if config.scale_shift else 1) * out_channels)
        self.norm2 = GroupNorm32(out_channels)
        self.conv2 = zero_module(Conv3x3(out_channels, out_channels))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == 1:
            return x
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resize > 1 else halved(x)

    def _short(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if skip is None:
            return self.shortcut(self._resized(x))
        shortcut = cast(nn.Conv2d, self.shortcut)  # with a skip, more channels come in than go out
        for_x, for_skip = shortcut.weight.split((x.shape[1], skip.shape[1]), dim=1)
        return F.conv2d(x, for_x, shortcut.bias) + F.conv2d(skip, for_skip)

    def forward(self, x: Tensor, time: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), time (B, 4 width) after SiLU, skip (B, C', H, W), channels behind those of x, without resizing -> (B, out, H', W')."""
        short = self._short(x, skip)  # first, and so last in the backward pass, where its gradient would lie beside the rest
        if self.resize == 1:
            h = norm_silu(self.norm1, x, conv=self.conv1, skip=skip)
        else:
            h = norm_silu(self.norm1, x)
            h = upsampled_conv(self.conv1, h, self.checkpointing) if self.resize > 1 else self.conv1(self._resized(h))
        time = self.time(time).to(h.dtype)[..., None, None]
        scale, shift = time.chunk(2, dim=1) if self.scale_shift else (None, None)
        h = norm_silu(self.norm2, h if self.scale_shift else h + time, scale, shift, self.conv2, self.dropout if self.training else 0.0)
        return short + h


class Attention(nn.Module):
    """Residual self-attention over pixels with context tokens as further keys and values, in front; one softmax over both (GLIDE)."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads, self.checkpointing = channels // config.head_width, config.checkpointing
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context = nn.Linear(config.context_width, 2 * channels) if config.context_width else None
        self.proj = zero_module(nn.Linear(channels, channels))

    def project(self, context: Tensor) -> Tensor:
        """(B, S, context_width) -> keys and values (B, S, 2, heads, head width)."""
        return cast(nn.Linear, self.context)(context).unflatten(-1, (2, self.heads, -1))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); context (B, S, context_width), or projected; mask (B, S) bool -> (B, C, H, W)."""
        before = None if context is None else context if context.dim() == 5 else self.project(context)
        mask = None if mask is None or before is None else F.pad(mask, (0, x.shape[2:].numel()), value=True)

        def project(x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            pixels = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C): a view if channels_last
            qkv = self.qkv(pixels).unflatten(-1, (3, self.heads, -1))
            q, kv = qkv.split((1, 2), dim=2)
            return pixels, q, kv if before is None else torch.cat([before.to(kv.dtype), kv], dim=1)

        with recomputed(project, x, before, wanted=not self.checkpointing) as (_, q, kv):
            out = attend(q.squeeze(2), kv, mask)
        return x + self.proj(out).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Layer(Unit):
    """What one skip connection leads to: a ResBlock, attention if any, a second ResBlock if any (middle, or upsampling)."""

    entries = ("project",)

    def __init__(self, block: ResBlock, attention: Attention | None = None, last: ResBlock | None = None) -> None:
        super().__init__()
        self.block, self.attention, self.last = block, attention, last

    def project(self, context: Tensor) -> Tensor:
        """Keys and values of the context for the attention, which there must be; see `Attention.project`."""
        return cast(Attention, self.attention).project(context)

    def forward(self, x: Tensor, skip: Tensor | None, time: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.block(x, time, skip)
        if self.attention is not None:
            h = self.attention(h, context, mask)
        return h if self.last is None else self.last(h, time)


class UNet(nn.Module):
    """Predicts eps (or x0, v; and the variance) from a noised image, the timestep and conditions."""

    down: Sequence[Layer]
    up: Sequence[Layer]

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, patch = config.width, config.channels, config.patch_size**2
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        if config.embed_dim:
            self.embed_time = nn.Linear(config.embed_dim, 4 * width)
            if config.context_width and config.embed_tokens:
                self.embed_context = nn.Linear(config.embed_dim, config.embed_tokens * config.context_width)
        self.enter = nn.Conv2d((config.in_channels + config.low_res_channels) * patch, width, 3, padding=1)

        def attention(level: int) -> Attention | None:
            return Attention(config, channels[level]) if config.sides[level] in config.attention else None

        down, skips, now = [], [width], width
        for level, out in enumerate(channels):
            for _ in range(config.depth):
                down.append(Layer(ResBlock(config, now, out), attention(level)))
                skips.append(now := out)
            if level < len(channels) - 1:
                down.append(Layer(ResBlock(config, out, out, resize=0.5)))
                skips.append(out)
        middle = Attention(config, now) if config.middle_attention else None
        up = []
        for level, out in reversed(list(enumerate(channels))):
            for i in range(config.depth + 1):
                resize = ResBlock(config, out, out, resize=2) if level and i == config.depth else None
                up.append(Layer(ResBlock(config, now + skips.pop(), out), attention(level), resize))
                now = out
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)  # type: ignore[assignment]  # ModuleList's types do not know what it holds
        self.middle = Layer(ResBlock(config, channels[-1], channels[-1]), middle, ResBlock(config, channels[-1], channels[-1]))
        self.norm = GroupNorm32(width)
        self.exit = zero_module(nn.Conv2d(width, config.out_channels * patch, 3, padding=1))

    def _layers(self) -> Iterator[Layer]:
        yield from self.down
        yield self.middle
        yield from self.up

    def _conditions(self, embed: Tensor | None, pooled: Tensor | None, context: Tensor | None, mask: Tensor | None) -> EncodedContext:
        """What is added to the time, and the context with the embedding's tokens in front."""
        config = self.config
        if bool(config.embed_dim) != (embed is not None):
            raise ValueError(f"UNet has embed_dim {config.embed_dim} and was {'not ' if embed is None else ''}given `embed`: change one of them.")
        if context is not None and not config.context_width:
            raise ValueError("UNet was given `context` and has context_width 0: set it to the width of the context tokens.")
        added = pooled
        if embed is not None:
            added = self.embed_time(embed) if pooled is None else self.embed_time(embed) + pooled
        if hasattr(self, "embed_context"):
            tokens = self.embed_context(embed).unflatten(-1, (-1, config.embed_tokens)).transpose(1, 2)  # Karlo: the token index is fastest
            mask = None if mask is None else F.pad(mask, (config.embed_tokens, 0), value=True)
            context = tokens if context is None else torch.cat([tokens, context.to(tokens.dtype)], dim=1)
        if config.context_width and context is None:
            raise ValueError(f"UNet has context_width {config.context_width} and was given no `context`: give it, or set context_width 0.")
        return EncodedContext(added, context, mask)

    def encode_context(
        self, *, embed: Tensor | None = None, pooled: Tensor | None = None, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> EncodedContext:
        """All that does not change over a sampling run, keys and values of every attention layer included; arguments as of `forward`.

        `unet(x, t, encoded=unet.encode_context(...))` equals `unet(x, t, ...)` and projects the context once, not at each step.
        """
        found = self._conditions(embed, pooled, context, context_mask)
        if not isinstance(found.keys_values, Tensor):
            return found
        layers = (layer for layer in self._layers() if layer.attention is not None)
        return found._replace(keys_values=tuple(layer.project(found.keys_values) for layer in layers))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        embed: Tensor | None = None,
        pooled: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        low_res: Tensor | None = None,
        encoded: EncodedContext | None = None,
    ) -> Tensor:
        """One denoising step.

        Args:
            x: (B, in_channels, H, W), about [-1, 1] plus noise; H and W multiples of patch_size * 2^(levels - 1).
            t: (B,) int64, indices of the original schedule.
            embed: (B, embed_dim), the CLIP image embedding on the network's scale.
            pooled: (B, 4 width), added to the time embedding.
            context: (B, S, context_width); the embedding's tokens come in front of it and are always visible.
            context_mask: (B, S) bool, True where the token may be seen; None: all.
            low_res: (B, low_res_channels, H, W) in [-1, 1], already at the size of x.
            encoded: the result of `encode_context`, in the place of the four conditions above.

        Returns:
            (B, out_channels, H, W) in the type of x.

        Raises:
            ValueError: conditions that the config does not have, or lacks.
        """
        config, dtype = self.config, x.dtype
        if bool(config.low_res_channels) != (low_res is not None):
            raise ValueError(f"UNet has low_res_channels {config.low_res_channels} and was {'not ' if low_res is None else ''}given `low_res`.")
        encoded = self._conditions(embed, pooled, context, context_mask) if encoded is None else encoded
        time = self.time(timestep_embedding(t, config.width).to(dtype))
        time = F.silu(time if encoded.added is None else time + encoded.added)

        def apply(layer: Layer, x: Tensor, skip: Tensor | None = None) -> Tensor:
            context = None if layer.attention is None else next(contexts) if projected else encoded.keys_values
            return run(layer, config.checkpointing and self.training, x, skip, time, context, encoded.mask)

        projected = isinstance(encoded.keys_values, tuple)
        contexts = iter(encoded.keys_values if isinstance(encoded.keys_values, tuple) else ())

        x = x if low_res is None else torch.cat([x, low_res.to(dtype)], dim=1)
        x = F.pixel_unshuffle(x, config.patch_size) if config.patch_size > 1 else x
        skips = [x := self.enter(x.contiguous(memory_format=torch.channels_last))]  # all that follows has it too
        for layer in self.down:
            skips.append(x := apply(layer, x))
        x = apply(self.middle, x)
        for layer in self.up:
            x = apply(layer, x, skips.pop())
        x = norm_silu(self.norm, x, conv=self.exit)
        return (F.pixel_shuffle(x, config.patch_size) if config.patch_size > 1 else x).to(dtype)
