"""One training step of the 64x64 decoder.

It has the real stage, AdamW, clipping, EMA and logger, under our Lightning trainer. The network has
the shape that the other systems are timed with: 64 channels x 1, 2, 3, 4, two blocks per level,
attention at 32, 16 and 8, captions as 77 states of 512.
"""

from typing import Any

from _common import make_parser

import torch
from _training import measure, parse_arguments

from unclip_pl.networks.checkpointing import Checkpointing
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig

EMBED, STATES, LENGTH = 512, 512, 77


def decoder(checkpointing: Checkpointing = "none") -> Decoder:
    """The decoder of the comparison, with random weights."""
    net = UNetConfig(
        width=64,
        mults=(1, 2, 3, 4),
        depth=2,
        attention=(32, 16, 8),
        embed_dim=EMBED,
        context_width=256,
        dropout=0.0,
        checkpointing=checkpointing,
    )
    return Decoder(
        net,
        TextConfig(kind="states", states_width=STATES),
        sampling=DecoderSamplingConfig(sampler="ddpm", steps=5, guidance_scale=2.0),
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=0),
    )


def batch_of(size: int) -> dict[str, Any]:
    """Random images and conditions, as the DataModule gives them."""
    return {
        "key": [str(i) for i in range(size)],
        "image": torch.rand(size, 3, 64, 64) * 2 - 1,
        "image_embed": torch.randn(size, EMBED),
        "text_embed": torch.randn(size, EMBED),
        "text_states": torch.randn(size, LENGTH, STATES),
        "text_mask": torch.ones(size, LENGTH, dtype=torch.bool),
    }


def main() -> None:
    """Time the training steps of the decoder, and report samples per second."""
    arguments, before = parse_arguments(make_parser(__doc__, repeats=7, warmup=2, batch=4))
    measure(
        "decoder_train",
        decoder(arguments.checkpointing),
        batch_of(arguments.batch),
        arguments,
        before,
    )


if __name__ == "__main__":
    main()
