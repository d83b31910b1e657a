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
from eval.floor import check_enough
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """Of a figure between two sets of images of the same captions, with its 95 % interval.

    `at_floor`: one set is as near to the reference as other real images are, and the other may be,
    so that nothing is said about which is better.
    """

    value: float
    low: float
    high: float
    at_floor: bool = False

    @property
    def sure(self) -> bool:
        """Whether 0 lies outside of the interval, and the floor does not forbid to say so."""
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


def distance_intervals(
    real: Tensor,
    images: Sequence[ImageFeatures],
    key: str,
    resamples: int = 200,
    seed: int = 0,
    paired: bool = True,
) -> Figures:
    """Compute `_se`, `_low` and `_high` of the Frechet distance `key`, and `kid_se`.

    They come from random halves of the captions (see `distances.bootstrap`).

    Args:
        real: (M, D) features of the reference.
        images: a set; each half of its captions has all of their images.
        resamples: halves that are drawn.
        seed: of the halves.
        key: the name of the Frechet distance, to which the endings are added.
        paired: row k of the reference belongs to caption k and goes into the same halves. Images
            that resemble their captions' pictures lie at a distance that varies much less than that
            of independent sets.

    Raises:
        UserError: there are too few captions or real images.
    """
    check_enough(len(images[0].number), "captions")
    check_enough(len(real), "real images")
    subsets = _Subsets.draw(len(images[0].number), len(real), resamples, seed, paired)
    value, *values = subsets.frechet(real, images)
    spread = _spread(values)
    low, high = distances.Estimate(value, spread).interval
    kid_se = _spread(subsets.kids(real, images)[1:])
    return {f"{key}_se": spread, f"{key}_low": low, f"{key}_high": high, "kid_se": kid_se}


def paired_kid(real: Tensor, images: Sequence[ImageFeatures]) -> Figures:
    """Compute `kid` and `kid_se` without own pairs: means over the images of a caption.

    Args:
        real: (N, D) features, row k of caption k's own picture.
        images: a set of drawn images.

    Raises:
        UserError: there are too few captions.
    """
    check_enough(len(real), "captions")
    estimates = [distances.kid(real, one.features, paired=True) for one in images]
    return {
        "kid": fmean(one.value for one in estimates),
        "kid_se": fmean(one.error for one in estimates),
    }


def subset_kids(
    real: Tensor, fake: Tensor, real_in: Tensor, fake_in: Tensor, paired: bool = False
) -> Tensor:
    """Compute KID of R pairs of subsets at once: (R,) float64, each as `distances.kid` does.

    Args:
        real: features of the reference, (M, D).
        fake: features of the evaluated images, (N, D).
        real_in: (M, R) float64, 1 where a row of `real` is in the subset, else 0.
        fake_in: (N, R) float64, the same for `fake`.
        paired: row k of `fake` was made for row k of `real`, and both are in the same subsets: see
            `distances.kid`.
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
        own = distances.cubic_rows(x, x) @ x_in
        return (sums(x, x, x_in, x_in) - own) / (count * (count - 1))

    total, count = sums(real, fake, real_in, fake_in), fake_in.sum(0)
    if paired:
        across = (total - distances.cubic_rows(real, fake) @ fake_in) / (count * (count - 1))
    else:
        across = total / (real_in.sum(0) * count)
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
        UserError: the sets are not of the same captions, or too few for the distances.
    """
    number = a[0].number
    if not all(torch.equal(number, one.number) for one in (*a, *b)):
        raise UserError(
            "The two sets of images are not of the same captions: draw both from the same ones."
        )
    if real is not None:
        check_enough(len(number), "captions")
        check_enough(len(real), "real images")
    real_count = len(number) if real is None else len(real)
    subsets = _Subsets.draw(len(number), real_count, resamples, seed, paired)
    differences = {}
    for name, score in {"clip_score": metrics.clip_scores, "r1": own_caption_first}.items():
        apart = per_caption(score, b, text) - per_caption(score, a, text)
        differences[name] = _interval([apart[rows].mean().item() for rows in subsets.captions])
    if real is None:
        return differences
    for name, distance in {key: subsets.frechet, "kid": subsets.kids}.items():
        pairs = zip(distance(real, b), distance(real, a), strict=True)
        differences[name] = _interval([of_b - of_a for of_b, of_a in pairs])
    return differences


@dataclass(frozen=True)
class _Subsets:
    """Rows of the captions and of the reference, with what is computed over each.

    All rows come first and give the value; then random halves, which give its spread.
    """

    captions: Sequence[Tensor]
    real: Sequence[Tensor]
    paired: bool

    @classmethod
    def draw(
        cls, count: int, real_count: int, resamples: int, seed: int, paired: bool
    ) -> "_Subsets":
        """With `paired` the same rows of both."""
        generator = torch.Generator().manual_seed(seed)
        captions = [torch.arange(count), *_halves(count, resamples, generator)]
        if paired:
            return cls(captions, captions, paired)
        others = [torch.arange(real_count), *_halves(real_count, resamples, generator)]
        return cls(captions, others, paired)

    def frechet(self, real: Tensor, images: Sequence[ImageFeatures]) -> list[float]:
        """The Frechet distance over each subset: the mean over the images of a caption."""
        values = []
        for captions, rows in zip(self.captions, self.real, strict=True):
            reference = distances.gaussian(real[rows])
            sets = (distances.gaussian(one.features[captions]) for one in images)
            values.append(fmean(distances.gaussian_frechet(reference, one) for one in sets))
        return values

    def kids(self, real: Tensor, images: Sequence[ImageFeatures]) -> list[float]:
        """KID over each subset: the mean over the images of a caption."""
        inside = _membership(len(images[0].number), self.captions)
        real_inside = _membership(len(real), self.real)
        kids = [subset_kids(real, one.features, real_inside, inside, self.paired) for one in images]
        return torch.stack(kids).mean(0).tolist()


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


def _interval(values: list[float]) -> Difference:
    """The first value with 1.96 times the spread of the others, which are over halves."""
    value, reach = values[0], 1.96 * _spread(values[1:])
    return Difference(value, value - reach, value + reach)


def _spread(values: list[float]) -> float:
    """The standard deviation."""
    return torch.tensor(values, dtype=torch.float64).std().item()
