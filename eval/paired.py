"""Figures of sets of pictures of the same captions, and differences between them, with intervals.

A set has one or several pictures per caption: a list of `Seen`, one for each seed. Its figure is
the mean over the seeds, each with one picture per caption, so that the number of seeds does not
move a figure that depends on the number of pictures. Intervals are over captions only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from eval import distances, metrics
from eval.common import Figures
from eval.judge import Seen
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """Of a figure between two sets of pictures of the same captions, with its 95 % interval.

    `at_floor`: both sets are as near to the reference as other real pictures are, so that nothing
    is said about which is better.
    """

    value: float
    low: float
    high: float
    at_floor: bool = False

    @property
    def sure(self) -> bool:
        """Whether 0 lies outside of the interval of figures above the floor."""
        return not self.at_floor and (self.low > 0 or self.high < 0)


def per_caption(
    values: Callable[[Tensor, Tensor], Tensor], seen: Sequence[Seen], text: Tensor
) -> Tensor:
    """(N,) float64 of each caption: the mean over its pictures.

    Args:
        values: (N, E) image embeddings, (N, E) text embeddings -> (N,).
        seen: a set, all in the order of their captions.
        text: (M, E) of all captions.
    """
    return torch.stack([values(one.image_embed, text[one.number]) for one in seen]).mean(0)


def found_first(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """(N,) 1.0 where a picture's own caption is the nearest of all."""
    rows = (torch.nn.functional.normalize(x.double(), dim=1) for x in (image_embed, text_embed))
    return (metrics.retrieval_ranks(*rows) <= 1).double()


def score_of(seen: Sequence[Seen], text: Tensor) -> Figures:
    """`clip_score` with `_se`, `_low` and `_high` (95 %), over captions."""
    values = per_caption(metrics.clip_scores, seen, text)
    found = distances.Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item())
    names = ("clip_score", "clip_score_se", "clip_score_low", "clip_score_high")
    return dict(zip(names, (found.value, found.error, *found.interval), strict=True))


def spread(real: Tensor, seen: Sequence[Seen], resamples: int, seed: int, key: str) -> Figures:
    """`_se`, `_low` and `_high` of the Frechet distance `key`, by `distances.bootstrap`.

    Args:
        real: (M, D) features of the reference.
        seen: a set of pictures; halves of captions are drawn, each with all of its pictures.
    """

    def distance(real: Tensor, chosen: Tensor) -> float:
        reference = distances.gaussian(real)
        return fmean(_frechet(reference, one.features[chosen]) for one in seen)

    everything = torch.arange(len(seen[0].number))
    found = distances.bootstrap(distance, real, everything, resamples, seed)
    low, high = found.interval
    return {f"{key}_se": found.error, f"{key}_low": low, f"{key}_high": high}


def kernel_distances(real: Tensor, fake: Tensor, real_in: Tensor, fake_in: Tensor) -> Tensor:
    """KID of R pairs of subsets at once: (R,) float64, each as `distances.kernel` has it.

    Args:
        real, fake: features (M, D), (N, D).
        real_in, fake_in: (M, R), (N, R) float64, 1 where a row is in the subset, else 0.
    """

    def sums(x: Tensor, y: Tensor, x_in: Tensor, y_in: Tensor) -> Tensor:
        total = torch.zeros(x_in.shape[1], dtype=torch.float64)
        for rows, kept in zip(x.split(distances.BLOCK), x_in.split(distances.BLOCK), strict=True):
            kernel = _cubic(rows.double() @ y.double().T, y)
            total += (kept * (kernel @ y_in)).sum(0)
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
    a: Sequence[Seen],
    b: Sequence[Seen],
    text: Tensor,
    real: Tensor | None,
    resamples: int = 500,
    seed: int = 0,
    paired: bool = True,
    key: str = "fd",
) -> dict[str, Difference]:
    """b less a: of the Frechet distance, under `key`, of `kid`, `clip_score` and `r1`.

    Intervals are of what the sets differ by over random halves of the captions, the same ones for
    both. Halves, drawn without replacement, spread as fresh sets of the whole size do (see
    `distances.bootstrap`). Where they lie says nothing, for the Frechet distance of halves is more
    biased: the interval is the value +- 1.96 times the spread.

    Args:
        a, b: sets of pictures in the order of their captions.
        text: (N, E) embeddings of all captions.
        real: (M, D) features of the reference; None: `clip_score` and `r1` only.
        paired: row k of the reference belongs to caption k, and goes into the halves that it does;
            else halves of the reference are drawn too.

    Raises:
        UserError: the sets are not of the same captions.
    """
    number = a[0].number
    if not all(torch.equal(number, one.number) for one in (*a, *b)):
        raise UserError(
            "The two sets of pictures are not of the same captions: draw both from the same ones."
        )
    generator, n = torch.Generator().manual_seed(seed), len(number)
    halves = [torch.randperm(n, generator=generator)[: n // 2] for _ in range(resamples)]
    found = {}
    for name, values in {"clip_score": metrics.clip_scores, "r1": found_first}.items():
        apart = per_caption(values, b, text) - per_caption(values, a, text)
        found[name] = _interval(apart.mean().item(), [apart[half].mean().item() for half in halves])
    if real is None:
        return found
    m = len(real)
    others = (
        halves
        if paired
        else [torch.randperm(m, generator=generator)[: m // 2] for _ in range(resamples)]
    )
    subsets = [(torch.arange(n), torch.arange(m)), *zip(halves, others, strict=True)]
    value, *draws = (_frechet_apart(a, b, real[other], half) for half, other in subsets)
    found[key] = _interval(value, draws)
    fake_in, real_in = (
        torch.stack(
            [torch.zeros(size, dtype=torch.float64).index_fill(0, rows, 1) for rows in some], 1
        )
        for size, some in zip((n, m), zip(*subsets, strict=True), strict=True)
    )
    kids = [
        torch.stack([kernel_distances(real, one.features, real_in, fake_in) for one in some]).mean(
            0
        )
        for some in (a, b)
    ]
    value, *draws = (kids[1] - kids[0]).tolist()
    found["kid"] = _interval(value, draws)
    return found


def _frechet_apart(a: Sequence[Seen], b: Sequence[Seen], real: Tensor, chosen: Tensor) -> float:
    """The Frechet distance of b less that of a, over some captions."""
    reference = distances.gaussian(real)
    means = [fmean(_frechet(reference, one.features[chosen]) for one in some) for some in (a, b)]
    return means[1] - means[0]


def _frechet(reference: distances.Gaussian, features: Tensor) -> float:
    return distances.frechet_of(reference, distances.gaussian(features))


def _interval(value: float, draws: list[float]) -> Difference:
    spread = 1.96 * torch.tensor(draws, dtype=torch.float64).std().item()
    return Difference(value, value - spread, value + spread)
