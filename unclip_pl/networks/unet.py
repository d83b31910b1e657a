"""The ADM U-Net (Dhariwal and Nichol 2021) with GLIDE's context attention and unCLIP's conditions.

A CLIP image embedding enters twice (unCLIP section 2.1): added to the timestep embedding, and as
extra context tokens. For small data it may enter as a thumbnail as well. Karlo's decoder, ADM and
the upsamplers are configurations of this network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.blocks import Attention, Resample, ResBlock, UNetBlock
from unclip_pl.networks.checkpointing import Checkpointing, apply_checkpointing
from unclip_pl.networks.layers import GroupNorm32, timestep_embedding, zero_module
from unclip_pl.networks.thumbnail import Thumbnail
from unclip_pl.utils.choices import check_choices, check_least


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
    """Residual blocks per level on the way down; one more on the way up."""
    attention: tuple[int, ...] = (32, 16, 8)
    """Sides of feature maps that get attention; those that do not occur are ignored, () is none."""
    head_width: int = 64
    dropout: float = 0.1
    embed_dim: int = 0
    """Width of the CLIP image embedding, added to the timestep embedding; 0: none."""
    embed_tokens: int = 4
    """Context tokens made of the embedding, in front of the others (if there is context_width)."""
    context_width: int = 0
    """Width of the context tokens; 0: no context."""
    low_res_channels: int = 0
    """Upsamplers: channels of the image concatenated to the input; 0: none."""
    thumbnail: int = 0
    """Side of a small image that an MLP guesses from the embedding, enlarged and concatenated to
    the input (`networks/thumbnail.py`); 0: none, as in the paper. No gradient of the output passes
    through it, neither to the MLP nor to the embedding."""
    thumbnail_width: int = 384
    """Width of that MLP."""
    scale_shift: bool = True
    """The timestep scales and shifts the second norm (FiLM); False: it is added before it."""
    patch_size: int = 1
    """Space to depth before the first layer and back after the last one (simple diffusion,
    Hoogeboom et al. 2023): 2 is four times cheaper."""
    checkpointing: Checkpointing = "none"
    """Activations that training computes again in the backward pass to save memory: "none",
    "selective" (cheap operations) or "full" (whole blocks)."""
    middle_attention: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 1, "in_channels", "out_channels")
        check_least(self, 0, "embed_dim", "embed_tokens", "context_width", "low_res_channels")
        smallest = self.patch_size * 2 ** (len(self.mults) - 1)
        sizes = self.image_size, self.width, self.depth, self.patch_size, self.head_width
        if not self.mults or min(*sizes, *self.mults) < 1:
            raise ValueError(
                "UNetConfig needs image_size, width, depth, patch_size, head_width and mults of "
                "at least 1."
            )
        if self.image_size % smallest:
            raise ValueError(
                f"UNetConfig.image_size {self.image_size} must be a multiple of {smallest} = "
                "patch_size * 2^(levels - 1)."
            )
        if any(channels % 32 for channels in self.channels):
            raise ValueError(
                f"UNetConfig.width * mults gives {self.channels} channels: each must be a multiple "
                "of 32 for GroupNorm."
            )
        attended = {c for c, side in zip(self.channels, self.sides) if side in self.attention}
        attended |= {self.channels[-1]} if self.middle_attention else set()
        if bad := [channels for channels in sorted(attended) if channels % self.head_width]:
            raise ValueError(
                f"UNetConfig.head_width {self.head_width} must divide the channels of all "
                f"attention layers, here {bad}."
            )
        if self.context_width and not attended:
            raise ValueError(
                "UNetConfig has context_width and no attention to read it: set attention or "
                "middle_attention, or context_width 0."
            )
        check_least(self, 0, "thumbnail")
        if self.thumbnail and (
            not self.embed_dim or self.image_size % self.thumbnail or self.thumbnail_width < 1
        ):
            raise ValueError(
                f"UNetConfig.thumbnail is {self.thumbnail}: it needs an embedding (embed_dim), an "
                f"image_size that it divides (here {self.image_size}) and a thumbnail_width of at "
                "least 1; or set it to 0."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"UNetConfig.dropout is {self.dropout}: it must be at least 0 and below 1."
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.width * mult for mult in self.mults)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the feature map of each level."""
        side = self.image_size // self.patch_size
        return tuple(side // 2**level for level in range(len(self.mults)))


class EncodedContext(NamedTuple):
    """Conditions as the layers use them, the same for all timesteps: see `UNet.encode_context`."""

    emb: Tensor | None
    """(B, 4 width), added to the timestep embedding."""
    context: tuple[Tensor, ...] | Tensor | None
    """Keys and values (B, S, 2, heads, head_width) for each attention layer in the order of the
    forward pass; or (B, S, context_width), not yet projected."""
    mask: Tensor | None
    """(B, S) bool, True where the token is visible; None: all."""
    thumbnail: Tensor | None = None
    """(B, in_channels, s, s), the first guess of the image; None: the config has none."""


class UNet(nn.Module):
    """Predicts eps (or x0, v; and the variance) from a noised image, timestep and conditions.

    Feature maps have the memory format of the images and weights, channels_last if either has it.
    """

    down_blocks: Sequence[UNetBlock]
    up_blocks: Sequence[UNetBlock]

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, patch = config.width, config.channels, config.patch_size**2
        emb_width = 4 * width
        self.time_embed = nn.Sequential(
            nn.Linear(width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width)
        )
        if config.embed_dim:
            self.clip_to_time = nn.Linear(config.embed_dim, emb_width)
        tokens_width = config.embed_tokens * config.context_width
        has_tokens = config.embed_dim and tokens_width
        self.clip_to_tokens = nn.Linear(config.embed_dim, tokens_width) if has_tokens else None
        in_channels = config.in_channels + config.low_res_channels
        self.clip_to_thumbnail = None
        if config.thumbnail:
            self.clip_to_thumbnail = Thumbnail(
                config.embed_dim, config.in_channels, config.thumbnail, config.thumbnail_width
            )
            in_channels += config.in_channels
        self.conv_in = nn.Conv2d(in_channels * patch, width, 3, padding=1)

        def res_block(in_channels: int, out_channels: int, resample: Resample = "none") -> ResBlock:
            film, dropout = config.scale_shift, config.dropout
            return ResBlock(in_channels, out_channels, emb_width, dropout, film, resample)

        def attention(level: int) -> Attention | None:
            if config.sides[level] not in config.attention:
                return None
            return Attention(channels[level], config.head_width, config.context_width)

        down, skips, current = [], [width], width
        for level, out in enumerate(channels):
            for _ in range(config.depth):
                down.append(UNetBlock(res_block(current, out), attention(level)))
                current = out
                skips.append(current)
            if level < len(channels) - 1:
                down.append(UNetBlock(res_block(out, out, resample="down")))
                skips.append(out)

        up = []
        for level, out in reversed(list(enumerate(channels))):
            for i in range(config.depth + 1):
                last = level > 0 and i == config.depth
                upsample = res_block(out, out, resample="up") if last else None
                res = res_block(current + skips.pop(), out)
                up.append(UNetBlock(res, attention(level), upsample))
                current = out

        self.down_blocks = nn.ModuleList(down)  # type: ignore[assignment]
        self.up_blocks = nn.ModuleList(up)  # type: ignore[assignment]
        # Registered last: optimiser states in checkpoints follow the order of parameters.
        deepest = channels[-1]
        middle = None
        if config.middle_attention:
            middle = Attention(deepest, config.head_width, config.context_width)
        self.middle_block = UNetBlock(
            res_block(deepest, deepest), middle, res_block(deepest, deepest)
        )
        self.norm_out = GroupNorm32(width)
        self.conv_out = zero_module(nn.Conv2d(width, config.out_channels * patch, 3, padding=1))
        apply_checkpointing(self, config.checkpointing)

    def _attention_blocks(self) -> Iterator[UNetBlock]:
        blocks = chain(self.down_blocks, [self.middle_block], self.up_blocks)
        return (block for block in blocks if block.attention is not None)

    def _conditions(
        self,
        embed: Tensor | None,
        pooled: Tensor | None,
        context: Tensor | None,
        mask: Tensor | None,
    ) -> EncodedContext:
        """What is added to the time, and the context with the embedding's tokens in front."""
        config = self.config
        if bool(config.embed_dim) != (embed is not None):
            got = "got no" if embed is None else "got an"
            raise ValueError(
                f"UNet has embed_dim {config.embed_dim} and {got} `embed`: change one of them."
            )
        if context is not None and not config.context_width:
            raise ValueError(
                "UNet got a `context` and has context_width 0: set it to the width of the context "
                "tokens."
            )
        emb = pooled
        if embed is not None:
            emb = self.clip_to_time(embed)
            emb = emb if pooled is None else emb + pooled
        if self.clip_to_tokens is not None:
            # (B, context_width * tokens), the token index fastest, as in Karlo
            tokens = self.clip_to_tokens(embed).unflatten(-1, (-1, config.embed_tokens))
            tokens = tokens.transpose(1, 2)
            if mask is not None:
                mask = F.pad(mask, (config.embed_tokens, 0), value=True)
            if context is not None:
                context = torch.cat([tokens, context.to(tokens.dtype)], dim=1)
            else:
                context = tokens
        if config.context_width and context is None:
            raise ValueError(
                f"UNet has context_width {config.context_width} and got no `context`: give it, or "
                "set context_width 0."
            )
        thumbnail = None
        if self.clip_to_thumbnail is not None and embed is not None:
            thumbnail = self.clip_to_thumbnail(embed).detach()  # learns by its own loss only
        return EncodedContext(emb, context, mask, thumbnail)

    def encode_context(
        self,
        *,
        embed: Tensor | None = None,
        pooled: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> EncodedContext:
        """All that does not change over a sampling run, including keys and values of the context.

        `unet(x, t, encoded=unet.encode_context(...))` equals `unet(x, t, ...)` and projects the
        context once, not at each step. Arguments as in `forward`.
        """
        encoded = self._conditions(embed, pooled, context, context_mask)
        if not isinstance(encoded.context, Tensor):
            return encoded
        blocks = self._attention_blocks()
        projected = tuple(block.project_context(encoded.context) for block in blocks)
        return encoded._replace(context=projected)

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
            x: (B, in_channels, H, W), about [-1, 1] plus noise; H and W multiples of
                patch_size * 2^(levels - 1).
            t: (B,) int64, indices of the original schedule.
            embed: (B, embed_dim), the CLIP image embedding on the network's scale.
            pooled: (B, 4 width), added to the timestep embedding.
            context: (B, S, context_width); the embedding's tokens come in front of it and are
                always visible.
            context_mask: (B, S) bool, True where the token is visible; None: all.
            low_res: (B, low_res_channels, H, W) in [-1, 1], already at the size of x.
            encoded: the result of `encode_context`, instead of the four conditions above.

        Returns:
            (B, out_channels, H, W) in the type of x.

        Raises:
            ValueError: conditions that the config does not have, or lacks.
        """
        config, dtype = self.config, x.dtype
        if bool(config.low_res_channels) != (low_res is not None):
            got = "got no" if low_res is None else "got a"
            raise ValueError(
                f"UNet has low_res_channels {config.low_res_channels} and {got} `low_res`: change "
                "one of them."
            )
        if encoded is None:
            encoded = self._conditions(embed, pooled, context, context_mask)
        emb = self.time_embed(timestep_embedding(t, config.width).to(dtype))
        emb = F.silu(emb if encoded.emb is None else emb + encoded.emb)
        contexts, mask = self._context_of_blocks(encoded.context), encoded.mask

        def run(block: UNetBlock, x: Tensor, skip: Tensor | None = None) -> Tensor:
            return block(x, skip, emb, context=contexts.get(block), mask=mask)

        if low_res is not None:
            x = torch.cat([x, low_res.to(dtype)], dim=1)
        if encoded.thumbnail is not None:
            thumbnail = encoded.thumbnail.to(dtype, memory_format=torch.channels_last)  # as images
            enlarged = F.interpolate(thumbnail, x.shape[-2:], mode="bilinear")
            x = torch.cat([x, enlarged], dim=1)
        if config.patch_size > 1:
            x = F.pixel_unshuffle(x, config.patch_size)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.up_blocks:
            x = run(block, x, skips.pop())
        x = self.conv_out(F.silu(self.norm_out(x)))
        if config.patch_size > 1:
            x = F.pixel_shuffle(x, config.patch_size)
        return x.to(dtype)

    def _context_of_blocks(
        self, context: tuple[Tensor, ...] | Tensor | None
    ) -> dict[UNetBlock, Tensor]:
        """The context as each block with attention takes it."""
        if context is None:
            return {}
        blocks = list(self._attention_blocks())
        if isinstance(context, Tensor):
            return dict.fromkeys(blocks, context)
        return dict(zip(blocks, context))
