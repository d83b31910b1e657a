"""A tiny AR prior whose every condition matters, and batches for it."""

import torch

from tests.factories import fit_quantizer, tiny_captions
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.stages.ar_prior import ARPrior

NET = ARPriorConfig(embed_dim=12, width=32, depth=2, heads=4, max_codes=8, buckets=32)
TEXT = TextConfig(kind="states", states_width=10, context_length=6)


def batch(size: int = 4, seed: int = 1) -> dict:
    """Image embeddings with decreasing variance, and text embeddings near them."""
    generator = torch.Generator().manual_seed(seed)
    captions = tiny_captions(size, generator, embed=12, states=10, length=6, eot=100)
    image_embed = captions["image_embed"] * 0.7 ** torch.arange(12)
    return captions | {
        "key": [str(i) for i in range(size)],
        "image_embed": image_embed,
        "text_embed": image_embed + captions["text_embed"],
    }


def prior(data: dict | None = None, **changes) -> ARPrior:
    """A prior fitted to `data`, with weights for which every part of the text matters."""
    stage = ARPrior(**{"net": NET, "text": TEXT} | changes)
    fit_quantizer(stage, data or batch(200))
    for parameter in stage.net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return stage
