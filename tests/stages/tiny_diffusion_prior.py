"""A tiny diffusion prior whose every condition matters, and batches for it."""

import torch

from tests.factories import tiny_captions
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior

NET = PriorTransformerConfig(embed_dim=12, width=32, depth=2, heads=4)
TEXT = PriorTextConfig("states", states_width=10, context_length=7)


def prior(padding: str = "learned", kind: str = "states", **changes) -> DiffusionPrior:
    sizes = {"states_width": 10, "vocab_size": 50_000, "context_length": 7}
    text = PriorTextConfig(kind, padding=padding, **sizes)
    stage = DiffusionPrior(net=NET, text=text, **changes).eval()
    torch.nn.init.normal_(stage.net.null_text)
    torch.nn.init.normal_(stage.net.null_text_embed)
    stage.x0_error.copy_(torch.linspace(0.01, 0.2, 1000))
    return stage


def batch(size: int = 4, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    captions = tiny_captions(size, generator, embed=12, states=10, length=6)
    return captions | {
        "key": [str(i) for i in range(size)],
        "image_embed": captions["image_embed"] * 3,
        "text_embed": captions["text_embed"] * 3,
    }
