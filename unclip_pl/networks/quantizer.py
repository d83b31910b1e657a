"""CLIP image embeddings as sequences of codes, for the autoregressive prior (unCLIP section 2.2):
PCA, then buckets in each dimension.

The paper says how many (319 of 1,024 dimensions lose under 1 % of the variance; 1,024 buckets) and
not how buckets are cut. Here they are
quantiles: each holds as many of the fitted embeddings as any other, and stands for their mean. Up
    to `buckets` distinct values are kept exactly.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.utils.errors import UserError


class Buckets(NamedTuple):
    """`edges` (n - 1,), ascending; `values` (n,), what a bucket stands for; `counts` (n,) int64.
    Bucket b is edges[b-1] <= x < edges[b]."""

    edges: Tensor
    values: Tensor
    counts: Tensor


def quantile_buckets(x: Tensor, buckets: int) -> Buckets:
    """Cut at the j/buckets quantiles, halfway between neighbours; an empty bucket (fewer or equal
    numbers) stands for the middle of its edges.

    x (N,) float, N >= 2 -> float32 edges and values.
    """
    x = x.float().sort().values
    cuts = -(torch.arange(1, buckets, device=x.device) * len(x)).div(
        -buckets, rounding_mode="floor"
    )  # rounded up
    cuts = cuts.clamp(1, len(x) - 1)
    edges = ((x[cuts - 1].double() + x[cuts].double()) / 2).float()
    codes = torch.searchsorted(edges, x, right=True)
    counts = torch.bincount(codes, minlength=buckets)
    sums = torch.zeros(buckets, dtype=torch.float64, device=x.device).index_add(
        0, codes, x.double()
    )
    middle = (torch.cat([x[:1], edges]).double() + torch.cat([edges, x[-1:]]).double()) / 2
    return Buckets(
        edges, torch.where(counts > 0, sums / counts.clamp(min=1), middle).float(), counts
    )


def pca(covariance: Tensor, max_error: float, max_dims: int) -> tuple[Tensor, int]:
    """Principal directions by decreasing eigenvalue, and how many it takes to lose a share of the
    variance below `max_error`.

    Args:
        covariance: (D, D), computed in float64.
        max_error: from 0 (asks for `max_dims`) to 1.
        max_dims: how many are given at most.

    Returns:
        (n, D) float64, orthonormal rows whose largest component is positive, n at most `max_dims`
        and the rank; how many the rule asks for.

    Raises:
        UserError: there is no variance, or it is not finite.
    """
    covariance = covariance.double()
    if not bool(covariance.isfinite().all()) or not bool(covariance.trace() > 0):
        raise UserError(
            "The image embeddings do not differ from one another, so that there is nothing to "
            "quantise: fit on at least two that do."
        )
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).T
    lost = 1 - values.cumsum(0) / values.sum()
    rank = int((values > 1e-12 * values[0]).sum())
    needed = min(int((lost >= max_error).sum()) + 1 if max_error else max_dims, rank)
    vectors = vectors[: min(needed, max_dims)]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign(), needed


class QuantizerError(NamedTuple):
    """What the codes lose: mean squared error over the variance, and mean cosine to the embedding,
    of PCA alone and of PCA and buckets."""

    pca_mse: float
    pca_cosine: float
    mse: float
    cosine: float


class EmbeddingQuantizer(nn.Module):
    """PCA, buckets and the distribution of z_i . z_t, as buffers: empty before `fit`, saved with
    the weights.

    Args:
        dim: D, of the embeddings on CLIP's own scale.
        max_codes: the most dimensions that are kept.
        buckets: per dimension, and of the dot product.
        max_error: share of the variance that the dimensions left out may have; 0 keeps `max_codes`
            whatever they lose.

    Raises:
        ValueError: a number outside its range.
    """

    num_codes: Tensor
    mean: Tensor
    components: Tensor
    edges: Tensor
    values: Tensor
    dot_edges: Tensor
    dot_counts: Tensor

    def __init__(
        self, dim: int, max_codes: int, buckets: int = 1024, max_error: float = 0.01
    ) -> None:
        super().__init__()
        if not 1 <= max_codes <= dim:
            raise ValueError(
                f"EmbeddingQuantizer got max_codes {max_codes}: give a number from 1 to the "
                f"embedding's {dim} dimensions."
            )
        if buckets < 2:
            raise ValueError(
                f"EmbeddingQuantizer got {buckets} buckets: give 2 or more (the paper has 1024)."
            )
        if not 0 <= max_error < 1:
            raise ValueError(
                f"EmbeddingQuantizer got max_error {max_error}: give a share of the variance from "
                "0 to below 1, such as 0.01."
            )
        self.dim, self.max_codes, self.buckets, self.max_error = dim, max_codes, buckets, max_error
        self.codes = 0
        """Codes an embedding has; 0 before `fit`."""
        self.register_buffer("num_codes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.zeros(max_codes, dim))
        self.register_buffer("edges", torch.zeros(max_codes, buckets - 1))
        self.register_buffer("values", torch.zeros(max_codes, buckets))
        self.register_buffer("dot_edges", torch.zeros(buckets - 1))
        self.register_buffer("dot_counts", torch.zeros(buckets, dtype=torch.int64))
        self.register_load_state_dict_post_hook(
            lambda module, _: setattr(module, "codes", int(module.num_codes))
        )

    @torch.no_grad()
    def fit(
        self, mean: Tensor, covariance: Tensor, image_embed: Tensor, text_embed: Tensor
    ) -> None:
        """Take the PCA from the statistics of all the data, the buckets from a sample of it; the
        same on every machine that has the same data.

        Args:
            mean, covariance: (D,) and (D, D) float64.
            image_embed, text_embed: (N, D), any float type; pairs.

        Raises:
            UserError: fewer than two pairs, no variance, or more of it lost than `max_error` with
                `max_codes`.
            ValueError: shapes that do not fit.
        """
        shapes = [tuple(x.shape) for x in (mean, covariance, image_embed, text_embed)]
        if shapes != [
            (self.dim,),
            (self.dim, self.dim),
            (len(image_embed), self.dim),
            (len(image_embed), self.dim),
        ]:
            raise ValueError(
                f"EmbeddingQuantizer.fit got {shapes}: it takes ({self.dim},), ({self.dim}, "
                f"{self.dim}) and twice (N, {self.dim})."
            )
        if len(image_embed) < 2:
            raise UserError(
                f"The quantiser of the AR prior was given {len(image_embed)} embeddings: fit it on "
                "at least two."
            )
        components, needed = pca(covariance, self.max_error, self.max_codes)
        count = len(components)
        if self.max_error and needed > count:
            kept = (components @ covariance.double() @ components.T).trace() / covariance.trace()
            lost = math.ceil(1e3 * (1 - float(kept))) / 1e3
            raise UserError(
                f"{count} codes of the AR prior lose {1 - float(kept):.1%} of the variance of "
                f"these embeddings, and model.max_error is {self.max_error:g}: set "
                f"model.net.max_codes to {needed}, or model.max_error to {lost:g} to accept the "
                "loss."
            )
        self.mean.copy_(mean)
        self.components.zero_()[:count].copy_(components)
        self.num_codes.fill_(count)
        self.codes = count
        device = self.mean.device
        coordinates = torch.cat(
            [self.project(rows.to(device)) for rows in image_embed.split(8192)]
        )  # (N, K)
        for k in range(count):
            buckets = quantile_buckets(coordinates[:, k], self.buckets)
            self.edges[k], self.values[k] = buckets.edges, buckets.values
        pairs = zip(image_embed.split(8192), text_embed.split(8192), strict=True)
        dots = quantile_buckets(
            torch.cat([cosine(i.to(device), t.to(device)) for i, t in pairs]), self.buckets
        )
        self.dot_edges.copy_(dots.edges)
        self.dot_counts.copy_(dots.counts)

    def _fitted(self) -> None:
        if not self.codes:
            raise ValueError(
                "The quantiser of the AR prior is not fitted: train with `lightning fit`, which "
                "fits it to the store, or load a checkpoint."
            )

    def project(self, z: Tensor) -> Tensor:
        """Coordinates along the kept directions, in float32 whatever the precision around. (B, D)
        -> (B, K)."""
        self._fitted()
        with full_precision(z):
            return (z.float() - self.mean) @ self.components[: self.codes].T

    def unproject(self, coordinates: Tensor) -> Tensor:
        """(B, K) -> (B, D) float32 on CLIP's scale."""
        self._fitted()
        with full_precision(coordinates):
            return coordinates.float() @ self.components[: self.codes] + self.mean

    def encode(self, image_embed: Tensor) -> Tensor:
        """CLIP's embeddings (B, D) -> codes (B, K) int64, 0..buckets-1, the direction of the
        largest variance first."""
        coordinates = self.project(image_embed)
        return torch.searchsorted(
            self.edges[: self.codes], coordinates.T.contiguous(), right=True
        ).T

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K) int64 -> embeddings (B, D) float32 on CLIP's own scale."""
        self._fitted()
        return self.unproject(self.values[torch.arange(self.codes, device=codes.device), codes])

    def encode_dot(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """z_i . z_t of the embeddings at unit length, as the paper's are, in the buckets of the
        data's. Twice (B, D) -> (B,) int64."""
        self._fitted()
        return torch.searchsorted(self.dot_edges, cosine(image_embed, text_embed), right=True)

    def draw_dot(self, uniform: Tensor, percentile: float = 50.0) -> Tensor:
        """Draw dot-product tokens from the data's own distribution above a percentile (50: the
        paper's top half, footnote 2).

        uniform (B,) in [0, 1) -> (B,) int64, increasing in it.
        """
        self._fitted()
        upto = self.dot_counts.cumsum(0).float()
        share = percentile / 100 + (1 - percentile / 100) * uniform.to(upto.device)
        return torch.searchsorted(upto, share * upto[-1], right=True).clamp(max=self.buckets - 1)

    @torch.no_grad()
    def error(self, image_embed: Tensor) -> QuantizerError:
        """What PCA, and PCA and buckets, cost on some embeddings (N, D)."""
        z = image_embed.to(self.mean.device).float()
        variance = (z - z.mean(0)).square().sum(1).mean()
        exact, coded = self.unproject(self.project(z)), self.decode(self.encode(z))
        lost = [float((x - z).square().sum(1).mean() / variance) for x in (exact, coded)]
        return QuantizerError(
            lost[0], float(cosine(exact, z).mean()), lost[1], float(cosine(coded, z).mean())
        )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, D) and (B, D), any float type -> (B,) float32."""
    return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1)


def full_precision(x: Tensor) -> AbstractContextManager:
    """Switches autocast off on the device of `x`; the meta device has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
