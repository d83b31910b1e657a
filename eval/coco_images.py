"""What `eval.coco` draws: the captions by each prior, at each guidance scale of the decoder."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from eval.captions import Caption
from eval.conditioning import cache_embeddings
from eval.generated import Draw, GeneratedImages
from eval.source import Model, describe_weights
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import DEFAULT_PRIORS, load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import override_sampling


@dataclass
class PriorModel:
    """A prior, with the decoder and the upsamplers that all priors share.

    Args:
        name: as the option --priors has it.
        unclip: decoder and upsamplers.
        prior: draws embeddings, with the settings `prior_sampling`.
        settings: what decides the embeddings, as plain values.
    """

    name: str
    unclip: UnCLIP
    prior: UnCLIP
    prior_sampling: Any
    settings: dict[str, Any]

    def samplers(
        self, captions: Sequence[Caption], seed: int, samplings: Sequence[DecoderSamplingConfig]
    ) -> list[Draw]:
        """What draws captions by their indices, for each of several settings of the decoder.

        All have the same embeddings, each drawn once per run.
        """
        unclip = self.unclip
        factor = unclip.sizes[-1] // unclip.sizes[0]

        def sample_prior(indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
            texts = [captions[k].text for k in indices]
            return self.prior.sample_prior(texts, seeds, self.prior_sampling)

        embed = cache_embeddings(sample_prior)

        def sampler(sampling: DecoderSamplingConfig) -> Draw:
            def draw(indices: Sequence[int]) -> Tensor:
                texts = [captions[k].text for k in indices]
                seeds = [seed + k for k in indices]
                images = unclip.decode(embed(indices, seeds), seeds, texts, sampling)
                return images if factor == 1 else unclip.upsample(images, seeds, factor)

            return draw

        return [sampler(sampling) for sampling in samplings]


def load_priors(arguments: argparse.Namespace, model: Model) -> list[PriorModel]:
    """The priors, all loaded and their settings checked before anything is drawn."""
    paths = [DEFAULT_PRIORS.get(name, name) for name in arguments.priors]
    stages: list[Any] = [load_stage(path, DiffusionPrior, ARPrior) for path in paths]
    weights = [describe_weights(path) for path in paths]
    if len({described["sha256"] for described in weights}) < len(weights):
        raise UserError("Two of --priors are the same prior: name each once.")
    decoder, clip, priors = model.unclip.decoder, model.unclip.clip, []
    for name, stage, described in zip(arguments.priors, stages, weights, strict=True):
        unclip = UnCLIP(decoder, stage, clip, model.device, precision=model.precision)
        options = prior_options(vars(arguments), stage, stages)
        sampling = override_sampling(stage, options, "prior_")
        settings = {"prior": described, "prior_sampling": asdict(sampling)}
        priors.append(PriorModel(name, model.unclip, unclip, sampling, settings))
    return priors


def prior_options(options: dict[str, Any], prior: Any, priors: Sequence[Any]) -> dict[str, Any]:
    """The options of priors for one of several: not those that only another of them has."""

    def belongs(name: str) -> bool:
        setting = name.removeprefix("prior_")
        of_another = any(hasattr(other.sampling, setting) for other in priors)
        return hasattr(prior.sampling, setting) or not of_another

    return {
        name: value
        for name, value in options.items()
        if name.startswith("prior_") and belongs(name)
    }


@dataclass
class Point:
    """The images of one prior at one guidance scale of the decoder."""

    prior: str
    guidance_scale: float
    images: GeneratedImages


def build_points(
    arguments: argparse.Namespace, model: Model, captions: Sequence[Caption]
) -> list[Point]:
    """All that is to be drawn: the priors in their order, each at all guidance scales."""
    decoder, seed = model.unclip.decoder, arguments.seed
    samplings = [
        override_sampling(decoder, vars(arguments) | {"guidance_scale": scale})
        for scale in sorted({*arguments.guidance_scales})
    ]
    points = []
    for prior in load_priors(arguments, model):
        samplers = prior.samplers(captions, seed, samplings)
        for sampling, draw in zip(samplings, samplers, strict=True):
            scale, weights = sampling.guidance_scale, prior.settings["prior"]
            name = f"{weights['name']}-{weights['sha256'][:8]}-{scale:g}"
            settings = model.settings | prior.settings
            images = GeneratedImages(
                arguments.out / "samples" / name,
                captions,
                draw,
                settings | {"sampling": asdict(sampling), "seed": seed},
                f"{prior.name} at {scale:g}",
                rank=rank(),
                world_size=world_size(),
                clip=model.unclip.clip,
                size=model.size,
            )
            points.append(Point(prior.name, scale, images))
    return points
