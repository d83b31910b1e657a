"""CLIP image embeddings as sequences of codes, for the autoregressive prior.

PCA comes first, then buckets in each dimension (unCLIP section 2.2).

The paper gives the numbers (319 of 1,024 dimensions lose under 1 % of the variance; 1,024 buckets)
but not how buckets are cut. Here they are cut at quantiles: each has as many of the fitted
embeddings as any other, and decodes to their mean. Up to `buckets` distinct values stay exact. Nor
does it say what the PCA is of: here of CLIP's embeddings with their own norms (a diffusion prior's
have one norm), and the variance is that around their mean.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.utils.errors import UserError


class Buckets(NamedTuple):
    """Intervals of the real line; bucket b is edges[b-1] <= x < edges[b]."""

    edges: Tensor
    """(n - 1,), ascending."""
    values: Tensor
    """(n,), what each bucket decodes to."""
    counts: Tensor
    """(n,) int64, fitted numbers in each bucket."""


def quantile_buckets(x: Tensor, buckets: int) -> Buckets:
    """Cut at the j/buckets quantiles, halfway between neighbours.

    A bucket that is empty, because there are few or equal numbers, decodes to the middle of its
    edges.

    x (N,) float, N >= 2 -> float32 edges and values.
    """
    x = x.float().sort().values
    quantiles = torch.arange(1, buckets, device=x.device) * len(x)
    cuts = -(-quantiles).div(buckets, rounding_mode="floor")  # rounded up
    cuts = cuts.clamp(1, len(x) - 1)
    edges = ((x[cuts - 1].double() + x[cuts].double()) / 2).float()
    codes = torch.searchsorted(edges, x, right=True)
    counts = torch.bincount(codes, minlength=buckets)
    sums = torch.zeros(buckets, dtype=torch.float64, device=x.device)
    sums = sums.index_add(0, codes, x.double())
    means = sums / counts.clamp(min=1)
    lower, upper = torch.cat([x[:1], edges]), torch.cat([edges, x[-1:]])
    middles = (lower.double() + upper.double()) / 2
    return Buckets(edges, torch.where(counts > 0, means, middles).float(), counts)


def pca(covariance: Tensor, max_error: float, max_dims: int) -> tuple[Tensor, int]:
    """Principal directions by decreasing eigenvalue, as many as the allowed loss of variance needs.

    Args:
        covariance: (D, D), computed in float64.
        max_error: share of the variance that may be lost, from 0 (asks for `max_dims` directions)
            to 1.
        max_dims: the most directions that are returned.

    Returns:
        the directions (n, D) float64, orthonormal rows whose largest component is positive, with n
        at most `max_dims` and the rank; and the number that `max_error` needs.

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
    needed = int((lost >= max_error).sum()) + 1 if max_error else max_dims
    needed = min(needed, rank)
    vectors = vectors[: min(needed, max_dims)]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign(), needed


class QuantizerError(NamedTuple):
    """What the codes lose.

    The mean squared error as a share of the variance, and the mean cosine to the embedding.
    """

    pca_mse: float
    """PCA only, as is `pca_cosine`."""
    pca_cosine: float
    mse: float
    """PCA and buckets, as is `cosine`."""
    cosine: float


class EmbeddingQuantizer(nn.Module):
    """PCA, buckets and the distribution of z_i . z_t, as buffers.

    The buffers are empty before `fit`, and are saved with the weights.

    Args:
        dim: D, of the embeddings on CLIP's own scale.
        max_codes: the most dimensions that are used.
        buckets: per dimension, and of the dot product.
        max_error: share of the variance that the other dimensions may have; 0: use `max_codes`
            dimensions whatever is lost.

    Raises:
        ValueError: a number outside its range.
    """

    num_codes: Tensor
    """`codes`, as it is saved."""
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
        """Codes per embedding; 0 before `fit`."""
        self.register_buffer("num_codes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.zeros(max_codes, dim))
        self.register_buffer("edges", torch.zeros(max_codes, buckets - 1))
        self.register_buffer("values", torch.zeros(max_codes, buckets))
        self.register_buffer("dot_edges", torch.zeros(buckets - 1))
        self.register_buffer("dot_counts", torch.zeros(buckets, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_read_num_codes)

    @torch.no_grad()
    def fit(
        self, mean: Tensor, covariance: Tensor, image_embed: Tensor, text_embed: Tensor
    ) -> None:
        """Fit the PCA to the statistics of all the data, and the buckets to a sample of it.

        Machines with the same data get the same result.

        Args:
            mean: (D,) float64, of all image embeddings.
            covariance: (D, D) float64, of all image embeddings.
            image_embed: (N, D), any float type, a sample of them.
            text_embed: (N, D), any float type; row k is of the caption of image k.

        Raises:
            UserError: fewer than two pairs, no variance, or more of it lost than `max_error` with
                `max_codes`.
            ValueError: shapes that do not fit.
        """
        pairs_shape = len(image_embed), self.dim
        expected = [(self.dim,), (self.dim, self.dim), pairs_shape, pairs_shape]
        shapes = [tuple(x.shape) for x in (mean, covariance, image_embed, text_embed)]
        if shapes != expected:
            raise ValueError(
                f"EmbeddingQuantizer.fit got {shapes}: it takes ({self.dim},), ({self.dim}, "
                f"{self.dim}) and twice (N, {self.dim})."
            )
        if len(image_embed) < 2:
            raise UserError(
                f"The quantiser of the AR prior got {len(image_embed)} embeddings: fit it on at "
                "least two."
            )
        components, needed = pca(covariance, self.max_error, self.max_codes)
        count = len(components)
        if self.max_error and needed > count:
            explained = components @ covariance.double() @ components.T
            lost = 1 - float(explained.trace() / covariance.trace())
            accepted = math.ceil(1e3 * lost) / 1e3
            raise UserError(
                f"{count} codes of the AR prior lose {lost:.1%} of the variance of these "
                f"embeddings, and model.max_error is {self.max_error:g}: set model.net.max_codes "
                f"to {needed}, or model.max_error to {accepted:g} to accept the loss."
            )
        self.mean.copy_(mean)
        self.components.zero_()[:count].copy_(components)
        self.num_codes.fill_(count)
        self.codes = count
        device = self.mean.device
        parts = [self.project(rows.to(device)) for rows in image_embed.split(8192)]
        coordinates = torch.cat(parts)  # (N, K)
        for k in range(count):
            buckets = quantile_buckets(coordinates[:, k], self.buckets)
            self.edges[k], self.values[k] = buckets.edges, buckets.values
        pairs = zip(image_embed.split(8192), text_embed.split(8192), strict=True)
        dots = torch.cat([cosine(i.to(device), t.to(device)) for i, t in pairs])
        dot_buckets = quantile_buckets(dots, self.buckets)
        self.dot_edges.copy_(dot_buckets.edges)
        self.dot_counts.copy_(dot_buckets.counts)

    def _require_fitted(self) -> None:
        if not self.codes:
            raise ValueError(
                "The quantiser of the AR prior is not fitted: train with `lightning fit`, which "
                "fits it to the store, or load a checkpoint."
            )

    def project(self, z: Tensor) -> Tensor:
        """Compute coordinates along the principal directions, (B, D) -> (B, K).

        They are in float32 even under autocast.
        """
        self._require_fitted()
        with full_precision(z):
            return (z.float() - self.mean) @ self.components[: self.codes].T

    def unproject(self, coordinates: Tensor) -> Tensor:
        """(B, K) -> (B, D) float32 on CLIP's scale."""
        self._require_fitted()
        with full_precision(coordinates):
            return coordinates.float() @ self.components[: self.codes] + self.mean

    def encode(self, image_embed: Tensor) -> Tensor:
        """Turn CLIP's embeddings (B, D) into codes (B, K), int64 from 0 to buckets - 1.

        The direction of the largest variance comes first.
        """
        coordinates = self.project(image_embed).T.contiguous()
        return torch.searchsorted(self.edges[: self.codes], coordinates, right=True).T

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K) int64 -> embeddings (B, D) float32 on CLIP's own scale."""
        self._require_fitted()
        return self.unproject(self.values[torch.arange(self.codes, device=codes.device), codes])

    def encode_dot(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """The bucket of z_i . z_t at unit length, as in the paper. Twice (B, D) -> (B,) int64."""
        self._require_fitted()
        return torch.searchsorted(self.dot_edges, cosine(image_embed, text_embed), right=True)

    def draw_dot(self, uniform: Tensor, percentile: float = 50.0) -> Tensor:
        """Draw dot-product tokens from the data's distribution above a percentile.

        50 is the paper's top half (footnote 2).

        uniform (B,) in [0, 1) -> (B,) int64, increasing in it.
        """
        self._require_fitted()
        upto = self.dot_counts.cumsum(0).float()
        share = percentile / 100 + (1 - percentile / 100) * uniform.to(upto.device)
        return torch.searchsorted(upto, share * upto[-1], right=True).clamp(max=self.buckets - 1)

    @torch.no_grad()
    def error(self, image_embed: Tensor) -> QuantizerError:
        """What PCA, and PCA with buckets, lose on embeddings (N, D)."""
        z = image_embed.to(self.mean.device).float()
        variance = (z - z.mean(0)).square().sum(1).mean()

        def mse(x: Tensor) -> float:
            return float((x - z).square().sum(1).mean() / variance)

        exact, coded = self.unproject(self.project(z)), self.decode(self.encode(z))
        exact_cosine, coded_cosine = cosine(exact, z).mean(), cosine(coded, z).mean()
        return QuantizerError(mse(exact), float(exact_cosine), mse(coded), float(coded_cosine))


def _read_num_codes(module: EmbeddingQuantizer, _: object) -> None:
    """After a state dict was loaded."""
    module.codes = int(module.num_codes)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, D) and (B, D), any float type -> (B,) float32."""
    return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1)


def full_precision(x: Tensor) -> AbstractContextManager:
    """Switches autocast off on the device of `x`; the meta device has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
