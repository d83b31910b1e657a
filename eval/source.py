"""One source of images for every metric: a folder, image shards, or what a model draws."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from eval.captions import Caption, read_captions
from eval.commands import settings_from
from eval.generated import SHARD_SIZE, GeneratedImages, captions_digest
from eval.stored import MAX_BAD_RATE, ImageSource, StoredImages
from unclip_pl.clip.fingerprint import Fingerprint
from unclip_pl.pipeline.unclip import CONDITIONS, Condition, UnCLIP
from unclip_pl.pipeline.weights import (
    DEFAULT_DECODER,
    DEFAULT_PRIORS,
    DEFAULT_UPSAMPLERS,
    read_weights,
)
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import cache_dir
from unclip_pl.utils.options import (
    add_prior_option,
    add_prior_sampling_options,
    add_sampling_options,
    override_sampling,
    positive_int,
)
from unclip_pl.utils.precision import Precision, supported_precision
from unclip_pl.utils.remote_copies import local_path

DEFAULT_CAPTIONS = "openmoji"
PRIOR_OPTIONS = (
    "prior_guidance_scale",
    "prior_steps",
    "prior_sampler",
    "prior_temperature",
    "prior_top_p",
)
"""Options that only a prior can have."""
MODEL_OPTIONS = (
    "samples",
    "num_captions",
    "condition",
    "prior",
    "guidance_scale",
    "upsamplers",
    "sampler",
    "steps",
    "eta",
    *PRIOR_OPTIONS,
)
"""Options that only images drawn by a model can have."""


def describe_weights(path: str | os.PathLike) -> dict[str, str]:
    """The name of a release or checkpoint and a digest of its content."""
    path = local_path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return {"name": path.name, "sha256": digest.hexdigest()[:16]}


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Which images are evaluated."""
    parser.add_argument(
        "--images", help="evaluate these: a folder of images, or shards (a folder, a pattern)"
    )
    parser.add_argument(
        "--decoder",
        "--ckpt",
        help="evaluate what this decoder draws: a checkpoint or release; "
        '"openmoji" is the one in the package',
    )
    parser.add_argument(
        "--samples",
        type=Path,
        help="folder for the images that are drawn; by default one in the cache",
    )
    add_generation_options(parser)
    parser.set_defaults(captions=None)
    parser.add_argument(
        "--max-bad-rate",
        type=float,
        default=MAX_BAD_RATE,
        help="largest share of images that may be unreadable",
    )
    parser.add_argument(
        "--condition",
        choices=CONDITIONS,
        help="what the decoder has for an image embedding; by default the prior's, or the text's "
        "for a decoder that was trained on text embeddings",
    )
    add_prior_option(parser)


def add_generation_options(parser: argparse.ArgumentParser, own: str = "its own") -> None:
    """What is drawn and how, for all commands that draw; `own`: for the priors' help."""
    parser.add_argument(
        "--captions",
        default=DEFAULT_CAPTIONS,
        help="FILE.txt (one per line), MS-COCO's annotations (.json), image shards, openmoji, or "
        "openmoji-line",
    )
    parser.add_argument(
        "--num-captions", type=positive_int, help="how many of the captions; by default all"
    )
    add_sampling_options(parser)
    add_prior_sampling_options(parser, own)
    parser.add_argument(
        "--upsamplers",
        nargs="+",
        metavar="UPSAMPLER",
        help='"256", "1024", those in the package; or checkpoints or releases, in order',
    )


def open_source(arguments: argparse.Namespace) -> ImageSource:
    """The images that the options of `add_source_options` ask for, this rank's share of them.

    Raises:
        UserError: neither or both of --images and --decoder are given, or options that are of no
            use for what was chosen.
    """
    if bool(arguments.images) == bool(arguments.decoder):
        raise UserError(
            "Say what is to be evaluated, and only one: --images FOLDER, or --decoder DECODER "
            "(with --prior)."
        )
    return _stored(arguments) if arguments.images else _generated(arguments)


def _stored(arguments: argparse.Namespace) -> StoredImages:
    reason = "is for images that a model draws, and --images names images that are there"
    refuse_options(arguments, MODEL_OPTIONS, reason)
    captions = None
    if arguments.captions:
        captions = [caption.text for caption in read_captions(arguments.captions)]
    return StoredImages(arguments.images, rank(), world_size(), arguments.max_bad_rate, captions)


def _generated(arguments: argparse.Namespace) -> GeneratedImages:
    decoder = decoder_path(arguments.decoder)
    condition: Condition = arguments.condition or default_condition(decoder)
    prior = choose_prior(arguments, condition)
    model = settings_from(Model, arguments, decoder=decoder, prior=prior)
    unclip = model.unclip
    captions = read_captions(
        arguments.captions or DEFAULT_CAPTIONS, arguments.num_captions, model.size
    )
    sampling = override_sampling(unclip.decoder, vars(arguments))
    prior_sampling = None
    if unclip.prior:
        prior_sampling = override_sampling(unclip.prior, vars(arguments), "prior_")
    settings = model.settings | {
        "condition": condition,
        "seed": arguments.seed,
        "sampling": asdict(sampling),
        "prior_sampling": asdict(prior_sampling) if prior_sampling else None,
    }

    def draw(indices: Sequence[int]) -> Tensor:
        return unclip.generate(
            [captions[k].text for k in indices],
            [arguments.seed + k for k in indices],
            condition,
            sampling=sampling,
            prior_sampling=prior_sampling,
        )

    return GeneratedImages(
        arguments.samples or default_folder(settings, captions),
        captions,
        draw,
        settings,
        Path(model.decoder).name,
        rank=rank(),
        world_size=world_size(),
        clip=unclip.clip,
        size=model.size,
    )


def conditioning_clip(source: ImageSource) -> Fingerprint | None:
    """The fingerprint of the CLIP whose embeddings images are drawn from; None: not known."""
    clip = source.clip if isinstance(source, GeneratedImages) else None
    return None if clip is None else clip.fingerprint()


def drawn_settings(source: ImageSource) -> dict[str, Any] | None:
    """What decided the images that a model draws; None for images that were there."""
    return source.settings if isinstance(source, GeneratedImages) else None


def decoder_path(name: str) -> str:
    """The path of a decoder: "openmoji" is the one in the package."""
    return str(DEFAULT_DECODER) if name == "openmoji" else name


def default_condition(decoder: str) -> Condition:
    """What a decoder was trained on: "text", or image embeddings, for which a prior stands in."""
    trained_on = read_weights(decoder).hyper_parameters.get("condition")
    return "text" if trained_on == "text" else "prior"


def choose_prior(arguments: argparse.Namespace, condition: str) -> str | None:
    """The prior of --prior, by default "diffusion"; None for conditions without one.

    Raises:
        UserError: there is an option of a prior, and the condition has none.
    """
    if condition == "prior":
        return arguments.prior or "diffusion"
    reason = f"is for a prior, and --condition {condition} uses none"
    refuse_options(arguments, ["prior", *PRIOR_OPTIONS], reason)
    return None


def refuse_options(arguments: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """UserError for the first of these options that is given; `reason` says why it is of no use."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {reason}: leave one of them out.")


def default_folder(settings: dict[str, Any], captions: Sequence[Caption]) -> Path:
    """A folder in the cache for images of these settings only."""
    content = json.dumps(
        [settings, captions_digest(captions), len(captions), SHARD_SIZE], sort_keys=True
    )
    return cache_dir() / "samples" / hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass
class Model:
    """A decoder, perhaps with a prior and upsamplers.

    Args:
        decoder: a checkpoint or release.
        prior: "diffusion", "ar", a checkpoint or release, or None.
        device: as torch names it.
        precision: "fp32", or "bf16" on a device that has it.
        upsamplers: "256", "1024", checkpoints or releases, in order; images then have the size of
            the last one's.
        compile: compile the networks; the images are the same up to rounding.
    """

    decoder: str
    prior: str | None = None
    device: str = "cpu"
    precision: Precision = "fp32"
    upsamplers: Sequence[str] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        # The settings of images name the precision that they were really computed in.
        self.precision = cast(Precision, supported_precision(self.precision, self.device))
        self.upsamplers = tuple(self.upsamplers or ())

    @cached_property
    def unclip(self) -> UnCLIP:
        """The stages, loaded at the first use."""
        return UnCLIP.load(
            self.decoder,
            self.prior,
            device=self.device,
            upsamplers=self.upsamplers or (),
            precision=self.precision,
            compile=self.compile,
        )

    @property
    def size(self) -> int:
        """Side of the images in pixels: the last upsampler's, else the decoder's."""
        return self.unclip.sizes[-1]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The weights and the precision, as plain values; files are read once."""
        prior = None
        if self.prior is not None:
            prior = describe_weights(DEFAULT_PRIORS.get(self.prior, self.prior))
        upsamplers = [DEFAULT_UPSAMPLERS.get(name, name) for name in self.upsamplers or ()]
        return {
            "decoder": describe_weights(self.decoder),
            "prior": prior,
            "upsamplers": [describe_weights(path) for path in upsamplers],
            "precision": self.precision,
        }
