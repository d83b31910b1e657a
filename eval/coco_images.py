"""What `eval.coco` draws: the captions by each prior, at each guidance scale of the decoder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from eval.captions import Caption
from eval.commands import ReportOptions
from eval.conditioning import cache_embeddings
from eval.generated import Draw, GeneratedImages
from eval.inputs import decoder_inputs
from eval.source import EMBEDDINGS, Model, describe_weights
from unclip_pl.pipeline.locate import locate
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import PriorSamplingOptions


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


def load_priors(
    names: Sequence[str], sampling: PriorSamplingOptions, model: Model
) -> list[PriorModel]:
    """The priors, all loaded and their settings checked before anything is drawn."""
    paths = [locate("prior", name) for name in names]
    stages: list[Any] = [load_stage(path, DiffusionPrior, ARPrior) for path in paths]
    weights = [describe_weights(path) for path in paths]
    if len({described["sha256"] for described in weights}) < len(weights):
        raise UserError("Two of --priors are the same prior: name each once.")
    priors = []
    for name, stage, described in zip(names, stages, weights, strict=True):
        own = sampling.among(stage, stages).of(stage)
        settings = {"prior": described, "prior_sampling": asdict(own)}
        priors.append(PriorModel(name, model.unclip, model.with_prior(stage), own, settings))
    return priors


@dataclass
class Point:
    """The images of one prior at one guidance scale of the decoder."""

    prior: str
    guidance_scale: float
    images: GeneratedImages


def build_points(
    priors: Sequence[PriorModel],
    samplings: Sequence[DecoderSamplingConfig],
    captions: Sequence[Caption],
    model: Model,
    options: ReportOptions,
) -> list[Point]:
    """All that is to be drawn: the priors in their order, each with all settings of the decoder."""
    points, seed = [], options.seed
    inputs = decoder_inputs(model.unclip.decoder, EMBEDDINGS["prior"])
    for prior in priors:
        samplers = prior.samplers(captions, seed, samplings)
        for sampling, draw in zip(samplings, samplers, strict=True):
            scale, weights = sampling.guidance_scale, prior.settings["prior"]
            name = f"{weights['name']}-{weights['sha256'][:8]}-{scale:g}"
            settings = model.settings | prior.settings
            images = GeneratedImages(
                options.out / "samples" / name,
                captions,
                draw,
                settings | {"sampling": asdict(sampling), "seed": seed},
                f"{prior.name} at {scale:g}",
                rank=rank(),
                world_size=world_size(),
                clip=model.unclip.clip,
                size=model.size,
                stages=[*prior.prior.stages, *model.unclip.cascade.stages],
                about={"decoder sees": str(inputs)},
            )
            points.append(Point(prior.name, scale, images))
    return points
