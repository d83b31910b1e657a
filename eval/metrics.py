"""The distances as `torchmetrics.Metric`s in float64: update with the features of a batch, compute
a dict of figures; torchmetrics reduces over ranks.

Keep them in a callback or an evaluator, never in a LightningModule: EMA and checkpoints would take
them along. The ranks' shares must be disjoint.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import unclip_pl.utils.torchvision  # noqa: F401  before the first import of torchmetrics

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from eval import distances
from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
FRECHET = {"fid": "FID", "fd_clip": "FD of CLIP", "fd": "FD"}
"""Keys of the Frechet distance by the network of its features (Inception, a CLIP, any other), with
titles.
"""


def frechet_key(figures: Mapping[str, Any]) -> str:
    """The key that the Frechet distance has in a dict of figures: one of `FRECHET`."""
    return next(key for key in FRECHET if key in figures)


def checked(features: Tensor, dim: int, what: str = "The features") -> Tensor:
    """(B, D) -> the same in float64; one sentence where they are of another form or not finite."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise UserError(
            f"{what} are {tuple(features.shape)}, and the metric is for (B, {dim}): give it the "
            "dim of the network that made them."
        )
    features = features.detach().double()
    bad = int(
        (~features.sum(1).isfinite()).sum()
    )  # one number in a row that is not finite makes the sum so: much cheaper than a look at each
    if bad:
        raise UserError(
            f"{what} of {bad} of {len(features)} images are not finite (NaN or infinite): look at "
            "these images, or compute with --precision fp32."
        )
    return features


class _Rows(Metric):
    """Keeps two lists of rows (B, D), called as the subclass says in `lists`, gathered over ranks;
    a rank may have none.
    """

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False
    lists: tuple[str, str]
    least = 2
    """Rows that each must have."""

    def __init__(self, dim: int, **metric: Any) -> None:
        super().__init__(**metric)
        self.dim = dim
        self.set_dtype(torch.float64)
        for name in self.lists:
            self.add_state(name, [], dist_reduce_fx="cat")

    def sync(self, *arguments: Any, **options: Any) -> None:
        for rows in (getattr(self, name) for name in self.lists):
            if (
                isinstance(rows, list) and not rows
            ):  # torchmetrics gathers tensors of as many dimensions on each rank
                rows.append(torch.zeros(0, self.dim, dtype=torch.float64, device=self.device))
        super().sync(*arguments, **options)

    def rows(self, name: str) -> Tensor:
        """(N, D), of all ranks when called from `compute`."""
        rows = getattr(self, name)
        if isinstance(rows, Tensor):
            return rows
        return (
            torch.cat(rows)
            if rows
            else torch.zeros(0, self.dim, dtype=torch.float64, device=self.device)
        )


class TwoSets(_Rows):
    """Two sets of features, (N, D) and (M, D); a subclass computes its figures from both."""

    lists = ("real", "fake")
    real: list[Tensor]
    fake: list[Tensor]

    def update(self, features: Tensor, real: bool) -> None:
        """Add (B, D) to the reference set (`real`) or to the generated one."""
        (self.real if real else self.fake).append(checked(features, self.dim).to(self.device))

    def sets(self) -> tuple[Tensor, Tensor]:
        """The reference set and the generated one, over all ranks when called from `compute`."""
        real, fake = self.rows("real"), self.rows("fake")
        require_rows(self, self.least, len(real), len(fake))
        return real, fake


def require_rows(metric: Metric, least: int, *counts: int) -> None:
    """One sentence where a set is too small for the metric to be defined."""
    if min(counts) < least:
        raise UserError(
            f"{type(metric).__name__} needs at least {least} images in each set, and they have "
            f"{' and '.join(map(str, counts))}: add images."
        )


class FrechetDistance(TwoSets):
    """The Frechet distance under `key`, from running sums: 2 D^2 numbers and at most D rows of each
    set are kept, for any N.

    Args:
        dim: D, the width of the features.
        key: "fid" for Inception's features and for no others, "fd_clip" for a CLIP's, "fd" for any
            other network's.
    """

    higher_is_better = False

    def __init__(self, dim: int, key: str = "fd", **metric: Any) -> None:
        super().__init__(dim, **metric)
        self.key = key
        for name in ("real", "fake"):
            self.add_state(
                f"{name}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum"
            )
            self.add_state(
                f"{name}_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum"
            )
            self.add_state(
                f"{name}_product", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum"
            )

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
        """The distance, `n_real`, `n_fake`; warns where there are fewer images than features, or
        sets of two sizes.
        """
        gaussians, counts = zip(*(self._gaussian(name) for name in ("real", "fake")), strict=True)
        require_rows(self, self.least, *counts)
        for text in of_sizes(self.dim, *counts):
            log.warning(text)
        return {
            self.key: distances.frechet_of(*gaussians),
            "n_real": counts[0],
            "n_fake": counts[1],
        }

    def _gaussian(self, name: str) -> tuple[distances.Gaussian | None, int]:
        rest, count = self.rows(name), int(getattr(self, f"{name}_count"))
        total = count + len(rest)
        if total < self.least:
            return None, total
        if not count:
            return distances.gaussian(rest), total
        return distances.of_sums(
            count, getattr(self, f"{name}_sum"), getattr(self, f"{name}_product"), rest
        ), total


def of_sizes(dim: int, n_real: int, n_fake: int) -> list[str]:
    """What the sizes of the sets do to the figures, in sentences."""
    said = []
    if min(n_real, n_fake) <= dim:
        said.append(
            f"A set has {min(n_real, n_fake)} images and the features have {dim} numbers: its "
            f"covariance has no more than rank {min(n_real, n_fake) - 1}, "
            "and the Frechet distance comes out far too large; compare it only with figures of the "
            "same two sizes, or use more images."
        )
    if n_real != n_fake:
        said.append(
            f"The sets have {n_real} and {n_fake} images: the Frechet distance is biased upwards "
            f"by about c (1/{n_real} + 1/{n_fake}), "
            "recall falls with fewer generated images: compare only with figures of the same two "
            "sizes."
        )
    return said


class FrechetSpread(TwoSets):
    """How sure the Frechet distance is, and what it would be without the bias of finite sets.

    With `key` "fid": `fid_se`, `fid_low`, `fid_high` (95 %) by the bootstrap over halves, and
    `fid_infinity`. The last is None where a set has fewer than 4 D images: the distance is no line
    in 1 / N there.
    """

    def __init__(
        self, dim: int, resamples: int = 100, seed: int = 0, key: str = "fd", **metric: Any
    ) -> None:
        super().__init__(dim, **metric)
        self.resamples, self.seed, self.key = resamples, seed, key

    def compute(self) -> dict[str, float | None]:
        real, fake = (
            rows[rows.double().sum(1).argsort()] for rows in self.sets()
        )  # whatever the order in which ranks and batches came
        spread = distances.bootstrap(distances.frechet, real, fake, self.resamples, self.seed)
        enough = min(len(real), len(fake)) >= 4 * self.dim
        infinity = distances.frechet_infinity(real, fake, self.seed) if enough else None
        found = {
            "se": spread.error,
            "low": spread.interval[0],
            "high": spread.interval[1],
            "infinity": infinity,
        }
        return {f"{self.key}_{name}": value for name, value in found.items()}


class KernelDistance(TwoSets):
    """`kid`, unbiased over all pairs, and its standard error `kid_se`."""

    higher_is_better = False
    least = 3

    def compute(self) -> dict[str, float]:
        found = distances.kernel(*self.sets())
        return {"kid": found.value, "kid_se": found.error}


class CMMD(TwoSets):
    """`cmmd`; meant for CLIP's embeddings."""

    higher_is_better = False

    def compute(self) -> dict[str, float]:
        return {"cmmd": distances.cmmd(*self.sets())}


class PrecisionRecall(TwoSets):
    """`precision` and `recall` by the k-th nearest neighbour."""

    higher_is_better = True

    def __init__(self, dim: int, k: int = 3, **metric: Any) -> None:
        super().__init__(dim, **metric)
        self.k, self.least = k, k + 1

    def compute(self) -> dict[str, float]:
        precision, recall = distances.precision_recall(*self.sets(), self.k)
        return {"precision": precision, "recall": recall}


class CLIPScore(Metric):
    """`clip_score`: the mean of 100 max(cos(image, caption), 0) (Hessel et al. 2021 scale by 2.5),
    with `clip_score_se` and the interval of 95 %.
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
            raise UserError("CLIPScore has seen no image: give it some.")
        mean = self.total.item() / n
        variance = max(0.0, self.squares.item() - n * mean**2) / (n - 1) if n > 1 else math.nan
        found = distances.Estimate(mean, math.sqrt(variance / n))
        low, high = found.interval
        return {
            "clip_score": mean,
            "clip_score_se": found.error,
            "clip_score_low": low,
            "clip_score_high": high,
            "n": n,
        }


def clip_scores(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """(B, D), (B, D) -> (B,) float64: 100 max(cos, 0) of each image and its caption."""
    image, text = _pairs(image_embed, text_embed)
    return 100 * (image * text).sum(1).clamp(min=0)


def _pairs(image_embed: Tensor, text_embed: Tensor) -> tuple[Tensor, Tensor]:
    """Both checked and of length 1."""
    if image_embed.shape != text_embed.shape:
        raise UserError(
            f"There are image embeddings {tuple(image_embed.shape)} and caption embeddings "
            f"{tuple(text_embed.shape)}: give one caption an image."
        )
    image, text = (
        checked(image_embed, image_embed.shape[-1]),
        checked(text_embed, image_embed.shape[-1], "The caption embeddings"),
    )
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


class RetrievalRank(_Rows):
    """How far up an image's own caption stands among all captions: `rank_mean`, `rank_median` (1
    the best), `r1`, `r5`; equal captions are one.
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
            "rank_median": ranks.median().item(),
            **shares,
            "captions": len(ranks),
        }


def retrieval_ranks(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """(N, D), (N, D), of length 1 -> (N,) int64 rank of caption n among the distinct captions for
    image n, 1 the best; ties count against it.
    """
    distinct, own = torch.unique(text_embed.round(decimals=6), dim=0, return_inverse=True)
    found = []
    for rows, right in zip(
        image_embed.split(distances.BLOCK), own.split(distances.BLOCK), strict=True
    ):
        similarity = rows @ distinct.T
        found.append((similarity >= similarity.gather(1, right[:, None])).sum(1))
    return torch.cat(found)
