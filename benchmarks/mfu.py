"""Share of a GPU's peak (MFU) that training the paper's decoder reaches: its U-Net of 2.2 billion weights in bfloat16, captions as 77 states of 1024.

MFU is 3 x forward operations x samples a second / peak. A multiply-add is two operations; counted are convolutions, linear layers and attention as they are
defined: neither what is computed again nor what is saved by computing it another way, nor optimiser and EMA, which take their time all the same.
"""

from _training import arguments_of, bare, trained  # sets what must be set before torch

# isort: split
import statistics

import torch
from _common import parser, peak_mib, report

from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.decoder import Decoder

EMBED = STATES = 1024
LENGTH = 77


def forward_flops(config: UNetConfig, context: int) -> float:
    """Operations of the forward pass of one sample with `context` tokens, those of the embedding included."""
    wide, total, skips, now = 4 * config.width, 0.0, [config.width], config.width

    def conv(into: int, out: int, side: int, kernel: int = 3) -> float:
        return 2.0 * side**2 * into * out * kernel**2

    def block(into: int, out: int, side: int) -> float:
        return conv(into, out, side) + conv(out, out, side) + (conv(into, out, side, 1) if into != out else 0) + 2 * wide * 2 * out

    def attention(channels: int, side: int) -> float:
        pixels = side**2
        return 8 * pixels * channels**2 + 4 * pixels * (pixels + context) * channels + 4 * context * config.context_width * channels

    levels = list(zip(config.channels, config.sides, strict=True))
    total += conv(config.in_channels, now, config.image_size) + conv(config.width, config.out_channels, config.image_size)
    for level, (out, side) in enumerate(levels):
        for _ in range(config.depth):
            total += block(now, out, side) + (attention(out, side) if side in config.attention else 0)
            skips.append(now := out)
        if level < len(levels) - 1:
            total += block(out, out, side // 2)
            skips.append(out)
    total += 2 * block(now, now, side) + attention(now, side)
    for level, (out, side) in reversed(list(enumerate(levels))):
        for i in range(config.depth + 1):
            total += block(now + skips.pop(), out, side) + (attention(out, side) if side in config.attention else 0)
            now = out
            total += block(out, out, 2 * side) if level and i == config.depth else 0
    return total


def main() -> None:
    arguments = parser(__doc__, repeats=8, warmup=4, batch=32)
    arguments.add_argument("--width", type=int, default=512, help="channels at the top; 512 is the paper's")
    arguments.add_argument("--peak-tflops", type=float, default=989.4, help="of the GPU: 989.4 is an H100 SXM in dense bfloat16")
    given, before = arguments_of(arguments)
    config = UNetConfig(width=given.width, embed_dim=EMBED, context_width=4 * given.width, dropout=0.1)
    with torch.device(given.device):
        stage = Decoder(config, TextConfig(kind="states", states_width=STATES), optimizer=OptimizerConfig(lr=1e-5, warmup_steps=0)).train()
        size = given.batch
        batch = {
            "key": [str(i) for i in range(size)], "image": torch.rand(size, 3, 64, 64) * 2 - 1, "image_embed": torch.randn(size, EMBED),
            "text_embed": torch.randn(size, EMBED), "text_states": torch.randn(size, LENGTH, STATES),
            "text_mask": torch.ones(size, LENGTH, dtype=torch.bool),
        }  # fmt: skip
    times = {"trainer": trained, "bare": bare}[given.mode](stage, batch, given)
    flops = 3 * size * forward_flops(config, LENGTH + config.embed_tokens)
    mfu = flops / statistics.median(times) / (given.peak_tflops * 1e12)
    params = sum(p.numel() for p in stage.parameters())
    report("mfu", given, times, size, before, f"unclip_pl/{given.mode}", params=params, flops_per_step=flops, peak_rss_mib=peak_mib(), mfu=mfu)


if __name__ == "__main__":
    main()
