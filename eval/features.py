"""Networks that turn images into features: uint8 (B, 3, H, W) -> float (B, D).

clean-fid's Inception, which is what FID means; a CLIP; any callable.
"""

import functools
import hashlib
import json
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file, cache_dir, file_lock

INCEPTION = "inception-2015-12-05.pt"


class Features(Protocol):
    """What the metrics need of a network."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def key(self) -> str | None:
        """Tells this network, its weights and its resizing from others in the cache of reference
        features; None: its features are not cached.
        """

    @property
    def is_clip(self) -> bool: ...

    @property
    def frechet(self) -> str:
        """The key of the Frechet distance of its features: one of `eval.metrics.FRECHET`."""

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Network:
    """A function with a name and a width."""

    name: str
    dim: int
    function: Callable[[Tensor], Tensor]
    key: str | None = None
    frechet: str = "fd"

    @property
    def is_clip(self) -> bool:
        """Whether it is a CLIP's image encoder."""
        return self.frechet == "fd_clip"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float (B, D)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self.name} was given images {tuple(images.shape)} of {images.dtype}: give uint8 "
                "(B, 3, H, W)."
            )
        features = self.function(images)
        if features.shape != (len(images), self.dim):
            raise UserError(
                f"{self.name} gave features {tuple(features.shape)} for {len(images)} images, and "
                f"{(len(images), self.dim)} were expected."
            )
        return features


def named(name: str, device: str | torch.device = "cpu", precision: str = "fp32") -> Features:
    """The network of a name: "clip" (the embedded one), "inception", or a CLIP as `CLIPConfig` has
    it, such as "ViT-L-14-quickgelu/openai" or "local-dir:/folder".
    """
    if name == "inception":
        return inception(device)
    return clip_features(
        FrozenCLIP(
            CLIPConfig("openmoji", precision=precision)
            if name == "clip"
            else clip_config(name, precision),
            device,
        )
    )


def clip_config(name: str, precision: str = "fp32") -> CLIPConfig:
    """ "NAME", "NAME/TAG" (open_clip's), "local-dir:/folder" or "openmoji" -> its configuration."""
    if name.startswith("local-dir:"):
        return CLIPConfig(name, precision=precision)
    model, _, tag = name.partition("/")
    return CLIPConfig(model, tag or None, precision)


def clip_features(clip: FrozenCLIP) -> Features:
    """The image embeddings of a CLIP, with its own resizing."""
    digest = hashlib.sha256(json.dumps(clip.fingerprint(), sort_keys=True).encode()).hexdigest()[
        :16
    ]

    def features(images: Tensor) -> Tensor:
        return clip.embed_images(images.to(clip.device).float() / 127.5 - 1)

    return Network(f"CLIP {clip.config}", clip.embed_dim, features, f"clip-{digest}", "fd_clip")


def of_callable(name: str, function: Callable[[Tensor], Tensor], dim: int) -> Features:
    """Any torch function of uint8 (B, 3, H, W)."""
    return Network(name, dim, function)


def inception(device: str | torch.device = "cpu") -> Features:
    """clean-fid's Inception (the TorchScript of 2015, 2048 features) behind clean-fid's resizing to
    299 x 299, which keeps no aspect.

    Raises:
        UserError: the weights are not in the cache folder and cannot be fetched, or the file there
            is another one.
    """
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    file, resize = inception_file(), build_resizer("clean")
    try:
        network = InceptionV3W(str(file.parent), download=False).to(device).eval()
    except (RuntimeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{file} is not clean-fid's Inception ({str(error).splitlines()[0]}): "
            "delete it, or put the right file there."
        ) from error

    def features(images: Tensor) -> Tensor:
        pixels = [
            torch.from_numpy(resize(image)) for image in images.permute(0, 2, 3, 1).cpu().numpy()
        ]
        return network(torch.stack(pixels).permute(0, 3, 1, 2).contiguous().to(device))

    return Network("Inception", 2048, features, f"inception-{_digest(file)}", "fid")


def inception_file() -> Path:
    """Where clean-fid's Inception is in our cache folder, fetched there if it is not.

    clean-fid's own download has no time limit, and where it is cut off or two processes do it at
    once it leaves a broken file. This one is done by one process, with a time limit, and leaves the
    whole file or none.
    """
    from cleanfid.downloads_helper import inception_url

    file = cache_dir() / INCEPTION
    if file.exists():
        return file
    with file_lock(file.with_suffix(".lock")):
        if not file.exists():
            try:
                with (
                    urllib.request.urlopen(inception_url, timeout=30) as answer,
                    atomic_file(file) as target,
                ):
                    shutil.copyfileobj(answer, target)
                    expected = answer.headers.get("Content-Length")
                    if expected and target.tell() != int(expected):
                        raise OSError(f"{target.tell()} of {expected} bytes came")
            except OSError as error:
                raise UserError(
                    f"Inception's weights cannot be fetched ({error}): download {inception_url} "
                    "elsewhere "
                    f"and put it at {file} (UNCLIP_CACHE names that folder), or choose other "
                    "features with --features."
                ) from error
    return file


@functools.cache
def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
