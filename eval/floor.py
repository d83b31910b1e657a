"""The real images, and the floor: figures of real images against other real ones.

Both sets have as many images as in the comparison itself.

A Frechet distance of finite sets is never 0, and KID spreads about 0. These figures cannot
distinguish images at the floor from real ones, and of two sets at the floor none is called better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval import distances
from eval.captions import Caption
from eval.commands import RunOptions, progress
from eval.evaluator import Evaluator, ImageFeatures, caption_images, gather_ranks, number_rows
from eval.extract import reference_features
from eval.features import Features
from eval.stored import StoredImages
from unclip_pl.data.openmoji import openmoji_shards
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError

MOST_BIAS = 1.02
"""How much further apart a smaller reference may set two sets; the bias goes with 1/N + 1/M."""
REPEATS = 20
"""Pairs of random sets that the floor is the mean over."""
LEAST = 4
"""Captions, and real images, that a comparison takes: KID of a random half takes two of each."""
NO_FLOOR = "No floor: it takes {} real images, which are not known here; name them with --floor."


@dataclass(frozen=True)
class Floor:
    """Figures of real images: by key the mean over pairs of sets, and what 97.5 % stay below.

    Args:
        count: images in the set that stands for the drawn ones.
        reference: images in the other set.
    """

    count: int
    reference: int
    mean: Mapping[str, float]
    high: Mapping[str, float]

    def reached_by(self, figures: Mapping[str, Any]) -> list[str]:
        """The names of those figures that are no worse than those of real images."""
        return [name for name, high in self.high.items() if figures[name] <= high]

    def near(self, figures: Mapping[str, Any]) -> list[str]:
        """The names of those whose interval of 95 % reaches what real images have.

        Args:
            figures: with the `_se` of each.
        """
        lows = {name: figures[name] - 1.96 * figures[f"{name}_se"] for name in self.high}
        return [name for name, high in self.high.items() if lows[name] <= high]


def check_enough(count: int, what: str) -> None:
    """UserError where there are too few captions or real images; `what` names them."""
    if count < LEAST:
        raise UserError(
            f"{count} {what} are too few for KID, precision, recall and their intervals: give "
            f"{LEAST} or more."
        )


def compute_floor(
    real: Tensor, count: int, reference: int, key: str, seed: int = 0
) -> Floor | None:
    """Compute the floor of the Frechet distance and of `kid`.

    Args:
        real: (P, D) features of real images.
        count: images in the set that stands for the drawn ones.
        reference: images in the other set; no image is in both.
        key: the name of the Frechet distance in the result.
        seed: of the random sets.

    Returns:
        None where `real` has too few for both. Where it is a little too small (`real` may be the
        reference itself), the second set is smaller, if that moves the floor by no more than 2 %.
    """
    rest = min(reference, len(real) - count)
    if rest < 2 or 1 / count + 1 / rest > MOST_BIAS * (1 / count + 1 / reference):
        return None
    reference = rest
    generator = torch.Generator().manual_seed(seed)
    distances_between = []
    for _ in range(REPEATS):
        order = torch.randperm(len(real), generator=generator)
        sets = real[order[:reference]], real[order[reference : reference + count]]
        distances_between.append(_distances(*sets, key))
    return _floor(count, reference, distances_between)


def gather_stored(network: Features, images: StoredImages, options: RunOptions) -> Tensor:
    """Features (P, D) of stored images from all ranks, on the GPU where one computes."""
    rows = number_rows(reference_features(network, images, options.batch_size))
    real = gather_ranks(rows, options.device).features
    return real.to(options.device) if options.device.startswith("cuda") else real


def floor_or_note(
    real: Tensor | None, count: int, reference: int, key: str, seed: int
) -> tuple[Floor | None, list[str]]:
    """`compute_floor` from the images of --floor, and a sentence where they are too few.

    `real` is None without that option.
    """
    if real is None:
        return None, []
    floor = compute_floor(real, count, reference, key, seed)
    if floor is not None:
        return floor, []
    needed = count + reference
    return None, [f"No floor: it takes {needed} real images, and --floor has {len(real)}."]


def reached_on_other_pictures(
    real: Tensor, images: Sequence[ImageFeatures], key: str, seed: int = 0
) -> list[str]:
    """Name the figures by which drawn images are as near to other captions' pictures as real ones.

    Images that resemble the pictures of their own captions lie nearer to these than other real
    images do, even where anyone could tell them from real ones. So random halves of the captions
    give the reference, and the others the drawn images, or the real ones for the floor.

    Args:
        real: (N, D) features of the captions' own pictures.
        images: sets of drawn images in the order of the captions.
        key: the name of the Frechet distance; the other figure is `kid`.
        seed: of the random halves.
    """
    generator, half = torch.Generator().manual_seed(seed), len(real) // 2
    between_real, drawn = [], []
    for _ in range(REPEATS):
        order = torch.randperm(len(real), generator=generator)
        reference, others = real[order[:half]], order[half : 2 * half]
        between_real.append(_distances(reference, real[others], key))
        drawn += [_distances(reference, one.features[others], key) for one in images]
    return _floor(half, half, between_real).reached_by(_floor(half, half, drawn).mean)


def _distances(a: Tensor, b: Tensor, key: str) -> dict[str, float]:
    return {key: distances.frechet(a, b), "kid": distances.kid(a, b).value}


def _floor(count: int, reference: int, values: Sequence[Mapping[str, float]]) -> Floor:
    """The floor from the distances of pairs of sets."""
    rows = {
        name: torch.tensor([one[name] for one in values], dtype=torch.float64) for name in values[0]
    }
    mean = {name: row.mean().item() for name, row in rows.items()}
    high = {name: mean[name] + 1.96 * row.std().item() for name, row in rows.items()}
    return Floor(count, reference, mean, high)


@dataclass(frozen=True)
class ReferenceOptions:
    """Which images are the real ones.

    Args:
        reference: real images, a folder or shards; by default the captions' own
        floor: more real images, a folder or shards, for the figures of real ones against real
            ones; by default those of --reference, else OpenMoji's training drawings with its
            captions
    """

    reference: str | None = None
    floor: str | None = None

    def require(self) -> None:
        """UserError for the first of the folders without images, before anything is loaded."""
        for path in (self.reference, self.floor):
            if path is not None:
                StoredImages(path)

    def images(self, captions: str, size: int, options: RunOptions) -> "RealImages":
        """The real images for what is drawn, `captions`, cut to `size` pixels."""
        return RealImages(
            captions, size, self.reference, self.floor, options.batch_size, options.device
        )


@dataclass(frozen=True)
class RealImages:
    """The real images that drawn ones are compared with.

    Args:
        captions: what is drawn, as `eval.captions.read_captions` has it.
        size: side in pixels that they are cut to.
        reference: a folder or shards; None: the captions' own pictures.
        floor: a folder or shards of more; None: see `ReferenceOptions`.
        batch_size: images per batch.
        device: of the ranks' exchange.
    """

    captions: str
    size: int
    reference: str | None = None
    floor: str | None = None
    batch_size: int = 32
    device: str = "cpu"

    def check(self, captions: Sequence[Caption]) -> None:
        """UserError where there is nothing to compare drawn images with, or too few are drawn."""
        if not self.reference and not all(caption.image for caption in captions):
            raise UserError(
                f"The captions of {self.captions} have no pictures to compare with: give real ones "
                "with --reference."
            )
        check_enough(len(captions), "captions")

    def features(self, evaluator: Evaluator, captions: Sequence[Caption]) -> ImageFeatures:
        """This rank's share: those of the reference, or the captions' own with their numbers."""
        if self.reference:
            return number_rows(self._stored(evaluator, self.reference))
        batches = caption_images(captions, self.size, self.batch_size)
        return evaluator.extract(progress(batches, len(captions), "reference"))

    @property
    def floor_path(self) -> str | None:
        """Where the real images for the floor are; None: not known."""
        path = self.floor or self.reference
        if path is None and self.captions == "openmoji":
            path = str(openmoji_shards(self.size) / "train-*.tar")
        return path

    def floor_features(self, evaluator: Evaluator) -> Tensor | None:
        """Features (P, D) of the real images that give the floor; None where none are known."""
        path = self.floor_path
        if path is None:
            return None
        return gather_ranks(number_rows(self._stored(evaluator, path)), self.device).features

    def _stored(self, evaluator: Evaluator, path: str) -> Tensor:
        images = StoredImages(path, rank(), world_size(), size=self.size)
        return reference_features(evaluator.network, images, self.batch_size)
