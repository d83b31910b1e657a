"""The distances as `torchmetrics.Metric`s in float64.

They are updated with the features of a batch and compute a dict of figures; torchmetrics reduces
over ranks, whose shares must be disjoint. Keep them in a callback or an evaluator, never in a
LightningModule, or EMA and checkpoints would include them.
"""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from eval import distances
from unclip_pl.training.prior_monitor import median_rank
from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
FRECHET = {"fid": "FID", "fd_clip": "FD of CLIP", "fd": "FD"}
"""Keys of the Frechet distance with titles: of Inception's features, a CLIP's, any other's."""


def frechet_key(figures: Mapping[str, Any]) -> str:
    """The key that the Frechet distance has in a dict of figures: one of `FRECHET`."""
    return next(key for key in FRECHET if key in figures)


def check_features(features: Tensor, dim: int, what: str = "The features") -> Tensor:
    """Features (B, D) in float64.

    Raises:
        UserError: they have another shape, or are not finite.
    """
    if features.ndim != 2 or features.shape[1] != dim:
        raise UserError(
            f"{what} are {tuple(features.shape)}, and the metric is for (B, {dim}): give it the "
            "dim of their network."
        )
    features = features.detach().double()
    # The sum of a row is not finite where one of its numbers is not: cheaper than to test each.
    bad = int((~features.sum(1).isfinite()).sum())
    if bad:
        raise UserError(
            f"{what} of {bad} of {len(features)} images are not finite (NaN or infinite): look at "
            "these images, or compute with --precision fp32."
        )
    return features


class _Rows(Metric):
    """Keeps two lists of rows (B, D) and gathers them over ranks; a rank may have none.

    Args:
        dim: D.
    """

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False
    lists: tuple[str, str]
    """The names of the two lists."""
    least = 2
    """Rows that each list must have."""

    def __init__(self, dim: int, **metric: Any) -> None:
        super().__init__(**metric)
        self.dim = dim
        self.set_dtype(torch.float64)
        for name in self.lists:
            self.add_state(name, [], dist_reduce_fx="cat")

    def sync(self, *arguments: Any, **options: Any) -> None:
        for name in self.lists:
            rows = getattr(self, name)
            # torchmetrics gathers tensors with the same number of dimensions on each rank.
            if isinstance(rows, list) and not rows:
                rows.append(self._no_rows())
        super().sync(*arguments, **options)

    def rows(self, name: str) -> Tensor:
        """(N, D), of all ranks when called from `compute`."""
        rows = getattr(self, name)
        if isinstance(rows, Tensor):
            return rows
        return torch.cat(rows) if rows else self._no_rows()

    def _no_rows(self) -> Tensor:
        return torch.zeros(0, self.dim, dtype=torch.float64, device=self.device)


class TwoSets(_Rows):
    """Two sets of features, (N, D) and (M, D); a subclass computes its figures from both."""

    lists = ("real", "fake")
    real: list[Tensor]
    fake: list[Tensor]

    def update(self, features: Tensor, real: bool) -> None:
        """Add (B, D) to the reference set (`real`) or to the generated one."""
        (self.real if real else self.fake).append(
            check_features(features, self.dim).to(self.device)
        )

    def sets(self) -> tuple[Tensor, Tensor]:
        """The reference set and the generated one, over all ranks when called from `compute`."""
        real, fake = self.rows("real"), self.rows("fake")
        require_rows(self, self.least, len(real), len(fake))
        return real, fake


def require_rows(metric: Metric, least: int, *counts: int) -> None:
    """UserError where a set is too small for the metric to be defined."""
    if min(counts) < least:
        raise UserError(
            f"{type(metric).__name__} needs at least {least} images in each set, and they have "
            f"{' and '.join(map(str, counts))}: add images."
        )


class FrechetDistance(TwoSets):
    """The Frechet distance under `key`, from running sums.

    It keeps 2 D^2 numbers and at most D rows of each set, for any N.

    Args:
        dim: D, the width of the features.
        key: "fid" for Inception's features and for no others, "fd_clip" for a CLIP's, "fd" for any
            other network's.
    """

    higher_is_better = False

    def __init__(self, dim: int, key: str = "fd", **metric: Any) -> None:
        super().__init__(dim, **metric)
        self.key = key
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        for name in ("real", "fake"):
            count = torch.zeros((), dtype=torch.int64)
            self.add_state(f"{name}_count", count, dist_reduce_fx="sum")
            self.add_state(f"{name}_sum", zeros(dim), dist_reduce_fx="sum")
            self.add_state(f"{name}_product", zeros(dim, dim), dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Add (B, D) to the reference set (`real`) or to the generated one."""
        super().update(features, real)
        name = "real" if real else "fake"
        rows = getattr(self, name)
        if sum(map(len, rows)) >= max(self.dim, distances.BLOCK):
            block = torch.cat(rows)
            getattr(self, f"{name}_count").add_(len(block))
            getattr(self, f"{name}_sum").add_(block.sum(0))
            distances.add_gram(getattr(self, f"{name}_product"), block)
            rows.clear()

    def compute(self) -> dict[str, float]:
        """The distance, `n_real` and `n_fake`.

        Warns where there are fewer images than features, or sets of two sizes.
        """
        n_real, n_fake = self._count("real"), self._count("fake")
        require_rows(self, self.least, n_real, n_fake)
        for text in sample_size_warnings(self.dim, n_real, n_fake):
            warn_once(text)
        distance = distances.gaussian_frechet(self._gaussian("real"), self._gaussian("fake"))
        return {self.key: distance, "n_real": n_real, "n_fake": n_fake}

    def _count(self, name: str) -> int:
        return int(getattr(self, f"{name}_count")) + len(self.rows(name))

    def _gaussian(self, name: str) -> distances.Gaussian:
        rest, count = self.rows(name), int(getattr(self, f"{name}_count"))
        if not count:
            return distances.gaussian(rest)
        total, product = getattr(self, f"{name}_sum"), getattr(self, f"{name}_product")
        return distances.gaussian_from_sums(count, total, product, rest)


@functools.cache
def warn_once(text: str) -> None:
    """Log a sentence, once in this process: a sweep has many sets of the same sizes."""
    log.warning(text)


def sample_size_warnings(dim: int, n_real: int, n_fake: int) -> list[str]:
    """What the sizes of the sets do to the figures, in sentences; `dim` is that of the features."""
    warnings, least = [], min(n_real, n_fake)
    if least <= dim:
        warnings.append(
            f"A set has {least} images and the features have {dim} numbers: its covariance has "
            f"rank {least - 1} at most, and the Frechet distance comes out far too large. Compare "
            "it only with figures of the same two sizes, or use more images."
        )
    if n_real != n_fake:
        warnings.append(
            f"The sets have {n_real} and {n_fake} images: the Frechet distance is biased upwards "
            f"by about c (1/{n_real} + 1/{n_fake}), and recall falls with fewer generated images. "
            "Compare only with figures of the same two sizes."
        )
    return warnings


class FrechetSpread(TwoSets):
    """How sure the Frechet distance is, and what it would be without the bias of finite sets.

    With `key` "fid": `fid_se`, `fid_low`, `fid_high` (95 %) by the bootstrap over halves, and
    `fid_infinity`. The last is None where a set has fewer than 4 D images: there the distance is
    not linear in 1 / N.

    Args:
        resamples: halves that are drawn.
        seed: of the halves.
        key: as of `FrechetDistance`.
    """

    def __init__(
        self, dim: int, resamples: int = 100, seed: int = 0, key: str = "fd", **metric: Any
    ) -> None:
        super().__init__(dim, **metric)
        self.resamples, self.seed, self.key = resamples, seed, key

    def compute(self) -> dict[str, float | None]:
        # Sorted, so that the halves do not depend on the order of ranks and batches.
        real, fake = (rows[rows.double().sum(1).argsort()] for rows in self.sets())
        estimate = distances.bootstrap(distances.frechet, real, fake, self.resamples, self.seed)
        low, high = estimate.interval
        infinity = None
        if min(len(real), len(fake)) >= 4 * self.dim:
            infinity = distances.frechet_infinity(real, fake, self.seed)
        return {
            f"{self.key}_se": estimate.error,
            f"{self.key}_low": low,
            f"{self.key}_high": high,
            f"{self.key}_infinity": infinity,
        }


class KernelDistance(TwoSets):
    """`kid`, unbiased over all pairs, and its standard error `kid_se`."""

    higher_is_better = False
    least = 3

    def compute(self) -> dict[str, float]:
        estimate = distances.kid(*self.sets())
        return {"kid": estimate.value, "kid_se": estimate.error}


class CMMD(TwoSets):
    """`cmmd`; meant for CLIP's embeddings."""

    higher_is_better = False

    def compute(self) -> dict[str, float]:
        return {"cmmd": distances.cmmd(*self.sets())}


class PrecisionRecall(TwoSets):
    """`precision` and `recall`, by the k-th nearest neighbour."""

    higher_is_better = True

    def __init__(self, dim: int, k: int = 3, **metric: Any) -> None:
        super().__init__(dim, **metric)
        self.k, self.least = k, k + 1

    def compute(self) -> dict[str, float]:
        precision, recall = distances.precision_recall(*self.sets(), self.k)
        return {"precision": precision, "recall": recall}


class CLIPScore(Metric):
    """`clip_score`: the mean of 100 max(cos(image, caption), 0), with its error.

    `clip_score_se` and the interval of 95 % come with it. Hessel et al. 2021 scale by 2.5 instead
    of 100.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, **metric: Any) -> None:
        super().__init__(**metric)
        self.set_dtype(torch.float64)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, image_embed: Tensor, text_embed: Tensor) -> None:
        """Add images (B, D) with their captions (B, D)."""
        scores = clip_scores(image_embed, text_embed).to(self.device)
        self.count += len(scores)
        self.total += scores.sum()
        self.squares += scores.square().sum()

    def compute(self) -> dict[str, float]:
        n = int(self.count)
        if not n:
            raise UserError("CLIPScore has seen no image: update it first.")
        mean = self.total.item() / n
        variance = max(0.0, self.squares.item() - n * mean**2) / (n - 1) if n > 1 else math.nan
        estimate = distances.Estimate(mean, math.sqrt(variance / n))
        low, high = estimate.interval
        return {
            "clip_score": mean,
            "clip_score_se": estimate.error,
            "clip_score_low": low,
            "clip_score_high": high,
            "n": n,
        }


def clip_scores(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """(B, D), (B, D) -> (B,) float64: 100 max(cos, 0) of each image and its caption."""
    image, text = _pairs(image_embed, text_embed)
    return 100 * (image * text).sum(1).clamp(min=0)


def _pairs(image_embed: Tensor, text_embed: Tensor) -> tuple[Tensor, Tensor]:
    """Both embeddings, checked and scaled to length 1."""
    if image_embed.shape != text_embed.shape:
        raise UserError(
            f"There are image embeddings {tuple(image_embed.shape)} and caption embeddings "
            f"{tuple(text_embed.shape)}: give one caption per image."
        )
    dim = image_embed.shape[-1]
    image = check_features(image_embed, dim)
    text = check_features(text_embed, dim, "The caption embeddings")
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


class RetrievalRank(_Rows):
    """The rank of an image's own caption among all captions, 1 the best; equal captions are one.

    `rank_mean` and `rank_median`; `r1` and `r5`, the shares of images with a rank of at most 1, 5.
    """

    lists = ("image", "text")
    image: list[Tensor]
    text: list[Tensor]
    least = 1

    def update(self, image_embed: Tensor, text_embed: Tensor) -> None:
        """Add images (B, D) with their captions (B, D)."""
        image, text = _pairs(image_embed, text_embed)
        self.image.append(image.to(self.device))
        self.text.append(text.to(self.device))

    def compute(self) -> dict[str, float]:
        image, text = self.rows("image"), self.rows("text")
        require_rows(self, self.least, len(image))
        ranks = retrieval_ranks(image, text).double()
        shares = {f"r{k}": (ranks <= k).double().mean().item() for k in (1, 5)}
        return {
            "rank_mean": ranks.mean().item(),
            "rank_median": median_rank(ranks),
            **shares,
            "captions": len(ranks),
        }


def retrieval_ranks(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """The rank of caption n among the distinct captions for image n: (N,) int64, 1 the best.

    Ties count against the caption. Embeddings are (N, D), of length 1.
    """
    distinct, own = torch.unique(text_embed.round(decimals=6), dim=0, return_inverse=True)
    ranks = []
    for start in range(0, len(image_embed), distances.BLOCK):
        similarity = image_embed[start : start + distances.BLOCK] @ distinct.T
        own_similarity = similarity.gather(1, own[start : start + distances.BLOCK, None])
        ranks.append((similarity >= own_similarity).sum(1))
    return torch.cat(ranks)
