"""Crops of images at the high resolution and their degraded low-resolution conditions.

Upsamplers train on them. No CLIP is read.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unclip_pl.data.bad_samples import BadSample
from unclip_pl.data.decoding import decode_uncut
from unclip_pl.data.degradation import DegradationConfig, degrade
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.datamodules.base import ShardData, Spec

FACTOR = 4
"""Side of the high resolution over that of the low resolution."""
MAX_DRAWS = 8
"""Places that are tried for a training crop which is not of one colour."""


@dataclass(frozen=True)
class CropsConfig:
    """Which crops of an image an upsampler trains on."""

    per_image: int = 1
    """Crops of each image that is decoded. All are in one batch, which then has batch_size times as
    many: useful where decoding is the bottleneck."""
    avoid_flat: bool = False
    """Draw a place again, up to 7 times, while all pixels of its crop are equal. More of each batch
    then shows edges where drawings have wide margins, and almost none of it flat areas."""

    def __post_init__(self) -> None:
        if self.per_image < 1:
            raise ValueError(f"data.crops.per_image is {self.per_image}: give 1 or more.")


@dataclass(frozen=True)
class CropTransform:
    """Makes crops of an image, from its bytes.

    It adds `image` (K, 3, C, C) and `low_res` (K, 3, C/4, C/4) of the same crops, both float32 in
    [-1, 1].

    In training there are K crops at random places, as `crops` says; in validation the centre,
    K = 1. Places and degradation follow only from (seed, epoch, key).
    """

    image_size: int
    crop: int
    crops: CropsConfig
    degradation: DegradationConfig
    loader: LoaderConfig
    train: bool

    def __call__(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        key = sample["key"]
        picture = np.asarray(decode_uncut(sample["image"], self.image_size, self.loader.exact_jpeg))
        height, width = picture.shape[:2]
        if min(height, width) < self.crop:
            raise BadSample(
                f"its image has {width} x {height} pixels, less than the crop of {self.crop}"
            )
        digest = hashlib.sha256(f"{self.loader.seed} {epoch} {key}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        images = [
            torch.from_numpy(crop.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)
            for crop in self._crops(picture, generator)
        ]
        low_res = [degrade(image, self.degradation, generator, FACTOR) for image in images]
        return {"key": key, "image": torch.stack(images), "low_res": torch.stack(low_res)}

    def _crops(self, picture: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Views (C, C, 3) of the picture (H, W, 3)."""
        side = self.crop
        room = np.array(picture.shape[:2]) - side
        if not self.train:
            top, left = room // 2
            yield picture[top : top + side, left : left + side]
            return
        for _ in range(self.crops.per_image):
            for _ in range(MAX_DRAWS if self.crops.avoid_flat else 1):
                top, left = generator.integers(0, room + 1)
                crop = picture[top : top + side, left : left + side]
                if (crop != crop[0, 0]).any():
                    break
            yield crop


class UpsamplerData(ShardData):
    """Crops for an upsampler.

    A batch has `key` (list of B strings), `image` (B, 3, C, C) and `low_res` (B, 3, C/4, C/4), made
    of the same crops and degraded, both float32 in [-1, 1]. Images whose short side is larger than
    `image_size` are made smaller first, others are taken as they are: none is ever enlarged.

    Args:
        train, val: "openmoji", drawn at `image_size` from the SVGs, or shards of images; captions
            are not needed.
        image_size: side of the upsampler's output.
        crop: side of a training crop; null: a quarter of `image_size` (unCLIP Table 3).
        val_crop: side of the centre crop in validation; null: as `crop`.
        crops: how many training crops per image, and whether flat ones are avoided.
        degradation: how `low_res` is degraded.
        loader: images per batch, workers, seed.
    """

    def __init__(
        self,
        train: Spec = "openmoji",
        val: Spec | None = "openmoji",
        image_size: int = 256,
        crop: int | None = None,
        val_crop: int | None = None,
        crops: CropsConfig = CropsConfig(),
        degradation: DegradationConfig = DegradationConfig(),
        loader: LoaderConfig = LoaderConfig(),
    ) -> None:
        super().__init__(train, val, image_size, loader=loader)
        self.crop = image_size // 4 if crop is None else crop
        self.val_crop = self.crop if val_crop is None else val_crop
        self.crops, self.degradation = crops, degradation
        for name, side in {"crop": self.crop, "val_crop": self.val_crop}.items():
            if not 0 < side <= image_size or side % FACTOR:
                raise ValueError(
                    f"data.{name} is {side}: give a multiple of {FACTOR} up to data.image_size, "
                    f"{image_size}."
                )

    @property
    def decoded_size(self) -> int | None:
        return None

    def sample_transform(self, train: bool) -> CropTransform:
        crop = self.crop if train else self.val_crop
        return CropTransform(
            self.image_size, crop, self.crops, self.degradation, self.config, train
        )

    def on_before_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        count = batch["image"].shape[1]  # crops per image
        keys: Sequence[str] = batch["key"]
        return {
            "key": [key for key in keys for _ in range(count)],
            "image": batch["image"].flatten(0, 1),
            "low_res": batch["low_res"].flatten(0, 1),
        }
