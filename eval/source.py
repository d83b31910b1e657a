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
from eval.drawn import SHARD, Drawn, digest_of
from eval.folders import MAX_BAD_RATE, Pictures, Source
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


def weights_of(path: str | os.PathLike) -> dict[str, str]:
    """A release or checkpoint by name and content: another file is another model."""
    path = Path(path)
    files = (
        sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
        if path.is_dir()
        else [path]
    )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return {"name": path.name, "sha256": digest.hexdigest()[:16]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what images are judged."""
    parser.add_argument(
        "--images", help="a folder of images, or image shards (a folder, a pattern): judge these"
    )
    parser.add_argument(
        "--ckpt",
        help='judge what this decoder draws: a checkpoint or release; "openmoji": ours',
    )
    parser.add_argument(
        "--samples",
        type=Path,
        help="folder for the pictures that are drawn; by default one in the cache",
    )
    add_drawing(parser)
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
        help="what the decoder has for an image embedding; by default the prior's",
    )
    add_prior_option(parser)


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """The options of drawing that all commands share."""
    parser.add_argument(
        "--captions",
        default="openmoji",
        help="FILE.txt (one a line), MS-COCO's annotations (.json), image shards, openmoji, or "
        "openmoji-line",
    )
    parser.add_argument(
        "--num-captions", type=positive_int, help="how many of the captions; by default all"
    )
    add_sampling_options(parser)
    add_prior_sampling_options(parser)
    parser.add_argument(
        "--upsamplers",
        nargs="+",
        metavar="UPSAMPLER",
        help='"256", "1024", those in the package; or checkpoints or releases, in order',
    )


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
    "prior_guidance_scale",
    "prior_steps",
    "prior_sampler",
    "prior_temperature",
    "prior_top_p",
)


def open_source(arguments: argparse.Namespace) -> Source:
    """What `add_arguments` asked for; `batches` gives this rank's share.

    Raises:
        UserError: neither or both of --images and --ckpt, or options that are of no use to what was
            chosen.
    """
    if bool(arguments.images) == bool(arguments.ckpt):
        raise UserError(
            "Say what is to be judged, and only one: --images FOLDER, or --ckpt DECODER (with "
            "--prior)."
        )
    if arguments.images:
        useless = [name for name in MODEL_OPTIONS if getattr(arguments, name) is not None]
        if useless:
            raise UserError(
                f"--{useless[0].replace('_', '-')} is for pictures that a model draws, and "
                "--images names some that are there: leave one out."
            )
        given = (
            [caption.text for caption in read_captions(arguments.captions)]
            if arguments.captions
            else None
        )
        return Pictures(arguments.images, rank(), world_size(), arguments.max_bad_rate, given)
    decoder = str(DEFAULT_DECODER) if arguments.ckpt == "openmoji" else arguments.ckpt
    condition: Condition = arguments.condition or (
        "text" if read_weights(decoder).hyper_parameters.get("condition") == "text" else "prior"
    )
    if condition != "prior" and arguments.prior:
        raise UserError(
            f"--prior is given, and --condition {condition} uses none: leave one of them out."
        )
    prior = (arguments.prior or "diffusion") if condition == "prior" else None
    model = Model(
        decoder,
        prior,
        arguments.device,
        arguments.precision,
        arguments.upsamplers or (),
        arguments.compile,
    )
    captions = read_captions(arguments.captions or "openmoji", arguments.num_captions, model.size)
    sampling = override_sampling(model.unclip.decoder, vars(arguments))
    prior_sampling = None
    if model.unclip.prior:
        prior_sampling = override_sampling(model.unclip.prior, vars(arguments), "prior_")
    settings = model.settings | {
        "condition": condition,
        "seed": arguments.seed,
        "sampling": asdict(sampling),
        "prior_sampling": asdict(prior_sampling) if prior_sampling else None,
    }

    def draw(indices: Sequence[int]) -> Tensor:
        return model.unclip.generate(
            [captions[k].text for k in indices],
            [arguments.seed + k for k in indices],
            condition,
            sampling=sampling,
            prior_sampling=prior_sampling,
        )

    clip, size = model.unclip.clip, model.size
    folder = arguments.samples or default_folder(settings, captions)
    return Drawn(
        folder,
        captions,
        draw,
        settings,
        Path(model.decoder).name,
        rank=rank(),
        world_size=world_size(),
        clip=clip,
        size=size,
    )


def default_folder(settings: dict[str, Any], captions: Sequence[Caption]) -> Path:
    """In the cache, a folder for pictures of these settings alone."""
    name = hashlib.sha256(
        json.dumps([settings, digest_of(captions), len(captions), SHARD], sort_keys=True).encode()
    ).hexdigest()[:16]
    return cache_dir() / "samples" / name


@dataclass
class Model:
    """A decoder and perhaps a prior, with what tells them from others.

    Args:
        decoder: a checkpoint or release.
        prior: "diffusion", "ar", a checkpoint or release, or None.
        upsamplers: "256", "1024", checkpoints or releases, in order; pictures are then of the last
            one's size.
        precision: "fp32", or "bf16" on a device that has it.
        compile: compile the networks; the pictures are the same up to rounding.
    """

    decoder: str
    prior: str | None = None
    device: str = "cpu"
    precision: Precision = "fp32"
    upsamplers: Sequence[str] = ()
    compile: bool = False

    def __post_init__(self) -> None:
        self.precision = cast(
            Precision, supported_precision(self.precision, self.device)
        )  # pictures are kept by what they were computed in

    @cached_property
    def unclip(self) -> UnCLIP:
        return UnCLIP.load(
            self.decoder,
            self.prior,
            device=self.device,
            upsamplers=self.upsamplers,
            precision=self.precision,
            compile=self.compile,
        )

    @property
    def size(self) -> int:
        """Side of the pictures in pixels: the last upsampler's, else the decoder's."""
        return self.unclip.sizes[-1]

    @property
    def settings(self) -> dict[str, Any]:
        """The weights and the precision, as plain values."""
        prior = (
            None
            if self.prior is None
            else weights_of(DEFAULT_PRIORS.get(self.prior, Path(self.prior)))
        )
        upsamplers = [
            weights_of(DEFAULT_UPSAMPLERS.get(name, Path(name))) for name in self.upsamplers
        ]
        return {
            "decoder": weights_of(self.decoder),
            "prior": prior,
            "upsamplers": upsamplers,
            "precision": self.precision,
        }
