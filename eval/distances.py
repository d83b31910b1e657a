"""Distances between two sets of features, (N, D) and (M, D), in float64: the first set is the
reference, the second the generated one.

Pure functions; `eval.metrics` gathers features over batches and ranks and calls them. All are free
of order, and sums run in blocks, so that memory stays at N x D.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

BLOCK = 1024
"""Rows that are worked on at a time."""
Distance = Callable[[Tensor, Tensor], float]


class Gaussian(NamedTuple):
    """A mean (D,) and a covariance (D, D), whose lower triangle is read, or in its place a factor F
    (D, r) of the covariance F F^T.
    """

    mean: Tensor
    covariance: Tensor | None = None
    factor: Tensor | None = None

    def factored(self) -> Tensor:
        """F."""
        return self.factor if self.covariance is None else _factor(self.covariance)  # type: ignore[return-value]  # one of the two is there

    def spread(self) -> Tensor:
        """The trace of the covariance."""
        return (
            self.factored().square().sum() if self.covariance is None else self.covariance.trace()
        )


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the normal approximation."""
        return self.value - 1.96 * self.error, self.value + 1.96 * self.error


def gaussian(x: Tensor) -> Gaussian:
    """(N, D) -> its Gaussian, the covariance over N - 1. With N <= D the centred rows are the
    factor themselves: nothing is lost where it is singular.
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
    """Add x^T x of (N, D) float64 to the lower triangle of (D, D), in place; above it on a CPU
    nothing is added, which saves half the work.
    """
    if x.device.type == "cpu":
        scipy.linalg.blas.dsyrk(
            1.0, x.numpy().T, beta=1.0, c=product.numpy().T, overwrite_c=True
        )  # .T: Fortran's order, so in place
    else:
        product.addmm_(x.T, x)


def of_sums(count: int, total: Tensor, product: Tensor, rest: Tensor) -> Gaussian:
    """The Gaussian of `count` rows, of which the sum (D,) and the sum of outer products (D, D; its
    lower triangle) are left, and of the rows `rest` (N, D).
    """
    count += len(rest)
    mean = (total + rest.sum(0)) / count
    covariance = torch.addr(product, mean, mean, alpha=-count)
    if len(rest):
        add_gram(covariance, rest)
    return Gaussian(mean, covariance.div_(count - 1))


def _factor(covariance: Tensor) -> Tensor:
    """(D, D) symmetric, not negative, also singular -> F (D, r) with F F^T = it, by its
    eigenvectors.
    """
    values, vectors = torch.linalg.eigh(covariance, UPLO="L")
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_of(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (FID: Heusel et al. 2017)."""
    return ((a.mean - b.mean).square().sum() + a.spread() + b.spread()).item() - 2 * _root_trace(
        a, b
    )


def _root_trace(a: Gaussian, b: Gaussian) -> float:
    """tr (S_a S_b)^(1/2): of two covariances that are not singular by LAPACK's symmetric
    eigenvalues of S_a S_b, else the nuclear norm of F_a^T F_b.
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
    square = (
        product.T @ product if product.shape[1] < len(product) else product @ product.T
    )  # quicker, and only the least lose digits
    return torch.linalg.eigvalsh(square).clamp(min=0).sqrt().sum().item()


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of the two Gaussians. Biased upwards by about c (1/N + 1/M): compare
    equal sizes.
    """
    return frechet_of(gaussian(a), gaussian(b))


def frechet_infinity(a: Tensor, b: Tensor, seed: int = 0, points: int = 10) -> float:
    """The Frechet distance of sets without end: those of random subsets of half to all of both
    sets, extended in a line in 1 / size (Chong & Forsyth 2020).
    """
    generator = torch.Generator().manual_seed(seed)
    shares = 1 / torch.linspace(1, 2, points, dtype=torch.float64)
    values = torch.tensor(
        [
            frechet(_some(a, share, generator), _some(b, share, generator))
            for share in shares.tolist()
        ],
        dtype=torch.float64,
    )
    x = 1 / shares
    slope = ((x - x.mean()) * (values - values.mean())).sum() / (x - x.mean()).square().sum()
    return (values.mean() - slope * x.mean()).item()


def _some(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)[: round(share * len(x))].to(x.device)]


def bootstrap(
    distance: Distance, a: Tensor, b: Tensor, resamples: int = 100, seed: int = 0
) -> Estimate:
    """The distance with its standard error: the spread over random halves of both sets, which is
    that over fresh sets of the whole size.

    Drawn without replacement (Politis & Romano 1994): among doubles a covariance loses rank, and
    where N is about D the error came out three times too large. Where halves lie says nothing, for
    they are more biased; the spread alone is used.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [distance(_some(a, 0.5, generator), _some(b, 0.5, generator)) for _ in range(resamples)]
    return Estimate(distance(a, b), torch.tensor(drawn, dtype=torch.float64).std().item())


def kernel(a: Tensor, b: Tensor) -> Estimate:
    """KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3 over all pairs (Binkowski et
    al. 2018); the error by leaving out each row in turn.
    """
    n, m = len(a), len(b)
    aa, bb, ab, ba = (_row_sums(x, y, _cubic) for x, y in ((a, a), (b, b), (a, b), (b, a)))
    aa, bb = (sums - _cubic_self(x) for sums, x in ((aa, a), (bb, b)))
    within_a, within_b, across = (
        aa.sum() / (n * (n - 1)),
        bb.sum() / (m * (m - 1)),
        ab.sum() / (n * m),
    )
    without_a = (aa.sum() - 2 * aa) / ((n - 1) * (n - 2)) - 2 * (ab.sum() - ab) / ((n - 1) * m)
    without_b = (bb.sum() - 2 * bb) / ((m - 1) * (m - 2)) - 2 * (ab.sum() - ba) / (n * (m - 1))
    variance = sum((len(each) - 1) * each.var(correction=0) for each in (without_a, without_b))
    return Estimate(
        (within_a + within_b - 2 * across).item(), torch.as_tensor(variance).sqrt().item()
    )


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _cubic_self(x: Tensor) -> Tensor:
    return torch.cat(
        [(block.double().square().sum(1) / x.shape[1] + 1) ** 3 for block in x.split(BLOCK)]
    )


def _row_sums(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(N, D), (M, D) -> (N,) the sums of the rows of the kernel's matrix (N, M), which is never
    whole.
    """
    return torch.cat(
        [
            torch.stack(
                [kernel(rows.double(), columns.double()).sum(1) for columns in y.split(BLOCK)]
            ).sum(0)
            for rows in x.split(BLOCK)
        ]
    )


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 times the squared MMD with the kernel exp(-|x - y|^2 / (2
    10^2)) on CLIP embeddings of length 1.

    All pairs, a row with itself too, which is the biased form of its authors' code.
    """
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b))

    def gauss(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp((x @ y.T - 1) / 100)  # |x - y|^2 = 2 - 2 x.y

    within_a, within_b, across = (
        _row_sums(x, y, gauss).sum() / (len(x) * len(y)) for x, y in ((a, a), (b, b), (a, b))
    )
    return 1000 * (within_a + within_b - 2 * across).item()


def precision_recall(a: Tensor, b: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of the generated features within reach of the reference and the other way round
    (Kynkaanniemi et al. 2019).

    A set reaches what is no further from one of its rows than that row's k-th nearest neighbour in
    the set.
    """
    return _reached(b, a, _reach(a, k)), _reached(a, b, _reach(b, k))


def _reach(x: Tensor, k: int) -> Tensor:
    """(N, D) -> (N,) squared distance to the k-th nearest other row."""
    found = []
    for start in range(0, len(x), BLOCK):
        squares = _squares(x[start : start + BLOCK], x)
        squares[torch.arange(len(squares)), torch.arange(start, start + len(squares))] = torch.inf
        found.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _reached(x: Tensor, y: Tensor, reach: Tensor) -> float:
    """Share of the rows of x within the reach (M,) of a row of y (M, D), give or take rounding: a
    row is always within reach of its double.
    """
    slack = 1e-13 * max(x.double().square().sum(1).max().item(), 1e-300)
    inside = sum((_squares(block, y) <= reach + slack).any(1).sum() for block in x.split(BLOCK))
    return int(inside) / len(x)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> squared distances (N, M)."""
    x, y = x.double(), y.double()
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
