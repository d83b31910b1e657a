"""Figures of sets of images of the same captions, and differences between them, with intervals.

A set has one or several images per caption: a list of `ImageFeatures`, one for each seed. Its
figure is the mean over the seeds, each with one image per caption, so that the number of seeds does
not move a figure that depends on the number of images. Intervals are over captions only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from eval import distances, metrics
from eval.commands import Figures
from eval.evaluator import ImageFeatures
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """Of a figure between two sets of images of the same captions, with its 95 % interval.

    `at_floor`: both sets are as near to the reference as other real images are, so that nothing is
    said about which is better.
    """

    value: float
    low: float
    high: float
    at_floor: bool = False

    @property
    def sure(self) -> bool:
        """Whether the figures are above the floor and 0 lies outside of the interval."""
        return not self.at_floor and (self.low > 0 or self.high < 0)


def per_caption(
    score: Callable[[Tensor, Tensor], Tensor], images: Sequence[ImageFeatures], text: Tensor
) -> Tensor:
    """(N,) float64 of each caption: the mean over its images.

    Args:
        score: (N, E) image embeddings, (N, E) text embeddings -> (N,).
        images: a set, each in the order of the captions.
        text: (M, E) of all captions.
    """
    return torch.stack([score(one.image_embed, text[one.number]) for one in images]).mean(0)


def own_caption_first(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """(N,) 1.0 where an image's own caption is the nearest of all, else 0.0."""
    rows = (torch.nn.functional.normalize(x.double(), dim=1) for x in (image_embed, text_embed))
    return (metrics.retrieval_ranks(*rows) <= 1).double()


def mean_clip_score(images: Sequence[ImageFeatures], text: Tensor) -> Figures:
    """`clip_score` with `_se`, `_low` and `_high` (95 %), over captions."""
    scores = per_caption(metrics.clip_scores, images, text)
    error = (scores.std() / len(scores) ** 0.5).item()
    estimate = distances.Estimate(scores.mean().item(), error)
    low, high = estimate.interval
    return {
        "clip_score": estimate.value,
        "clip_score_se": error,
        "clip_score_low": low,
        "clip_score_high": high,
    }


def frechet_interval(
    real: Tensor, images: Sequence[ImageFeatures], resamples: int, seed: int, key: str
) -> Figures:
    """`_se`, `_low` and `_high` of the Frechet distance `key`, by `distances.bootstrap`.

    Args:
        real: (M, D) features of the reference.
        images: a set; halves of its captions are drawn, each with all of its images.
        resamples: halves that are drawn.
        seed: of the halves.
        key: the name of the Frechet distance, to which the endings are added.
    """

    def distance(real: Tensor, captions: Tensor) -> float:
        reference = distances.gaussian(real)
        return fmean(_frechet(reference, one.features[captions]) for one in images)

    captions = torch.arange(len(images[0].number))
    estimate = distances.bootstrap(distance, real, captions, resamples, seed)
    low, high = estimate.interval
    return {f"{key}_se": estimate.error, f"{key}_low": low, f"{key}_high": high}


def subset_kids(real: Tensor, fake: Tensor, real_in: Tensor, fake_in: Tensor) -> Tensor:
    """Compute KID of R pairs of subsets at once: (R,) float64, each as `distances.kid` does.

    Args:
        real: features of the reference, (M, D).
        fake: features of the evaluated images, (N, D).
        real_in: (M, R) float64, 1 where a row of `real` is in the subset, else 0.
        fake_in: (N, R) float64, the same for `fake`.
    """

    def sums(x: Tensor, y: Tensor, x_in: Tensor, y_in: Tensor) -> Tensor:
        total = torch.zeros(x_in.shape[1], dtype=torch.float64)
        for rows, rows_in in zip(
            x.split(distances.BLOCK), x_in.split(distances.BLOCK), strict=True
        ):
            kernel = _cubic(rows.double() @ y.double().T, y)
            total += (rows_in * (kernel @ y_in)).sum(0)
        return total

    def within(x: Tensor, x_in: Tensor) -> Tensor:
        count = x_in.sum(0)
        own = _cubic(x.double().square().sum(1), x) @ x_in
        return (sums(x, x, x_in, x_in) - own) / (count * (count - 1))

    across = sums(real, fake, real_in, fake_in) / (real_in.sum(0) * fake_in.sum(0))
    return within(real, real_in) + within(fake, fake_in) - 2 * across


def _cubic(products: Tensor, x: Tensor) -> Tensor:
    return (products / x.shape[1] + 1) ** 3


def paired_differences(
    a: Sequence[ImageFeatures],
    b: Sequence[ImageFeatures],
    text: Tensor,
    real: Tensor | None,
    resamples: int = 500,
    seed: int = 0,
    paired: bool = True,
    key: str = "fd",
) -> dict[str, Difference]:
    """b less a: of the Frechet distance, under `key`, of `kid`, `clip_score` and `r1`.

    Intervals are of what the sets differ by over random halves of the captions, the same halves for
    both. Halves, drawn without replacement, spread as new sets of the full size do (see
    `distances.bootstrap`). Their mean is not used, because the Frechet distance of halves is more
    biased: the interval is the value +- 1.96 times the spread.

    Args:
        a: sets of images, each in the order of the captions.
        b: other sets of images of the same captions.
        text: (N, E) embeddings of all captions.
        real: (M, D) features of the reference; None: `clip_score` and `r1` only.
        resamples: halves that are drawn.
        seed: of the halves.
        paired: row k of the reference belongs to caption k and goes into the same halves; else
            halves of the reference are drawn too.
        key: the name of the Frechet distance in the result.

    Raises:
        UserError: the sets are not of the same captions.
    """
    number = a[0].number
    if not all(torch.equal(number, one.number) for one in (*a, *b)):
        raise UserError(
            "The two sets of images are not of the same captions: draw both from the same ones."
        )
    generator = torch.Generator().manual_seed(seed)
    halves = _halves(len(number), resamples, generator)
    differences = {}
    for name, score in {"clip_score": metrics.clip_scores, "r1": own_caption_first}.items():
        apart = per_caption(score, b, text) - per_caption(score, a, text)
        means = [apart[half].mean().item() for half in halves]
        differences[name] = _interval(apart.mean().item(), means)
    if real is None:
        return differences
    real_halves = halves if paired else _halves(len(real), resamples, generator)
    # The full sets come first: they give the value, the halves its spread.
    subsets = [torch.arange(len(number)), *halves]
    real_subsets = [torch.arange(len(real)), *real_halves]
    value, *values = (
        _frechet_difference(a, b, real[rows], captions)
        for captions, rows in zip(subsets, real_subsets, strict=True)
    )
    differences[key] = _interval(value, values)
    inside = _membership(len(number), subsets)
    real_inside = _membership(len(real), real_subsets)

    def mean_kids(images: Sequence[ImageFeatures]) -> Tensor:
        kids = [subset_kids(real, one.features, real_inside, inside) for one in images]
        return torch.stack(kids).mean(0)

    value, *values = (mean_kids(b) - mean_kids(a)).tolist()
    differences["kid"] = _interval(value, values)
    return differences


def _halves(count: int, resamples: int, generator: torch.Generator) -> list[Tensor]:
    """Random halves of 0 .. count - 1."""
    permutations = (torch.randperm(count, generator=generator) for _ in range(resamples))
    return [permutation[: count // 2] for permutation in permutations]


def _membership(count: int, subsets: Sequence[Tensor]) -> Tensor:
    """(count, R) float64: 1 where a row is in the subset, else 0."""
    inside = torch.zeros(count, len(subsets), dtype=torch.float64)
    for column, rows in enumerate(subsets):
        inside[rows, column] = 1
    return inside


def _frechet_difference(
    a: Sequence[ImageFeatures], b: Sequence[ImageFeatures], real: Tensor, captions: Tensor
) -> float:
    """The Frechet distance of b less that of a, over a subset of the captions."""
    reference = distances.gaussian(real)

    def mean(images: Sequence[ImageFeatures]) -> float:
        return fmean(_frechet(reference, one.features[captions]) for one in images)

    return mean(b) - mean(a)


def _frechet(reference: distances.Gaussian, features: Tensor) -> float:
    return distances.gaussian_frechet(reference, distances.gaussian(features))


def _interval(value: float, values: list[float]) -> Difference:
    """The value with 1.96 times the spread of the values over subsets."""
    spread = 1.96 * torch.tensor(values, dtype=torch.float64).std().item()
    return Difference(value, value - spread, value + spread)
