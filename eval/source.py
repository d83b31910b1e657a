"""One source of images for every metric: a folder, image shards, or what a model draws."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

from torch import Tensor

from eval.captions import Caption, read_captions, require_captions
from eval.commands import RunOptions
from eval.generated import SHARD_SIZE, GeneratedImages, captions_digest
from eval.inputs import decoder_inputs
from eval.stored import MAX_BAD_RATE, ImageSource, StoredImages
from unclip_pl.clip.fingerprint import Fingerprint
from unclip_pl.pipeline.devices import accelerate_stages
from unclip_pl.pipeline.locate import locate, require_weights
from unclip_pl.pipeline.unclip import Condition, Prior, UnCLIP
from unclip_pl.pipeline.weights import read_weights
from unclip_pl.utils.commands import Option
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import cache_dir
from unclip_pl.utils.options import Count, GuidedSamplingOptions, PriorSamplingOptions
from unclip_pl.utils.precision import Precision, supported_precision
from unclip_pl.utils.remote_copies import local_path

DEFAULT_CAPTIONS = "openmoji"
EMBEDDINGS = {"prior": "z_i of the prior", "text": "z_t as the embedding", "caption": None}
"""What stands for the image embedding under each `Condition`, in words."""


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


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What is drawn and how.

    Args:
        captions: FILE.txt (one per line), MS-COCO's annotations (.json), image shards, or
            openmoji
        num_captions: how many of the captions; by default all
        upsamplers: "256", "1024", those in the package; or checkpoints or releases, in order
    """

    num_captions: Count | None = None
    sampling: GuidedSamplingOptions
    prior_sampling: PriorSamplingOptions
    upsamplers: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(GenerationOptions):
    """What is drawn and how."""

    captions: str = DEFAULT_CAPTIONS

    def read_captions(self, size: int) -> list[Caption]:
        """The captions, with pictures of `size` pixels where they have any."""
        return read_captions(self.captions, self.num_captions, size)


@dataclass(frozen=True, kw_only=True)
class SourceOptions(GenerationOptions):
    """Which images are evaluated.

    Args:
        images: evaluate these: a folder of images, or shards (a folder, a pattern)
        decoder: evaluate what this decoder draws: a checkpoint or release; "openmoji" is the one
            in the package
        samples: folder for the images that are drawn; by default one in the cache
        max_bad_rate: largest share of images that may be unreadable
        condition: what the decoder has for an image embedding; by default the prior's, or what
            the decoder was trained on (text embeddings, captions only)
        prior: "diffusion" (the default) or "ar", those in the package; or a checkpoint or release
    """

    images: str | None = None
    decoder: Annotated[str | None, Option(alias="--ckpt")] = None
    samples: Path | None = None
    captions: str | None = None
    max_bad_rate: float = MAX_BAD_RATE
    condition: Condition | None = None
    prior: str | None = None

    def of_a_model(self) -> list[str]:
        """The names of the given options that only images drawn by a model can have."""
        names = ("samples", "num_captions", "condition", "prior", "upsamplers")
        own = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        return own + self.sampling.given() + self.prior_sampling.given()


def open_source(source: SourceOptions, options: RunOptions) -> ImageSource:
    """The images that the options ask for, this rank's share of them.

    Raises:
        UserError: neither or both of --images and --decoder are given, or options that are of no
            use for what was chosen.
    """
    if source.images and not source.decoder:
        return _stored(source, source.images)
    if source.decoder and not source.images:
        return _generated(source, source.decoder, options)
    raise UserError(
        "Say what is to be evaluated, and only one: --images FOLDER, or --decoder DECODER (with "
        "--prior)."
    )


def _stored(source: SourceOptions, images: str) -> StoredImages:
    reason = "is for images that a model draws, and --images names images that are there"
    refuse_options(source.of_a_model(), reason)
    captions = None
    if source.captions:
        captions = [caption.text for caption in read_captions(source.captions)]
    return StoredImages(images, rank(), world_size(), source.max_bad_rate, captions)


def _generated(source: SourceOptions, decoder: str, options: RunOptions) -> GeneratedImages:
    require_weights(decoder, source.prior, source.upsamplers or ())
    require_captions(source.captions or DEFAULT_CAPTIONS)
    condition: Condition = source.condition or default_condition(decoder)
    model = Model.of(
        options,
        decoder,
        choose_prior(source.prior, source.prior_sampling, condition),
        source.upsamplers,
    )
    unclip = model.unclip
    captions = read_captions(source.captions or DEFAULT_CAPTIONS, source.num_captions, model.size)
    sampling = source.sampling.of(unclip.decoder)
    prior_sampling = source.prior_sampling.of(unclip.prior) if unclip.prior else None
    settings = model.settings | {
        "condition": condition,
        "seed": options.seed,
        "sampling": asdict(sampling),
        "prior_sampling": asdict(prior_sampling) if prior_sampling else None,
    }

    def draw(indices: Sequence[int]) -> Tensor:
        return unclip.generate(
            [captions[k].text for k in indices],
            [options.seed + k for k in indices],
            condition,
            sampling=sampling,
            prior_sampling=prior_sampling,
        )

    return GeneratedImages(
        source.samples or default_folder(settings, captions),
        captions,
        draw,
        settings,
        model.settings["decoder"]["name"],
        rank=rank(),
        world_size=world_size(),
        clip=unclip.clip if unclip.decoder.reads_clip else None,
        size=model.size,
        stages=unclip.stages,
        about={"decoder sees": str(decoder_inputs(unclip.decoder, EMBEDDINGS[condition]))},
    )


def conditioning_clip(source: ImageSource) -> Fingerprint | None:
    """The fingerprint of the CLIP whose embeddings images are drawn from; None: not known."""
    clip = source.clip if isinstance(source, GeneratedImages) else None
    return None if clip is None else clip.fingerprint()


def drawn_settings(source: ImageSource) -> dict[str, Any] | None:
    """What decided the images that a model draws; None for images that were there."""
    return source.settings | source.about if isinstance(source, GeneratedImages) else None


def default_condition(decoder: str) -> Condition:
    """What a decoder was trained on: image embeddings, for which a prior stands in, or "text".

    It is "caption" for a decoder that reads nothing else.
    """
    trained_on = read_weights(locate("decoder", decoder)).hyper_parameters.get("condition")
    if trained_on == "none":
        return "caption"
    return "text" if trained_on == "text" else "prior"


def choose_prior(prior: str | None, sampling: PriorSamplingOptions, condition: str) -> str | None:
    """The prior of --prior, by default "diffusion"; None for conditions without one.

    Raises:
        UserError: there is an option of a prior, and the condition has none.
    """
    if condition == "prior":
        sampling.require_prior(prior or "diffusion")
        return prior or "diffusion"
    given = ["--prior"] if prior else []
    refuse_options(
        given + sampling.given(), f"is for a prior, and --condition {condition} uses none"
    )
    return None


def refuse_options(options: Sequence[str], reason: str) -> None:
    """UserError for the first of these options; `reason` says why it is of no use."""
    for option in options:
        raise UserError(f"{option} {reason}: leave one of them out.")


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
        decoder: "openmoji", or a checkpoint or release.
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

    @classmethod
    def of(
        cls,
        options: RunOptions,
        decoder: str,
        prior: str | None = None,
        upsamplers: Sequence[str] | None = None,
    ) -> "Model":
        """A model that runs as the options say."""
        precision, compile = options.precision, options.compile
        return cls(decoder, prior, options.device, precision, upsamplers, compile)

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

    def with_prior(self, prior: Prior) -> UnCLIP:
        """The same decoder and CLIP, with a prior that runs as the options say."""
        decoder, clip = self.unclip.decoder, self.unclip.clip
        unclip = UnCLIP(decoder, prior, clip, self.device, precision=self.precision)
        accelerate_stages([prior], unclip.device, self.compile, cuda_graphs=False)
        return unclip

    @property
    def conditioning_clip(self) -> Fingerprint | None:
        """The fingerprint of the CLIP that conditions the decoder; None: it sees none."""
        return self.unclip.clip.fingerprint() if self.unclip.decoder.reads_clip else None

    @property
    def size(self) -> int:
        """Side of the images in pixels: the last upsampler's, else the decoder's."""
        return self.unclip.sizes[-1]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The weights and the precision, as plain values; files are read once."""
        prior = None
        if self.prior is not None:
            prior = describe_weights(locate("prior", self.prior))
        upsamplers = [locate("upsampler", name) for name in self.upsamplers or ()]
        return {
            "decoder": describe_weights(locate("decoder", self.decoder)),
            "prior": prior,
            "upsamplers": [describe_weights(path) for path in upsamplers],
            "precision": self.precision,
        }
