"""Zero-shot MS-COCO as in Table 2 of the paper: FID and CLIP score of pictures of 256 pixels.

One caption of each of --count validation pictures is drawn by each prior at each guidance scale,
and compared with all validation pictures, cut to the same side. Pictures are kept in OUT/samples: a
run that was stopped goes on with those that are missing, and ranks (of torchrun or srun) share
them.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed

from eval import fid, report
from eval.arms import remembered
from eval.captions import Caption, one_each, read_coco
from eval.common import (
    Figures,
    add_features,
    command,
    features_of,
    parser,
    progress,
)
from eval.drawn import Draw, Drawn
from eval.extract import reference
from eval.features import Features, clip_config, clip_features, named
from eval.folders import Pictures, Source
from eval.judge import same_clip
from eval.metrics import FRECHET, CLIPScore, frechet_key
from eval.source import Model, weights_of
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import DEFAULT_DECODER, DEFAULT_PRIORS, load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.options import (
    add_prior_sampling_options,
    add_sampling_options,
    override_sampling,
    positive_int,
)

log = logging.getLogger(__name__)
SIDE = 256
"""Side of the pictures of the paper's table."""


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, "eval.coco", batch_size=32)
    made.set_defaults(out=Path("out/coco"))
    made.add_argument(
        "--annotations", required=True, help="MS-COCO's captions: captions_val2014.json"
    )
    made.add_argument("--images", required=True, help="the folder of its pictures: val2014/")
    made.add_argument(
        "--count", type=positive_int, default=30000, help="pictures of which a caption is drawn"
    )
    made.add_argument(
        "--reference",
        choices=["all", "drawn"],
        default="all",
        help="compare with all pictures, as the paper does, or with those whose captions are drawn",
    )
    made.add_argument(
        "--decoder",
        default="openmoji",
        help='a checkpoint or release; "openmoji" is the one in the package',
    )
    made.add_argument(
        "--priors",
        nargs="+",
        default=["diffusion", "ar"],
        metavar="PRIOR",
        help='"diffusion", "ar", those in the package; or checkpoints or releases, any number',
    )
    made.add_argument(
        "--upsamplers",
        nargs="*",
        default=["256"],
        metavar="UPSAMPLER",
        help='"256", the one in the package; or checkpoints or releases, in order; '
        "nothing: the decoder's own pictures",
    )
    made.add_argument(
        "--guidance-scales",
        type=float,
        nargs="+",
        default=[1.25],
        help="of the decoder: the paper's, or several to sweep",
    )
    add_sampling_options(made, guidance=False)
    add_prior_sampling_options(made)
    add_features(made)
    made.add_argument(
        "--score-clip",
        default="ViT-B-32-quickgelu/openai",
        help="the CLIP that scores, not the one that conditions: NAME/TAG of open_clip, "
        "local-dir:/folder, or openmoji (the embedded one)",
    )
    made.add_argument(
        "--bootstrap",
        type=int,
        default=100,
        help="halves of the sets that are drawn for the interval of FID; 0: no interval",
    )
    return made


@dataclass
class Chosen:
    """What is drawn, and what it is compared with: file names in `folder`."""

    folder: Path
    captions: Sequence[Caption]
    pictures: Sequence[str]
    """Of the captions, in their order."""
    reference: Sequence[str]


def choose(given: argparse.Namespace) -> Chosen:
    """One caption of each of --count pictures.

    Raises:
        UserError: the annotations name no files, there are fewer pictures, or some are not in the
            folder.
    """
    captions, files = read_coco(given.annotations)
    some = one_each(captions, given.count, given.annotations, given.seed)
    unnamed = [caption for caption in some if caption.picture not in files]
    if unnamed:
        raise UserError(
            f"{given.annotations} names no file for picture {unnamed[0].picture}: "
            'its "images" must have the "id" and "file_name" of each.'
        )
    pictures = [files[cast(int, caption.picture)] for caption in some]
    others = sorted(files.values()) if given.reference == "all" else pictures
    folder = Path(given.images).expanduser()
    missing = [name for name in others if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(others)} pictures of {given.annotations} are not in "
            f"{folder}, such as {missing[0]}: name the folder that has them with --images."
        )
    return Chosen(folder, some, pictures, others)


@dataclass
class Way:
    """A prior, and the decoder and upsamplers that all priors share.

    Args:
        name: as it was given.
        unclip: decoder and upsamplers.
        prior: draws embeddings, with the settings `prior_sampling`.
        settings: what decides the embeddings, as plain values.
    """

    name: str
    unclip: UnCLIP
    prior: UnCLIP
    prior_sampling: Any
    settings: dict[str, Any]

    def draw(
        self, captions: Sequence[Caption], seed: int, samplings: Sequence[DecoderSamplingConfig]
    ) -> list[Draw]:
        """What draws captions by their indices, for each setting of the decoder.

        All have the same embeddings, each drawn once a run.
        """
        factor = self.unclip.sizes[-1] // self.unclip.sizes[0]

        def given(indices: Sequence[int]) -> tuple[list[str], list[int]]:
            return [captions[k].text for k in indices], [seed + k for k in indices]

        embed = remembered(
            lambda indices, seeds: self.prior.sample_prior(
                given(indices)[0], seeds, self.prior_sampling
            )
        )

        def at(sampling: DecoderSamplingConfig) -> Draw:
            def draw(indices: Sequence[int]) -> Tensor:
                texts, seeds = given(indices)
                images = self.unclip.decode(embed(indices, seeds), seeds, texts, sampling)
                return images if factor == 1 else self.unclip.upsample(images, seeds, factor)

            return draw

        return [at(sampling) for sampling in samplings]


def ways(given: argparse.Namespace, model: Model) -> list[Way]:
    """The priors, all loaded and their settings checked before anything is drawn."""
    paths = [DEFAULT_PRIORS.get(name, Path(name)) for name in given.priors]
    priors: list[Any] = [load_stage(path, DiffusionPrior, ARPrior) for path in paths]
    weights = [weights_of(path) for path in paths]
    if len({one["sha256"] for one in weights}) < len(weights):
        raise UserError("Two of --priors are the same prior: name each once.")
    found, decoder, clip = [], model.unclip.decoder, model.unclip.clip
    for name, prior, one in zip(given.priors, priors, weights, strict=True):
        unclip = UnCLIP(decoder, prior, clip, given.device, precision=model.precision)
        sampling = override_sampling(prior, prior_options(given, prior, priors), "prior_")
        settings = {"prior": one, "prior_sampling": asdict(sampling)}
        found.append(Way(name, model.unclip, unclip, sampling, settings))
    return found


def prior_options(given: argparse.Namespace, prior: Any, priors: Sequence[Any]) -> dict[str, Any]:
    """The options of priors for this one: not those that only another of them has."""

    def belongs(name: str) -> bool:
        setting = name.removeprefix("prior_")
        return hasattr(prior.sampling, setting) or not any(
            hasattr(other.sampling, setting) for other in priors
        )

    options = {name: value for name, value in vars(given).items() if name.startswith("prior_")}
    return {name: value for name, value in options.items() if belongs(name)}


@dataclass
class Point:
    """The pictures of one prior at one guidance scale."""

    prior: str
    guidance_scale: float
    source: Drawn


def points(given: argparse.Namespace, model: Model, captions: Sequence[Caption]) -> list[Point]:
    """All that is to be drawn: the priors in their order, each at all guidance scales."""
    samplings = [
        override_sampling(model.unclip.decoder, vars(given) | {"guidance_scale": scale})
        for scale in sorted(set(map(float, given.guidance_scales)))
    ]
    found = []
    for way in ways(given, model):
        draws = way.draw(captions, given.seed, samplings)
        for sampling, draw in zip(samplings, draws, strict=True):
            scale, weights = sampling.guidance_scale, way.settings["prior"]
            name = f"{weights['name']}-{weights['sha256'][:8]}-{scale:g}"
            drawn = {"sampling": asdict(sampling), "seed": given.seed}
            source = Drawn(
                given.out / "samples" / name,
                captions,
                draw,
                model.settings | way.settings | drawn,
                f"{way.name} at {scale:g}",
                rank=rank(),
                world_size=world_size(),
                clip=model.unclip.clip,
                size=model.unclip.sizes[-1],
            )
            found.append(Point(way.name, scale, source))
    return found


def run(given: argparse.Namespace) -> Figures:
    """Draw and judge each point; rank 0 writes the table."""
    plan = choose(given)
    network = named(features_of(given), given.device, given.precision)
    clip = FrozenCLIP(clip_config(given.score_clip, given.precision), given.device)
    scores = clip_features(clip)
    decoder = str(DEFAULT_DECODER) if given.decoder == "openmoji" else given.decoder
    model = Model(
        decoder, None, given.device, given.precision, given.upsamplers, compile=given.compile
    )
    every = points(given, model, plan.captions)
    side = model.unclip.sizes[-1]
    size = given.reference_size or side
    biased = same_clip(model.unclip.clip.fingerprint(), clip.fingerprint())
    said = sentences(side, size, biased, str(clip.config))

    def pictures(names: Sequence[str], captions: Sequence[str] | None = None) -> Pictures:
        place = rank(), world_size()
        return Pictures(str(plan.folder), *place, captions=captions, size=size, names=names)

    real = reference(network, pictures(plan.reference), given.batch_size)
    own = pictures(plan.pictures, [caption.text for caption in plan.captions])
    _, of_real = look(own, given.batch_size, None, scores, clip)
    results: list[Figures] = []
    for point in every:
        features, scored = look(point.source, given.batch_size, network, scores, clip)
        at = {"prior": point.prior, "guidance_scale": point.guidance_scale}
        distances = fid.judge(network, real, features, given.bootstrap, given.seed, given.device)
        results.append(at | distances | scored)
    settings = {
        "annotations": given.annotations,
        "captions": len(plan.captions),
        "reference": f"{given.reference} ({len(plan.reference)})",
        "reference_size": size,
        "features": network.name,
        "score_clip": str(clip.config),
        "drawn": {point.source.folder.name: point.source.settings for point in every},
    }
    if rank() == 0:
        said_of_real = f"CLIP score of the captions' own pictures: {score(of_real)}."
        table = report.markdown(headers(network.frechet), [row(one) for one in results])
        table += "".join(f"\n{text}\n" for text in [said_of_real, *said, *results[0]["said"]])
        print(table)
        with atomic_file(given.out / "coco.md", "w") as file:
            file.write(table)
    return {"points": results, "real": of_real, "said": said, "settings": settings}


def sentences(side: int, size: int, same_clip: bool, clip: str) -> list[str]:
    """What keeps the figures from being the paper's."""
    said = []
    if side != SIDE or size != SIDE:
        said.append(
            f"Pictures of {side} pixels are compared with real ones of {size}, and the paper's are "
            f"of {SIDE}."
        )
    if same_clip:
        said.append(
            f"The CLIP that scores ({clip}) is the one that conditions, which flatters what was "
            "drawn from its embeddings: name another with --score-clip."
        )
    for text in said:
        log.warning(text)
    return said


def look(
    source: Source, batch_size: int, network: Features | None, scores: Features, clip: FrozenCLIP
) -> tuple[Tensor, Figures]:
    """This rank's features (N, D) float32 by `network`, and the CLIP score over all ranks."""
    metric, rows = CLIPScore(), []
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        metric.to("cuda")
    for batch in progress(source.batches(batch_size), len(source), "judging"):
        if network is not None:
            rows.append(network(batch["images"]).float().cpu())
        text = clip.embed_text(clip.tokenize(batch["captions"])).embed
        metric.update(scores(batch["images"]), text)
    dim = 0 if network is None else network.dim
    return torch.cat(rows) if rows else torch.zeros(0, dim), metric.compute()


def headers(frechet: str) -> list[str]:
    """Of the table, where the Frechet distance has the key `frechet`."""

    names = FRECHET[frechet], "KID x 1000", "CLIP score", "precision", "recall"
    return ["prior", "guidance", *names]


def row(figures: Figures) -> list[str]:
    """One point's line of the table."""

    key = frechet_key(figures)
    distance = f"{figures[key]:.2f}"
    if f"{key}_low" in figures:
        distance += f" [{figures[f'{key}_low']:.2f}, {figures[f'{key}_high']:.2f}]"
    return [
        figures["prior"],
        f"{figures['guidance_scale']:g}",
        distance,
        f"{1000 * figures['kid']:.2f} ± {1000 * figures['kid_se']:.2f}",
        score(figures),
        f"{figures['precision']:.3f}",
        f"{figures['recall']:.3f}",
    ]


def score(figures: Figures) -> str:
    """The CLIP score with its interval."""
    low, high = figures["clip_score_low"], figures["clip_score_high"]
    return f"{figures['clip_score']:.2f} [{low:.2f}, {high:.2f}]"


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
