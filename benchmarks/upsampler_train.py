"""One training step of the upsampler 64 -> 256 on 64-pixel crops.

It has the real stage, AdamW, clipping, EMA and logger, under our Lightning trainer. The network has
the shape that the other systems are timed with: 64 channels x 1, 2, 3, 4, two blocks per level, no
attention.
"""

from typing import Any

from _common import make_parser

import torch
from _training import measure, parse_arguments

from unclip_pl.networks.checkpointing import Checkpointing
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.upsampler import NET, Upsampler256


def upsampler(width: int = 64, checkpointing: Checkpointing = "none") -> Upsampler256:
    """The upsampler of the comparison, with random weights."""
    net = UNetConfig(
        image_size=256,
        width=width,
        mults=(1, 2, 3, 4),
        depth=2,
        dropout=0.0,
        checkpointing=checkpointing,
        **NET,
    )
    return Upsampler256(net, optimizer=OptimizerConfig(lr=1e-4, warmup_steps=0))


def batch_of(size: int) -> dict[str, Any]:
    """Random crops and conditions, as the DataModule gives them."""
    return {
        "key": [str(i) for i in range(size)],
        "image": torch.rand(size, 3, 64, 64) * 2 - 1,
        "low_res": torch.rand(size, 3, 16, 16) * 2 - 1,
    }


def main() -> None:
    """Time the training steps of the upsampler, and report samples per second."""
    arguments, before = parse_arguments(make_parser(__doc__, repeats=7, warmup=2, batch=4))
    stage = upsampler(checkpointing=arguments.checkpointing)
    measure("upsampler_train", stage, batch_of(arguments.batch), arguments, before)


if __name__ == "__main__":
    main()
