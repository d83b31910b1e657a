"""One training step of the diffusion prior.

It has the real stage, AdamW, clipping, EMA and logger, under our Lightning trainer. The network has
the shape that the other systems are timed with: width 512, 6 blocks of 8 heads, captions as 77
states, 81 tokens in all.
"""

from typing import Any

from _common import make_parser

import torch
from _training import measure, parse_arguments

from unclip_pl.networks.checkpointing import Checkpointing
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig

DIM, LENGTH = 512, 77


def prior(checkpointing: Checkpointing = "none") -> DiffusionPrior:
    """The prior of the comparison, with random weights; padding is masked, as in diffusers'."""
    return DiffusionPrior(
        PriorTransformerConfig(
            embed_dim=DIM, width=512, depth=6, heads=8, checkpointing=checkpointing
        ),
        PriorTextConfig(states_width=DIM, context_length=LENGTH, padding="masked"),
        sampling=PriorSamplingConfig("ddpm", 16, 2.0),
    )


def batch_of(size: int, longest: int = LENGTH) -> dict[str, Any]:
    """Random embeddings and captions of 38 to `longest` tokens, as the DataModule gives them."""
    ends = torch.randint(LENGTH // 2 - 1, longest, (size, 1))
    return {
        "key": [str(i) for i in range(size)],
        "image_embed": torch.randn(size, DIM),
        "text_embed": torch.randn(size, DIM),
        "tokens": torch.zeros(size, LENGTH, dtype=torch.int64),
        "text_states": torch.randn(size, LENGTH, DIM),
        "text_mask": torch.arange(LENGTH) <= ends,
    }


def main() -> None:
    """Time the training steps of the prior, and report samples per second."""
    arguments, before = parse_arguments(make_parser(__doc__, repeats=7, warmup=2, batch=32))
    measure(
        "prior_train", prior(arguments.checkpointing), batch_of(arguments.batch), arguments, before
    )


if __name__ == "__main__":
    main()
