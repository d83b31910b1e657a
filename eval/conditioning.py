"""The conditions of the paper (section 5.1) under which a decoder draws a caption.

Same captions, same seeds, same noise, another embedding. Each condition says what reaches the
decoder (`DecoderInputs`), and gives it nothing else.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.captions import Caption
from eval.generated import Draw, GeneratedImages
from eval.inputs import DecoderInputs, decoder_inputs
from eval.source import Model
from unclip_pl.data.decoding import decode
from unclip_pl.diffusion.noise import Noise
from unclip_pl.pipeline.devices import on_device
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.distributed import rank, world_size

Embed = Callable[[Sequence[int], Sequence[int]], Tensor | None]
"""Indices of captions, as many seeds -> the image embeddings (B, D) for the decoder, or None."""
TITLES = {
    "caption": "caption only",
    "text": "text embedding instead of the image embedding",
    "text-decoder": "decoder trained on text embeddings",
    "ar": "AR prior",
    "diffusion": "diffusion prior",
    "image": "true image embedding (upper bound)",
}
"""The conditions by name, in the order of the paper."""
SEED_STEP = 1 << 20
"""Between the seeds of the first, second ... image of a caption: more than there are captions."""


def cache_embeddings(draw: Callable[[Sequence[int], Sequence[int]], Tensor]) -> Embed:
    """The same embeddings, each drawn once.

    So the decoder's guidance is swept over one draw of the prior (unCLIP 5.3).
    """
    rows: dict[tuple[int, int], Tensor] = {}

    def embed(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        keys = list(zip(indices, seeds, strict=True))
        if not all(key in rows for key in keys):
            rows.update(zip(keys, draw(indices, seeds).cpu(), strict=True))
        return torch.stack([rows[key] for key in keys])

    return embed


@dataclass
class Conditioning:
    """A decoder with one source of embeddings: one condition of a comparison.

    Args:
        name: a key of `TITLES`.
        model: whose decoder draws.
        seed: of the first caption's first image.
        embed: the source of embeddings.
        inputs: what reaches the decoder.
        settings: what decides the embeddings, as plain values.
        with_guidance: of a prior: the same condition at another guidance scale of the prior.
    """

    name: str
    model: Model
    captions: Sequence[Caption]
    seed: int
    embed: Embed
    inputs: DecoderInputs
    settings: dict[str, Any] = field(default_factory=dict)
    with_guidance: Callable[[float], "Conditioning"] | None = None

    @property
    def prior_scale(self) -> float | None:
        """The prior's guidance scale; None without a prior."""
        sampling = self.settings.get("prior_sampling")
        return None if sampling is None else sampling["guidance_scale"]

    def generate(
        self,
        folder: Path,
        sampling: DecoderSamplingConfig,
        first: int | None = None,
        repeat: int = 0,
    ) -> GeneratedImages:
        """This rank's images with these settings of the decoder; they are drawn when they are read.

        Args:
            folder: where they are kept.
            sampling: settings of the decoder.
            first: how many of the captions are drawn, from the first on; None: all.
            repeat: which image of each caption, from 0.
        """
        # Folders are refused for other settings, so that these keys have to stay as they are.
        settings = self.model.settings | self.settings
        settings |= {"arm": self.name, "decoder sees": asdict(self.inputs), "seed": self.seed}
        settings |= {"picture of a caption": repeat, "sampling": asdict(sampling)}
        return GeneratedImages(
            folder,
            self.captions,
            self.sampler(sampling, repeat),
            settings,
            f"{self.name} at {sampling.guidance_scale:g}",
            first,
            rank=rank(),
            world_size=world_size(),
            stages=self.model.unclip.stages,
        )

    def sampler(self, sampling: DecoderSamplingConfig, repeat: int = 0) -> Draw:
        """What draws the images of captions, by their indices."""

        def draw(indices: Sequence[int]) -> Tensor:
            unclip = self.model.unclip
            seeds = [self.seed + repeat * SEED_STEP + k for k in indices]
            batch = self.decoder_batch(indices, seeds)
            with on_device(unclip.decoder, unclip.device, unclip.offload, unclip.precision):
                images = unclip.decoder.sample(batch, Noise(seeds), sampling)
            return unclip.upsample(images, seeds) if len(unclip.sizes) > 1 else images

        return draw

    def decoder_batch(
        self, indices: Sequence[int], seeds: Sequence[int]
    ) -> dict[str, Tensor | None]:
        """The decoder's batch, with what `inputs` says and nothing else."""
        texts = [self.captions[k].text for k in indices] if self.inputs.tokens else None
        batch = self.model.unclip.conditions(self.embed(indices, seeds), texts)
        if self.inputs.text_embed != "yes":
            batch.pop("text_embed", None)
        return batch


def from_caption(model: Model, captions: Sequence[Caption], seed: int) -> Conditioning:
    """No embedding at all: neither instead of the image embedding nor with the timestep."""
    inputs = decoder_inputs(model.unclip.decoder, None, text_embed=False)
    return Conditioning("caption", model, captions, seed, lambda indices, seeds: None, inputs)


def from_text(
    model: Model, captions: Sequence[Caption], seed: int, name: str = "text"
) -> Conditioning:
    """Condition the decoder on the text embedding z_t of the caption.

    A decoder that was trained on image embeddings draws zero-shot. One that was trained on text
    embeddings has the name "text-decoder".
    """

    def draw(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return model.unclip.embed_text([captions[k].text for k in indices])

    inputs = decoder_inputs(model.unclip.decoder, "z_t as the embedding")
    return Conditioning(name, model, captions, seed, cache_embeddings(draw), inputs)


def from_prior(
    name: str,
    model: Model,
    unclip: UnCLIP,
    weights: dict[str, str],
    sampling: Any,
    captions: Sequence[Caption],
    seed: int,
) -> Conditioning:
    """Condition the decoder on the image embedding z_i that a prior draws.

    Args:
        name: a key of `TITLES`, such as "ar" or "diffusion".
        model: whose decoder draws.
        unclip: has the prior.
        weights: those of the prior, as `eval.source.describe_weights` names them.
        sampling: the prior's settings.
        captions: what is drawn.
        seed: of the first caption's first image.
    """

    def draw(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return unclip.sample_prior([captions[k].text for k in indices], seeds, sampling)

    def with_guidance(scale: float) -> Conditioning:
        other = replace(sampling, guidance_scale=scale)
        return from_prior(name, model, unclip, weights, other, captions, seed)

    return Conditioning(
        name,
        model,
        captions,
        seed,
        cache_embeddings(draw),
        decoder_inputs(model.unclip.decoder, "z_i of the prior"),
        {"prior": weights, "prior_sampling": asdict(sampling)},
        with_guidance,
    )


def from_image(model: Model, captions: Sequence[Caption], seed: int) -> Conditioning:
    """The embedding of the caption's own picture, which no text-to-image system has.

    CLIP sees the picture at CLIP's own size, as in training. The settings name all pictures by a
    digest, so that images of other pictures are not taken for these.
    """
    size = model.unclip.clip.image_size
    settings = {"pictures": pictures_digest(captions)}

    def draw(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        pictures = [decode(captions[k].image or b"", size) for k in indices]
        return model.unclip.embed_images(torch.stack(pictures))

    inputs = decoder_inputs(model.unclip.decoder, "z_i of the caption's picture")
    return Conditioning("image", model, captions, seed, cache_embeddings(draw), inputs, settings)


def pictures_digest(captions: Sequence[Caption]) -> str:
    """A name for the captions' pictures in this order: others have another."""
    digest = hashlib.sha256()
    for caption in captions:
        digest.update(hashlib.sha256(caption.image or b"").digest())
    return digest.hexdigest()[:16]
