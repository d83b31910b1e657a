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
from unclip_pl.clip.fingerprint import Fingerprint
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file, cache_dir, file_lock

INCEPTION = "inception-2015-12-05.pt"
TIMEOUT = 30
"""Seconds without an answer until a download is given up."""


class Features(Protocol):
    """What the metrics need of a network."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def key(self) -> str | None:
        """The name under which features of a reference are cached; None: they are not cached.

        It names the network, its weights and its resizing.
        """

    @property
    def is_clip(self) -> bool: ...

    @property
    def frechet(self) -> str:
        """The key of the Frechet distance of its features: one of `eval.metrics.FRECHET`."""

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of a CLIP; None for other networks."""

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Network:
    """A function with a name and a width.

    Args:
        function: uint8 (B, 3, H, W) -> float (B, dim).
        key, frechet, fingerprint: see `Features`.
    """

    name: str
    dim: int
    function: Callable[[Tensor], Tensor]
    key: str | None = None
    frechet: str = "fd"
    fingerprint: Fingerprint | None = None

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
        expected = (len(images), self.dim)
        if features.shape != expected:
            raise UserError(
                f"{self.name} gave features {tuple(features.shape)} for {len(images)} images, and "
                f"{expected} were expected."
            )
        return features


def load_features(
    name: str, device: str | torch.device = "cpu", precision: str = "fp32"
) -> Features:
    """Load the network that computes features, by its name.

    Args:
        name: "inception"; "clip", the CLIP in the package that conditions; or a CLIP as
            `clip_config` has it, such as "ViT-L-14-quickgelu/openai" or "local-dir:/folder".
        device: where it runs.
        precision: "fp32" or "bf16", of a CLIP.
    """
    if name == "inception":
        return inception_features(device)
    config = clip_config("openmoji" if name == "clip" else name, precision)
    return clip_features(FrozenCLIP(config, device))


def clip_config(name: str, precision: str = "fp32") -> CLIPConfig:
    """ "NAME", "NAME/TAG" (open_clip's), "local-dir:/folder" or "openmoji" -> its configuration."""
    if name.startswith("local-dir:"):
        return CLIPConfig(name, precision=precision)
    model, _, tag = name.partition("/")
    return CLIPConfig(model, tag or None, precision)


def clip_features(clip: FrozenCLIP) -> Features:
    """The image embeddings of a CLIP, with its own resizing."""
    fingerprint = clip.fingerprint()
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]

    def embed(images: Tensor) -> Tensor:
        return clip.embed_images(images.to(clip.device).float() / 127.5 - 1)

    name, key = f"CLIP {clip.config}", f"clip-{digest}"
    return Network(name, clip.embed_dim, embed, key, "fd_clip", fingerprint)


def callable_features(name: str, function: Callable[[Tensor], Tensor], dim: int) -> Features:
    """Any torch function: uint8 (B, 3, H, W) -> float (B, dim)."""
    return Network(name, dim, function)


def inception_features(device: str | torch.device = "cpu") -> Features:
    """Load clean-fid's Inception network: images -> 2048 features.

    This is the TorchScript of 2015 behind clean-fid's resizing to 299 x 299, which does not keep
    the aspect ratio.

    Raises:
        UserError: the weights are not in the cache folder and cannot be downloaded, or the file
            there is another one.
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
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        pixels = torch.stack([torch.from_numpy(resize(array)) for array in arrays])
        return network(pixels.permute(0, 3, 1, 2).contiguous().to(device))

    return Network("Inception", 2048, features, f"inception-{_digest(file)}", "fid")


def inception_file() -> Path:
    """The file of clean-fid's Inception in the cache folder, downloaded if it is not there.

    clean-fid's own download has no time limit, and leaves a broken file where it is cut off or two
    processes do it at once. Here one process downloads, with a time limit, and the file is whole or
    not there.
    """
    file = cache_dir() / INCEPTION
    if file.exists():
        return file
    with file_lock(file.with_suffix(".lock")):
        if not file.exists():
            _download_inception(file)
    return file


def _download_inception(file: Path) -> None:
    from cleanfid.downloads_helper import inception_url

    try:
        with (
            urllib.request.urlopen(inception_url, timeout=TIMEOUT) as answer,
            atomic_file(file) as target,
        ):
            shutil.copyfileobj(answer, target)
            expected = answer.headers.get("Content-Length")
            if expected and target.tell() != int(expected):
                raise OSError(f"{target.tell()} of {expected} bytes came")
    except OSError as error:
        raise UserError(
            f"Inception's weights cannot be downloaded ({error}): download {inception_url} "
            f"elsewhere and put it at {file} (UNCLIP_CACHE names that folder), or choose other "
            "features with --features."
        ) from error


@functools.cache
def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
