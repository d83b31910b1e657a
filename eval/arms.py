"""The ways of the paper (section 5.1) to give a decoder an embedding.

Same captions, same seeds, same noise, another condition. Each arm says what reaches the decoder
(`Inputs`), and gives it nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.captions import Caption
from eval.drawn import Draw, Drawn
from eval.source import Model
from unclip_pl.data.shards import decode
from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.text import StatesText
from unclip_pl.pipeline.devices import on_device
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig

Embed = Callable[[Sequence[int], Sequence[int]], Tensor | None]
"""Indices of captions and as many seeds -> what stands for the image embedding (B, D), or None."""
TITLES = {
    "caption": "caption alone",
    "text": "text embedding in the image embedding's place",
    "text-decoder": "decoder trained on text embeddings",
    "ar": "AR prior",
    "diffusion": "diffusion prior",
    "image": "true image embedding (upper bound)",
}
SEED_STEP = 1 << 20
"""Between the seeds of the first, second ... picture of a caption: more than there are captions."""


@dataclass(frozen=True)
class Inputs:
    """What reaches the decoder of an arm.

    Args:
        embedding: what stands in the image embedding's place, in words; None for its null.
        tokens: whether attention sees the caption's token states.
        text_embed: whether CLIP's text embedding z_t is added to the timestep embedding: "no" where
            the decoder has no such input, "yes", or "null" where it has one and it is kept empty.
    """

    embedding: str | None
    tokens: bool
    text_embed: str

    def __str__(self) -> str:
        parts = [self.embedding] if self.embedding else []
        parts += ["the caption's tokens"] if self.tokens else []
        parts += {"no": [], "yes": ["z_t with the timestep"], "null": ["z_t's null"]}[
            self.text_embed
        ]
        return " + ".join(parts) or "nothing"


def inputs_of(decoder: Decoder, embedding: str | None, text_embed: bool = True) -> Inputs:
    """`Inputs` of an arm with this decoder; `text_embed` False: z_t is kept out."""
    encoder = decoder.text.encoder
    has_text_embed = isinstance(encoder, StatesText) and encoder.pooled_proj is not None
    shown = "yes" if text_embed else "null"
    return Inputs(embedding, encoder is not None, shown if has_text_embed else "no")


def remembered(make: Callable[[Sequence[int], Sequence[int]], Tensor]) -> Embed:
    """The same embeddings, each made once.

    The decoder's guidance is swept over one draw of the prior (unCLIP 5.3).
    """
    rows: dict[tuple[int, int], Tensor] = {}

    def embed(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        keys = list(zip(indices, seeds, strict=True))
        if not all(key in rows for key in keys):
            rows.update(zip(keys, make(indices, seeds).cpu(), strict=True))
        return torch.stack([rows[key] for key in keys])

    return embed


@dataclass
class Arm:
    """A decoder with one source of embeddings.

    Args:
        name: a key of `TITLES`.
        model: whose decoder draws.
        seed: of the first caption's first picture.
        embed: the source.
        sees: what reaches the decoder.
        settings: what decides the embeddings, as plain values.
        with_guidance: of a prior's arm: the same one at another guidance of the prior.
    """

    name: str
    model: Model
    captions: Sequence[Caption]
    seed: int
    embed: Embed
    sees: Inputs
    settings: dict[str, Any] = field(default_factory=dict)
    with_guidance: Callable[[float], "Arm"] | None = None

    @property
    def prior_scale(self) -> float | None:
        """The prior's guidance; None where there is no prior."""
        sampling = self.settings.get("prior_sampling")
        return None if sampling is None else sampling["guidance_scale"]

    def drawn(
        self,
        folder: Path,
        sampling: DecoderSamplingConfig,
        first: int | None = None,
        repeat: int = 0,
        place: tuple[int, int] = (0, 1),
    ) -> Drawn:
        """Its pictures with these settings of the decoder, in `folder`.

        Args:
            first: of so many of the captions only.
            repeat: which picture of each caption, from 0.
            place: this process's rank and their number.
        """
        settings = self.model.settings | self.settings
        settings |= {"arm": self.name, "decoder sees": asdict(self.sees)}
        settings |= {
            "seed": self.seed,
            "picture of a caption": repeat,
            "sampling": asdict(sampling),
        }
        return Drawn(
            folder,
            self.captions,
            self.draw(sampling, repeat),
            settings,
            f"{self.name} at {sampling.guidance_scale:g}",
            first,
            rank=place[0],
            world_size=place[1],
        )

    def draw(self, sampling: DecoderSamplingConfig, repeat: int = 0) -> Draw:
        """Draws the pictures of captions, by their indices."""

        def draw(indices: Sequence[int]) -> Tensor:
            unclip = self.model.unclip
            seeds = [self.seed + repeat * SEED_STEP + k for k in indices]
            batch = self.conditions(indices, seeds)
            with on_device(unclip.decoder, unclip.device, unclip.offload, unclip.precision):
                images = unclip.decoder.sample(batch, Noise(seeds), sampling)
            return unclip.upsample(images, seeds) if len(unclip.sizes) > 1 else images

        return draw

    def conditions(self, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor | None]:
        """The decoder's batch, with what `sees` says and nothing else."""
        texts = [self.captions[k].text for k in indices] if self.sees.tokens else None
        batch = self.model.unclip.conditions(self.embed(indices, seeds), texts)
        if self.sees.text_embed != "yes":
            batch.pop("text_embed", None)
        return batch


def of_caption(model: Model, captions: Sequence[Caption], seed: int) -> Arm:
    """No embedding at all: neither in the image embedding's place nor with the timestep."""
    sees = inputs_of(model.unclip.decoder, None, text_embed=False)
    return Arm("caption", model, captions, seed, lambda indices, seeds: None, sees)


def of_text(model: Model, captions: Sequence[Caption], seed: int, name: str = "text") -> Arm:
    """The text embedding z_t, for a decoder trained on image embeddings (zero-shot) or on these.

    The latter is the arm "text-decoder".
    """

    def make(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return model.unclip.embed_text([captions[k].text for k in indices])

    sees = inputs_of(model.unclip.decoder, "z_t as the embedding")
    return Arm(name, model, captions, seed, remembered(make), sees)


def of_prior(
    name: str,
    model: Model,
    unclip: UnCLIP,
    weights: dict[str, str],
    sampling: Any,
    captions: Sequence[Caption],
    seed: int,
) -> Arm:
    """What a prior draws; `unclip` has it, `weights` tell it from others."""

    def make(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return unclip.sample_prior([captions[k].text for k in indices], seeds, sampling)

    def with_guidance(scale: float) -> Arm:
        other = replace(sampling, guidance_scale=scale)
        return of_prior(name, model, unclip, weights, other, captions, seed)

    sees = inputs_of(model.unclip.decoder, "z_i of the prior")
    settings = {"prior": weights, "prior_sampling": asdict(sampling)}
    return Arm(name, model, captions, seed, remembered(make), sees, settings, with_guidance)


def of_image(model: Model, captions: Sequence[Caption], seed: int) -> Arm:
    """The embedding of the caption's own picture, which no text-to-image system has.

    The picture comes to CLIP at CLIP's own size, as in training.
    """
    size = model.unclip.clip.image_size

    def make(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        pictures = [decode(captions[k].image or b"", size) for k in indices]
        return model.unclip.embed_images(torch.stack(pictures))

    sees = inputs_of(model.unclip.decoder, "z_i of the caption's picture")
    return Arm("image", model, captions, seed, remembered(make), sees)
