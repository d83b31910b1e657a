"""Forward operations of one sample by formula, for MFU.

A multiply-add is two operations. Matrix products, convolutions and attention count (half of the
square if it is causal). What is computed again does not count, and neither do norms, activations,
optimiser and EMA, although they take time.
"""

from typing import Any

from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler


def forward_flops(stage: Any, side: int | None = None) -> float:
    """Operations of the loss of one sample, without the backward pass.

    Args:
        stage: of this package.
        side: of an upsampler's images in pixels; None: the side that its network draws.
    """
    net = stage.net_config
    if isinstance(stage, Upsampler):
        return unet(net, 0, side)
    if isinstance(stage, Decoder):
        captions, tokens = text(stage.text_config, net.context_width, net.embed_dim, 4 * net.width)
        return captions + unet(net, tokens + net.embed_tokens)
    if isinstance(stage, DiffusionPrior):
        return diffusion_prior(net, stage.text_config)
    assert isinstance(stage, ARPrior)
    return ar_prior(net, stage.text_config)


def transformer(
    width: int, depth: int, tokens: int, causal: bool, last: int | None = None
) -> float:
    """Operations of `depth` blocks on a sequence of `tokens`.

    With `last` the last block computes outputs only for this many tokens at the end, and for the
    others keys and values.
    """
    pairs = tokens * (tokens + 1) / 2 if causal else tokens**2
    block = 24 * tokens * width**2 + 4 * pairs * width
    trimmed = 0 if last is None else 20 * (tokens - last) * width**2
    return depth * block - trimmed


def diffusion_prior(net: Any, text: Any) -> float:
    """Text, its embedding, timestep, noised embedding and query; read at the query."""
    length, width, dim = text.context_length, net.width, net.embed_dim
    states = text.states_width if text.kind == "states" else 0
    ends = 2 * (length * states * width + 3 * dim * width + 2 * width**2)
    return transformer(width, net.depth, length + 4, causal=True, last=1) + ends


def ar_prior(net: Any, config: TextConfig) -> float:
    """Caption, text embedding and dot product, and the codes but the last, which is not read."""
    captions, length = text(config, net.width, net.embed_dim, 0)
    codes, width = net.max_codes, net.width
    body = transformer(width, net.depth, length + 1 + codes, causal=True, last=codes)
    return captions + body + 2 * net.embed_dim * width + 2 * codes * width * net.buckets


def text(config: TextConfig, context: int, embed: int, pooled: int) -> tuple[float, int]:
    """Operations of a `TextContext`, and how many tokens it gives."""
    if config.kind == "none":
        return 0.0, 0
    length, width = config.context_length, config.width
    if config.kind == "states":
        return 2.0 * (length * config.states_width * context + embed * pooled), length
    projected = 0 if width == context else length * width * context
    body = transformer(width, config.depth, length, causal=False)
    return body + 2 * (projected + width * pooled), length


def unet(config: UNetConfig, context: int, side: int | None = None) -> float:
    """An image of side `side` (None: the config's) with `context` tokens, the embedding's included.

    Blocks that enlarge or reduce convolve at the side of their output.
    """
    wide, patch = 4 * config.width, config.patch_size
    sides = [(side or config.image_size) // patch // 2**level for level in range(len(config.mults))]

    def conv(into: int, out: int, side: int, kernel: int = 3) -> float:
        return 2.0 * side**2 * into * out * kernel**2

    def block(into: int, out: int, side: int) -> float:
        shortcut = conv(into, out, side, 1) if into != out else 0
        return conv(into, out, side) + conv(out, out, side) + shortcut + 2 * wide * 2 * out

    def attention(channels: int, side: int, level: int | None = None) -> float:
        if level is not None and config.sides[level] not in config.attention:
            return 0
        pixels = side**2
        products = 8 * pixels * channels**2 + 4 * context * config.context_width * channels
        return products + 4 * pixels * (pixels + context) * channels

    into = config.in_channels + config.low_res_channels
    total = 0.0
    if config.thumbnail:
        hidden, pixels = config.thumbnail_width, config.in_channels * config.thumbnail**2
        total += 2 * hidden * (config.embed_dim + 4 * hidden + pixels)
        into += config.in_channels
    total += conv(into * patch**2, config.width, sides[0])
    total += conv(config.width, config.out_channels * patch**2, sides[0])
    total += 2 * (config.width * wide + wide**2 + config.embed_dim * wide)
    if config.embed_dim and config.context_width:
        total += 2 * config.embed_dim * config.embed_tokens * config.context_width
    skips, now = [config.width], config.width
    for level, (out, size) in enumerate(zip(config.channels, sides)):
        for _ in range(config.depth):
            total += block(now, out, size) + attention(out, size, level)
            skips.append(now := out)
        if level < len(sides) - 1:
            total += block(out, out, size // 2)
            skips.append(out)
    total += 2 * block(now, now, size)
    total += attention(now, size) if config.middle_attention else 0
    for level, (out, size) in reversed(list(enumerate(zip(config.channels, sides)))):
        for i in range(config.depth + 1):
            total += block(now + skips.pop(), out, size) + attention(out, size, level)
            now = out
            total += block(out, out, 2 * size) if level and i == config.depth else 0
    return total
