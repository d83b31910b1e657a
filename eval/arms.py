"""The ways of the paper (section 5.1) to give a decoder an embedding: same captions, same seeds, same noise, another condition."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.captions import Caption
from eval.source import Draw, Drawn, Model
from unclip_pl.data.shards import decode
from unclip_pl.pipeline import UnCLIP
from unclip_pl.stages.decoder import SamplingConfig

Embed = Callable[[Sequence[int]], Tensor | None]
"""Indices of captions -> what the decoder has for an image embedding (B, D), or None for its null."""
TITLES = {
    "caption": "caption alone",
    "text": "text embedding in the image embedding's place",
    "text-decoder": "decoder trained on text embeddings",
    "ar": "AR prior",
    "diffusion": "diffusion prior",
    "image": "true image embedding (upper bound)",
}


def remembered(make: Callable[[Sequence[int]], Tensor]) -> Embed:
    """The same embeddings, each made once: the decoder's guidance is swept over one draw of the prior (unCLIP 5.3)."""
    rows: dict[int, Tensor] = {}

    def embed(indices: Sequence[int]) -> Tensor:
        if not all(k in rows for k in indices):
            rows.update(zip(indices, make(indices).cpu(), strict=True))
        return torch.stack([rows[k] for k in indices])

    return embed


@dataclass
class Arm:
    """A decoder with one source of embeddings.

    Args:
        name: a key of `TITLES`.
        model: whose decoder draws.
        settings: what decides the embeddings, as plain values.
    """

    name: str
    model: Model
    captions: Sequence[Caption]
    seed: int
    embed: Embed
    settings: dict[str, Any] = field(default_factory=dict)

    def drawn(self, folder: Path, sampling: SamplingConfig, first: int | None = None, rank: int = 0, world_size: int = 1) -> Drawn:
        """Its pictures with these settings of the decoder, in `folder`."""
        settings = self.model.settings | self.settings | {"arm": self.name, "seed": self.seed, "sampling": asdict(sampling)}
        name = f"{self.name} at {sampling.guidance_scale:g}"
        return Drawn(folder, self.captions, self.draw(sampling), settings, name, first, rank=rank, world_size=world_size)

    def draw(self, sampling: SamplingConfig) -> Draw:
        def draw(indices: Sequence[int]) -> Tensor:
            texts, seeds = [self.captions[k].text for k in indices], [self.seed + k for k in indices]
            return self.model.unclip.decode(self.embed(indices), seeds, texts, sampling)

        return draw


def of_caption(model: Model, captions: Sequence[Caption], seed: int) -> Arm:
    """No embedding at all."""
    return Arm("caption", model, captions, seed, lambda indices: None)


def of_text(model: Model, captions: Sequence[Caption], seed: int, name: str = "text") -> Arm:
    """The text embedding: of a decoder that was trained on image embeddings (zero-shot) or on these ("text-decoder")."""
    return Arm(name, model, captions, seed, remembered(lambda indices: model.unclip.embed_text([captions[k].text for k in indices])))


def of_prior(name: str, model: Model, unclip: UnCLIP, prior_sampling: Any, captions: Sequence[Caption], seed: int) -> Arm:
    """What a prior draws; `unclip` has it."""
    embed = remembered(lambda indices: unclip.sample_prior([captions[k].text for k in indices], [seed + k for k in indices], prior_sampling))
    return Arm(name, model, captions, seed, embed, {"prior_sampling": asdict(prior_sampling)})


def of_image(model: Model, captions: Sequence[Caption], seed: int) -> Arm:
    """The embedding of the caption's own picture, which no text-to-image system has."""

    def make(indices: Sequence[int]) -> Tensor:
        return model.unclip.embed_images(torch.stack([decode(captions[k].image or b"", model.size) for k in indices]))

    return Arm("image", model, captions, seed, remembered(make))
