"""Distances between two sets of features, (N, D) and (M, D), in float64.

The first set is the reference, the second the generated one. These are pure functions;
`eval.metrics` gathers features over batches and ranks and calls them. None depends on the order of
the rows, and sums run in blocks, so that memory stays at N x D.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

BLOCK = 1024
"""Rows that are processed at a time."""
Distance = Callable[[Tensor, Tensor], float]


class Gaussian(NamedTuple):
    """A normal distribution, with its covariance or with a factor of it.

    Args:
        mean: (D,).
        covariance: (D, D), of which the lower triangle is read.
        factor: F (D, r), where the covariance is F F^T.
    """

    mean: Tensor
    covariance: Tensor | None = None
    factor: Tensor | None = None

    def factored(self) -> Tensor:
        """F."""
        if self.covariance is not None:
            return _factor(self.covariance)
        assert self.factor is not None  # one of the two is there
        return self.factor

    def spread(self) -> Tensor:
        """The trace of the covariance."""
        if self.covariance is None:
            return self.factored().square().sum()
        return self.covariance.trace()


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the normal approximation."""
        return self.value - 1.96 * self.error, self.value + 1.96 * self.error


def gaussian(x: Tensor) -> Gaussian:
    """The Gaussian of rows (N, D), its covariance over N - 1.

    With N <= D the centred rows are the factor themselves: nothing is lost where the covariance is
    singular.
    """
    n, dim = x.shape
    mean = x.mean(0, dtype=torch.float64)
    if n <= dim:
        return Gaussian(mean, factor=(x.double() - mean).T / (n - 1) ** 0.5)
    product = torch.zeros(dim, dim, dtype=torch.float64, device=x.device)
    for block in x.split(BLOCK):
        add_gram(product, block.double() - mean)
    return Gaussian(mean, product.div_(n - 1))


def add_gram(product: Tensor, x: Tensor) -> None:
    """Add x^T x of (N, D) float64 to the lower triangle of (D, D), in place.

    On a CPU nothing is added above the diagonal, which saves half the work.
    """
    if x.device.type != "cpu":
        product.addmm_(x.T, x)
        return
    # Transposed they are in Fortran's order, so that BLAS works in place.
    rows, target = x.numpy().T, product.numpy().T
    scipy.linalg.blas.dsyrk(1.0, rows, beta=1.0, c=target, overwrite_c=True)


def gaussian_from_sums(count: int, total: Tensor, product: Tensor, rest: Tensor) -> Gaussian:
    """Fit a Gaussian to `count` rows, known by their sums, together with the rows `rest`.

    Args:
        count: how many rows the sums are of.
        total: their sum, (D,).
        product: the sum of their outer products, (D, D), of which the lower triangle is read.
        rest: further rows, (N, D), where N may be 0.
    """
    count += len(rest)
    mean = (total + rest.sum(0)) / count
    covariance = torch.addr(product, mean, mean, alpha=-count)
    if len(rest):
        add_gram(covariance, rest)
    return Gaussian(mean, covariance.div_(count - 1))


def _factor(covariance: Tensor) -> Tensor:
    """Factor a covariance (D, D), by its eigenvectors, into F (D, r) with F F^T = covariance.

    The covariance may be singular.
    """
    values, vectors = torch.linalg.eigh(covariance, UPLO="L")
    positive = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, positive] * values[positive].sqrt()


def gaussian_frechet(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (FID: Heusel et al. 2017)."""
    apart = (a.mean - b.mean).square().sum() + a.spread() + b.spread()
    return apart.item() - 2 * _root_trace(a, b)


def _root_trace(a: Gaussian, b: Gaussian) -> float:
    """tr (S_a S_b)^(1/2).

    Of two covariances that are not singular: by LAPACK's symmetric eigenvalues of S_a S_b. Of
    others: the nuclear norm of F_a^T F_b.
    """
    if a.covariance is not None and b.covariance is not None:
        with contextlib.suppress(scipy.linalg.LinAlgError):  # the second is singular
            values = scipy.linalg.eigh(
                a.covariance.cpu().numpy(),
                b.covariance.cpu().numpy(),
                type=2,
                eigvals_only=True,
                driver="gvx",
            )
            return float(np.sqrt(values.clip(min=0)).sum())
    product = a.factored().T @ b.factored()
    if min(product.shape) <= BLOCK:
        return torch.linalg.svdvals(product).sum().item()
    # Eigenvalues of the square are quicker, and only the least of them lose digits.
    square = product.T @ product if product.shape[1] < len(product) else product @ product.T
    return torch.linalg.eigvalsh(square).clamp(min=0).sqrt().sum().item()


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of the Gaussians of two sets.

    It is biased upwards by about c (1/N + 1/M): compare equal sizes only.
    """
    return gaussian_frechet(gaussian(a), gaussian(b))


def frechet_infinity(a: Tensor, b: Tensor, seed: int = 0, points: int = 10) -> float:
    """The Frechet distance extrapolated to infinite sample size (Chong & Forsyth 2020).

    Random subsets of half to all of both sets have distances that lie on a line in 1 / size.

    Args:
        a: features of one set, (N, D).
        b: features of the other set, (M, D).
        seed: of the subsets.
        points: how many sizes the subsets have.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(1, 2, points, dtype=torch.float64)
    values = torch.zeros(points, dtype=torch.float64)
    for i, share in enumerate((1 / x).tolist()):
        values[i] = frechet(_subset(a, share, generator), _subset(b, share, generator))
    slope = ((x - x.mean()) * (values - values.mean())).sum() / (x - x.mean()).square().sum()
    return (values.mean() - slope * x.mean()).item()


def _subset(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random share of the rows."""
    rows = torch.randperm(len(x), generator=generator)[: round(share * len(x))]
    return x[rows.to(x.device)]


def bootstrap(
    distance: Distance, a: Tensor, b: Tensor, resamples: int = 100, seed: int = 0
) -> Estimate:
    """The distance with its standard error, from random halves of both sets.

    Halves spread as new sets of the full size do. They are drawn without replacement (Politis &
    Romano 1994): with repeated rows a covariance loses rank, and where N is about D the error came
    out three times too large. Only the spread of the halves is used, because their distances are
    more biased.

    Args:
        distance: a function of two sets of features.
        a: features of one set, (N, D).
        b: features of the other set, (M, D).
        resamples: halves that are drawn, at least 2.
        seed: of the halves.
    """
    if resamples < 2:
        raise ValueError(f"The bootstrap has {resamples} resamples: give 2 or more.")
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(resamples, dtype=torch.float64)
    for i in range(resamples):
        values[i] = distance(_subset(a, 0.5, generator), _subset(b, 0.5, generator))
    return Estimate(distance(a, b), values.std().item())


def kid(a: Tensor, b: Tensor, paired: bool = False) -> Estimate:
    """KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3 over all pairs.

    After Binkowski et al. 2018. Its error comes from leaving out each row in turn.

    Args:
        a: (N, D).
        b: (M, D).
        paired: row k of `b` was made for row k of `a`. These pairs are left out, as a row with
            itself always is: they are more alike than others, and KID would come out too low.
    """
    n, m = len(a), len(b)
    aa, bb, ab, ba = (_row_sums(x, y, _cubic) for x, y in ((a, a), (b, b), (a, b), (b, a)))
    aa, bb = (sums - cubic_rows(x, x) for sums, x in ((aa, a), (bb, b)))
    if paired:
        # Over (k, l) with k not l: a U-statistic of the pairs of rows
        own = cubic_rows(a, b)
        rows = aa + bb - (ab - own) - (ba - own)
        without = (rows.sum() - 2 * rows) / ((n - 1) * (n - 2))
        error = ((n - 1) * without.var(correction=0)).sqrt().item()
        return Estimate((rows.sum() / (n * (n - 1))).item(), error)
    within_a, within_b = aa.sum() / (n * (n - 1)), bb.sum() / (m * (m - 1))
    across = ab.sum() / (n * m)
    without_a = (aa.sum() - 2 * aa) / ((n - 1) * (n - 2)) - 2 * (ab.sum() - ab) / ((n - 1) * m)
    without_b = (bb.sum() - 2 * bb) / ((m - 1) * (m - 2)) - 2 * (ab.sum() - ba) / (n * (m - 1))
    variance = (n - 1) * without_a.var(correction=0) + (m - 1) * without_b.var(correction=0)
    return Estimate((within_a + within_b - 2 * across).item(), variance.sqrt().item())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cubic_rows(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,) KID's kernel of row k of both."""
    blocks = zip(x.split(BLOCK), y.split(BLOCK), strict=True)
    products = torch.cat([(a.double() * b.double()).sum(1) for a, b in blocks])
    return (products / x.shape[1] + 1) ** 3


def _row_sums(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(N, D), (M, D) -> (N,) the sums of the rows of the kernel's matrix (N, M), block by block."""

    def sum_rows(rows: Tensor) -> Tensor:
        blocks = [kernel(rows.double(), columns.double()).sum(1) for columns in y.split(BLOCK)]
        return torch.stack(blocks).sum(0)

    return torch.cat([sum_rows(rows) for rows in x.split(BLOCK)])


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024), on CLIP embeddings, which are scaled to length 1.

    1000 times the squared MMD with the kernel exp(-|x - y|^2 / (2 10^2)). It is over all pairs, a
    row with itself too, which is the biased form of the authors' code.
    """
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b))

    def gauss(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp((x @ y.T - 1) / 100)  # |x - y|^2 = 2 - 2 x.y

    within_a, within_b, across = (
        _row_sums(x, y, gauss).sum() / (len(x) * len(y)) for x, y in ((a, a), (b, b), (a, b))
    )
    return 1000 * (within_a + within_b - 2 * across).item()


def precision_recall(a: Tensor, b: Tensor, k: int = 3) -> tuple[float, float]:
    """Compute precision and recall of generated features, as two shares in [0, 1].

    `a` (N, D) is the reference and `b` (M, D) what was generated (Kynkaanniemi et al. 2019).
    Precision is the share of generated features within reach of the reference. Recall is the share
    of the reference within reach of the generated features.

    A set reaches what is no further from one of its rows than that row's k-th nearest neighbour in
    the set.
    """
    return _reached(b, a, _reach(a, k)), _reached(a, b, _reach(b, k))


def _reach(x: Tensor, k: int) -> Tensor:
    """(N, D) -> (N,) squared distance to the k-th nearest other row."""
    reach = []
    for start in range(0, len(x), BLOCK):
        squares = _squares(x[start : start + BLOCK], x)
        rows = torch.arange(len(squares))
        squares[rows, start + rows] = torch.inf  # not the row itself
        reach.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(reach)


def _reached(x: Tensor, y: Tensor, reach: Tensor) -> float:
    """Share of the rows of x within the reach (M,) of a row of y (M, D).

    The slack is for rounding: a row is always within reach of an equal one.
    """
    slack = 1e-13 * max(x.double().square().sum(1).max().item(), 1e-300)
    inside = sum((_squares(block, y) <= reach + slack).any(1).sum() for block in x.split(BLOCK))
    return int(inside) / len(x)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> squared distances (N, M)."""
    x, y = x.double(), y.double()
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
