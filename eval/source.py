"""One source of images for every metric: a folder, image shards, or a model, whose pictures are drawn once into shards of their own.

    samples.json      with what settings they were drawn; others are refused
    00000.tar ...     pictures as PNG, with captions; written whole or not at all

A run that was killed goes on with the shards that are missing. Ranks (of torchrun or srun) take every n-th shard and never wait for each other. Picture k
has the seed `seed + k`, and a batch never crosses a shard, so the pictures are the same from any number of ranks.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from eval.captions import Caption, read_captions
from eval.common import positive, rank, world_size
from eval.folders import MAX_BAD_RATE, Batch, Pictures, Source
from unclip_pl import __version__
from unclip_pl.atomic import atomic_file, cache_dir, remove_leftovers
from unclip_pl.clip import FrozenCLIP
from unclip_pl.commands.common import SPACING, chosen, spacing
from unclip_pl.errors import UserError
from unclip_pl.images import from_pil, to_pil
from unclip_pl.pipeline import CONDITIONS, DEFAULT_DECODER, DEFAULT_PRIORS, DEFAULT_UPSAMPLERS, Condition, UnCLIP, read_weights
from unclip_pl.precision import Precision, usable

Draw = Callable[[Sequence[int]], Tensor]
"""Indices of captions -> float (B, 3, H, W) in [-1, 1]."""
SHARD = 64
MANIFEST = "samples.json"


@dataclass
class Drawn:
    """Pictures of captions that `draw` makes where `folder` lacks them.

    Args:
        captions: caption k is picture k.
        draw: is given the indices of a batch.
        settings: plain values that decide what the pictures are.
        first: only so many of the captions for now; the rest may follow into the same folder.
        shard: pictures a shard.
        rank, world_size: this process among all.
        clip: the CLIP whose embeddings the pictures are drawn from.
        size: side of the pictures in pixels.
    """

    folder: Path
    captions: Sequence[Caption]
    draw: Draw
    settings: dict[str, Any]
    name: str = "drawn"
    first: int | None = None
    shard: int = SHARD
    rank: int = 0
    world_size: int = 1
    clip: FrozenCLIP | None = None
    size: int = 64

    def __len__(self) -> int:
        return len(self.captions[: self.first])

    @property
    def mine(self) -> list[Path]:
        """This rank's shards."""
        return [self.folder / f"{number:05d}.tar" for number in range(self.rank, -(-len(self) // self.shard), self.world_size)]

    def indices(self, shard: Path) -> range:
        """Of the pictures in a shard."""
        first = int(shard.stem) * self.shard
        return range(first, min(first + self.shard, len(self.captions)))

    def check(self) -> None:
        """Write the manifest; UserError where the folder holds pictures of other settings."""
        ours = json.loads(json.dumps(self.settings | {"captions_sha256": digest_of(self.captions), "count": len(self.captions), "shard": self.shard}))
        manifest = self.folder / MANIFEST
        try:
            theirs = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
        except FileNotFoundError:
            if any(self.folder.glob("*.tar")):
                raise UserError(f"{self.folder} holds shards that were not drawn here (no {MANIFEST}): choose another folder with --samples.") from None
            with atomic_file(manifest, "w") as file:
                json.dump({"settings": ours, "unclip_pl": __version__, "torch": torch.__version__}, file, indent=1)
            return
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{manifest} is damaged: remove the folder, or choose another with --samples.") from None
        other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if other:
            key = other[0]
            raise UserError(
                f"{self.folder} holds pictures with {key} {theirs.get(key)!r}, and this run has {ours.get(key)!r}: choose another folder with --samples, "
                "or remove that one."
            )

    def complete(self, batch_size: int) -> None:
        """Draw what is missing of this rank's shards."""
        from tqdm import tqdm

        self.check()
        remove_leftovers(self.folder, "*.tar")
        missing = [shard for shard in self.mine if not shard.exists()]
        total = sum(len(self.indices(shard)) for shard in missing)
        with tqdm(total=total, desc=f"drawing {self.name}", unit="image", disable=not missing or self.rank != 0, mininterval=1.0, file=sys.stderr) as bar:
            for shard in missing:
                with atomic_file(shard) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                    indices = self.indices(shard)
                    for first in range(0, len(indices), batch_size):
                        some = indices[first : first + batch_size]
                        for index, image in zip(some, self.draw(some).cpu(), strict=True):
                            self._add(tar, index, image)
                        bar.update(len(some))

    def _add(self, tar: tarfile.TarFile, index: int, image: Tensor) -> None:
        png, caption = io.BytesIO(), self.captions[index]
        to_pil(image).save(png, "PNG")
        facts = json.dumps({"key": caption.key, "caption": caption.text, "index": index}, ensure_ascii=False)
        for ending, data in (("png", png.getvalue()), ("txt", caption.text.encode()), ("json", facts.encode())):
            info = tarfile.TarInfo(f"{index:07d}.{ending}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's pictures, drawn first where they are missing; `keys` are "0000000", "0000001" and so on."""
        self.complete(batch_size)
        for shard in self.mine:
            for batch in Pictures(str(shard), max_bad_rate=0.0).batches(batch_size):
                kept = sum(int(key) < len(self) for key in batch["keys"])  # of the last shard
                if kept:
                    yield {name: values[:kept] for name, values in batch.items()}


    def pictures(self, indices: Sequence[int]) -> Tensor:
        """Some that are drawn, by any rank: (N, 3, H, W) in [-1, 1]."""
        found = []
        for k in indices:
            with tarfile.open(self.folder / f"{k // self.shard:05d}.tar") as tar, Image.open(tar.extractfile(f"{k:07d}.png")) as image:  # type: ignore[arg-type]
                found.append(from_pil(image))
        return torch.stack(found)


def digest_of(captions: Sequence[Caption]) -> str:
    """Tells these captions, in this order, from others."""
    return hashlib.sha256(json.dumps([caption.text for caption in captions]).encode()).hexdigest()[:16]


def weights_of(path: str | os.PathLike) -> dict[str, str]:
    """A release or checkpoint by name and content: another file under the same name is another model."""
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return {"name": path.name, "sha256": digest.hexdigest()[:16]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what images are judged."""
    parser.add_argument("--images", help="a folder of images, or image shards (a folder, a pattern): judge these")
    parser.add_argument("--ckpt", help='judge what this decoder draws: a checkpoint or release, or "openmoji", the one in the package')
    parser.add_argument("--samples", type=Path, help="folder for the pictures that are drawn; by default one in the cache for these settings")
    add_drawing(parser)
    parser.set_defaults(captions=None)
    parser.add_argument("--max-bad-rate", type=float, default=MAX_BAD_RATE, help="largest share of images that may be unreadable")
    parser.add_argument("--condition", choices=CONDITIONS, help="what the decoder has for an image embedding; by default the prior's")
    parser.add_argument("--prior", help='"diffusion" (the default) or "ar", those in the package; or a checkpoint or release')
    parser.add_argument("--guidance-scale", type=float, help="1: no guidance; by default the decoder's own")
    parser.add_argument("--upsamplers", nargs="+", metavar="UPSAMPLER", help='"256", "1024", those in the package; or checkpoints or releases, in order')


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """The options of drawing that all commands share."""
    parser.add_argument("--captions", default="openmoji", help="FILE.txt (one a line), MS-COCO's annotations (.json), image shards, or openmoji")
    parser.add_argument("--num-captions", type=positive, help="how many of the captions; by default all")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The settings of decoder and prior."""
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpm_solver_pp"], help="by default the decoder's own")
    parser.add_argument("--steps", type=spacing, help=f"{SPACING}; by default the decoder's own")
    parser.add_argument("--eta", type=float, help="noise of DDIM, 0 to 1")
    parser.add_argument("--prior-guidance-scale", type=float, help="by default the prior's own")
    parser.add_argument(
        "--prior-steps", type=spacing, help=f"{SPACING} of a diffusion prior; by default its own"
    )
    parser.add_argument("--prior-sampler", choices=["analytic", "ddpm", "ddim", "dpm_solver_pp"], help="of a diffusion prior; by default its own")


MODEL_OPTIONS = (
    "samples", "num_captions", "condition", "prior", "guidance_scale", "upsamplers",
    "sampler", "steps", "eta", "prior_guidance_scale", "prior_steps", "prior_sampler",
)


def open_source(arguments: argparse.Namespace) -> Source:
    """What `add_arguments` asked for; `batches` gives this rank's share.

    Raises:
        UserError: neither or both of --images and --ckpt, or options that are of no use to what was chosen.
    """
    if bool(arguments.images) == bool(arguments.ckpt):
        raise UserError("Say what is to be judged, and only one: --images FOLDER, or --ckpt DECODER (with --prior).")
    if arguments.images:
        useless = [name for name in MODEL_OPTIONS if getattr(arguments, name) is not None]
        if useless:
            raise UserError(f"--{useless[0].replace('_', '-')} is for pictures that a model draws, and --images names some that are there: leave one out.")
        given = [caption.text for caption in read_captions(arguments.captions)] if arguments.captions else None
        return Pictures(arguments.images, rank(), world_size(), arguments.max_bad_rate, given)
    decoder = str(DEFAULT_DECODER) if arguments.ckpt == "openmoji" else arguments.ckpt
    condition: Condition = arguments.condition or ("text" if read_weights(decoder).hyper_parameters.get("condition") == "text" else "prior")
    if condition != "prior" and arguments.prior:
        raise UserError(f"--prior is given, and --condition {condition} uses none: leave one of them out.")
    prior = (arguments.prior or "diffusion") if condition == "prior" else None
    model = Model(decoder, prior, arguments.device, arguments.precision, arguments.upsamplers or (), arguments.compile)
    captions = read_captions(arguments.captions or "openmoji", arguments.num_captions, model.size)
    sampling = chosen(arguments, model.unclip.decoder)
    prior_sampling = chosen(arguments, model.unclip.prior, "prior_") if model.unclip.prior else None
    settings = model.settings | {
        "condition": condition, "seed": arguments.seed, "sampling": asdict(sampling), "prior_sampling": asdict(prior_sampling) if prior_sampling else None,
    }

    def draw(indices: Sequence[int]) -> Tensor:
        return model.unclip.generate(
            [captions[k].text for k in indices], [arguments.seed + k for k in indices], condition, sampling=sampling, prior_sampling=prior_sampling
        )

    clip, size = model.unclip.clip, model.unclip.sizes[-1]
    folder = arguments.samples or default_folder(settings, captions)
    return Drawn(folder, captions, draw, settings, Path(model.decoder).name, rank=rank(), world_size=world_size(), clip=clip, size=size)


def default_folder(settings: dict[str, Any], captions: Sequence[Caption]) -> Path:
    """In the cache, a folder for pictures of these settings alone."""
    name = hashlib.sha256(json.dumps([settings, digest_of(captions), len(captions), SHARD], sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "samples" / name


@dataclass
class Model:
    """A decoder and perhaps a prior, with what tells them from others.

    Args:
        decoder: a checkpoint or release.
        prior: "diffusion", "ar", a checkpoint or release, or None.
        upsamplers: "256", "1024", checkpoints or releases, in order; pictures are then of the last one's size.
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
        self.precision = cast(Precision, usable(self.precision, self.device))  # pictures are kept by what they were computed in

    @cached_property
    def unclip(self) -> UnCLIP:
        return UnCLIP.load(self.decoder, self.prior, device=self.device, upsamplers=self.upsamplers, precision=self.precision, compile=self.compile)

    @property
    def size(self) -> int:
        """Side of the decoder's pictures in pixels."""
        return self.unclip.decoder.net_config.image_size

    @property
    def settings(self) -> dict[str, Any]:
        """The weights and the precision, as plain values."""
        prior = None if self.prior is None else weights_of(DEFAULT_PRIORS.get(self.prior, Path(self.prior)))
        upsamplers = [weights_of(DEFAULT_UPSAMPLERS.get(name, Path(name))) for name in self.upsamplers]
        return {"decoder": weights_of(self.decoder), "prior": prior, "upsamplers": upsamplers, "precision": self.precision}
