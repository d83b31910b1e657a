"""Distances agree with closed forms, with clean-fid and torchmetrics, and with the definitions
written out; they have the properties that make them usable.
"""

import math
from unittest import mock

import cleanfid.fid
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from eval import distances
from tests.eval.sets import exactly, features


def cleanfid_frechet(a, b):
    """clean-fid's own; it gives scipy's sqrtm the argument `disp`, which scipy 1.18 no longer has,
    so sqrtm is called here without.
    """
    x, y = a.double().numpy(), b.double().numpy()
    with mock.patch.object(cleanfid.fid.linalg, "sqrtm", lambda m, disp: (sqrtm(m), None)):
        moments = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
        return float(cleanfid.fid.frechet_distance(*moments))


@pytest.mark.parametrize("dim", [1, 2, 16, 128])
def test_frechet_of_commuting_gaussians_has_its_closed_form(dim):
    """Covariances with the same eigenvectors: |mu|^2 + sum (s - t)^2 of the standard deviations."""
    generator = torch.Generator().manual_seed(dim)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    s, t = (torch.rand(dim, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    mu, nu = (torch.randn(dim, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = exactly(mu, axes * s, 3 * dim + 5, 1), exactly(nu, axes * t, 2 * dim + 9, 2)
    assert distances.frechet(a, b) == pytest.approx(
        ((mu - nu).square().sum() + (s - t).square().sum()).item(), rel=1e-9
    )


def test_frechet_at_2048_dimensions_has_its_closed_form():
    dim = 2048
    s, t = (
        torch.linspace(0.2, 2, dim, dtype=torch.float64),
        torch.linspace(1, 0.5, dim, dtype=torch.float64),
    )
    a, b = (
        distances.Gaussian(torch.full((dim,), mean, dtype=torch.float64), torch.diag(v.square()))
        for mean, v in ((0.0, s), (0.1, t))
    )
    assert distances.gaussian_frechet(a, b) == pytest.approx(
        (s - t).square().sum().item() + dim * 0.01, rel=1e-9
    )


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 300, 32), (300, 200, 64), (400, 400, 128)])
def test_frechet_equals_clean_fid(n, m, dim):
    a, b = features(n, dim, 1), features(m, dim, 2, 0.02)
    assert distances.frechet(a, b) == pytest.approx(cleanfid_frechet(a, b), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "dim"), [(40, 40, 128), (40, 200, 128), (60, 300, 128)])
def test_frechet_with_fewer_images_than_features_equals_that_in_the_space_they_span(n, m, dim):
    """In an orthonormal basis of all rows nothing changes, and there eigenvalues of a small
    symmetric matrix give the trace.
    """
    a, b = features(n, dim, 1).double(), features(m, dim, 2, 0.02).double()
    ca, cb = (torch.from_numpy(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=1e-14).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * trace
    assert distances.frechet(a, b) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dead", ["both", "reference", "generated"])
def test_a_feature_that_never_changes_makes_a_covariance_singular_and_changes_nothing(dead):
    a, b = features(300, 32, 1), features(300, 32, 2, 0.02)
    expected = distances.frechet(a[:, 1:], b[:, 1:])
    if dead != "generated":
        a[:, 0] = 0.5
    if dead != "reference":
        b[:, 0] = 0.5
    gap = (
        (a[:, 0].double().mean() - b[:, 0].double().mean()).square()
        + a[:, 0].double().var()
        + b[:, 0].double().var()
    )
    assert distances.frechet(a, b) == pytest.approx(expected + gap.item(), rel=1e-6)


@pytest.mark.parametrize(("n", "dim"), [(300, 32), (80, 64)])
def test_frechet_equals_torchmetrics(n, dim):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Rows(nn.Module):
        num_features = dim

        def forward(self, rows):
            return rows.flatten(1)

    metric = FrechetInceptionDistance(feature=Rows(), input_img_size=(1, 1, dim)).set_dtype(
        torch.float64
    )
    a, b = features(n, dim, 1), features(n, dim, 2, 0.02)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    assert distances.frechet(a, b) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_a_singular_covariance_of_many_images_is_taken_as_it_is():
    """Features that are always 0 and doubled ones add nothing but their own part."""
    a, b = features(200, 8, 1), features(200, 8, 2, 0.05)
    wide = [torch.cat([x, torch.zeros(200, 4)], 1) for x in (a, b)]
    assert distances.frechet(*wide) == pytest.approx(distances.frechet(a, b), rel=1e-9)
    twice = [torch.cat([x, x], 1) for x in (a, b)]
    assert distances.frechet(*twice) == pytest.approx(2 * distances.frechet(a, b), rel=1e-7)


@pytest.mark.parametrize("n", [37, 1100])
def test_kid_equals_clean_fid_torchmetrics_and_its_definition(n):
    from torchmetrics.image.kid import KernelInceptionDistance

    dim = 24
    a, b = features(n, dim, 1), features(n, dim, 2, 0.02)
    x, y = a.double(), b.double()
    kxx, kyy, kxy = ((u @ v.T / dim + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    expected = (
        (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (n * (n - 1)) - 2 * kxy.mean()
    ).item()
    found = distances.kid(a, b)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert found.value == pytest.approx(
        cleanfid.fid.kernel_distance(x.numpy(), y.numpy(), 1, n), rel=1e-6
    )

    class Rows(nn.Module):
        def forward(self, rows):
            return rows.flatten(1)

    metric = KernelInceptionDistance(feature=Rows(), subsets=1, subset_size=n).set_dtype(
        torch.float64
    )
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert found.value == pytest.approx(metric.compute()[0].item(), rel=1e-6)


def test_the_error_of_kid_is_that_of_leaving_each_image_out_and_the_spread_of_fresh_sets():
    a, b = features(12, 6, 1), features(9, 6, 2, 0.1)
    less_a = [distances.kid(torch.cat([a[:i], a[i + 1 :]]), b).value for i in range(12)]
    less_b = [distances.kid(a, torch.cat([b[:i], b[i + 1 :]])).value for i in range(9)]
    expected = math.sqrt(11 * np.var(less_a) + 8 * np.var(less_b))
    assert distances.kid(a, b).error == pytest.approx(expected, rel=1e-8)
    fresh = [
        distances.kid(features(150, 6, 2 * i), features(150, 6, 2 * i + 1, 0.1)) for i in range(60)
    ]
    assert np.mean([each.error for each in fresh]) == pytest.approx(
        np.std([each.value for each in fresh]), rel=0.25
    )


def test_cmmd_equals_its_definition_pair_by_pair():
    a, b = features(30, 8, 1).double() + 0.1, features(1050, 8, 2, 0.1).double() + 0.1
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    kxx, kyy, kxy = (
        torch.exp(-((u[:, None] - v[None]) ** 2).sum(-1) / 200).mean()
        for u, v in ((a, a), (b, b), (a, b))
    )
    assert distances.cmmd(3 * a, 0.5 * b) == pytest.approx(
        1000 * (kxx + kyy - 2 * kxy).item(), rel=1e-6
    )


@pytest.mark.parametrize(("n", "m", "k"), [(30, 25, 3), (1040, 40, 5)])
def test_precision_and_recall_equal_their_definition_image_by_image(n, m, k):
    a, b = features(n, 4, 1).double(), features(m, 4, 2, 0.15).double()

    def within(points, centres):
        between = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
        radius = between.sort(1).values[:, k]  # the nearest is the row itself
        return np.mean([any((p - c).norm() <= r for c, r in zip(centres, radius)) for p in points])

    precision, recall = distances.precision_recall(a, b, k)
    if n < 100:
        assert (precision, recall) == pytest.approx((within(b, a), within(a, b)))
    else:
        assert precision == pytest.approx(within(b, a))
    assert 0 < precision < 1 or 0 < recall < 1


def test_a_set_against_itself_is_at_no_distance_and_within_its_own_reach():
    for n, dim in ((40, 64), (300, 32)):
        a = features(n, dim)
        assert abs(distances.frechet(a, a)) < 1e-7
        assert abs(distances.cmmd(a, a)) < 1e-9
        assert distances.kid(a, a).value <= 0  # unbiased: a little below
        assert distances.precision_recall(a, a) == (1, 1)
        assert distances.precision_recall(a, a[torch.zeros(n, dtype=torch.int64)].clone()) == (
            1,
            pytest.approx(1 / n, abs=0.1),
        )


def test_order_does_not_matter():
    a, b = features(300, 32, 1), features(250, 32, 2, 0.05)
    p, q = (torch.randperm(n, generator=torch.Generator().manual_seed(3)) for n in (300, 250))
    for distance in (
        distances.frechet,
        lambda x, y: distances.kid(x, y).value,
        distances.cmmd,
        lambda x, y: distances.precision_recall(x, y)[0],
    ):
        assert distance(a[p], b[q]) == pytest.approx(distance(a, b), rel=1e-9)


@pytest.mark.parametrize(("n", "dim", "shift"), [(200, 4, 0.1), (60, 32, 0.05)])
def test_the_bootstrap_covers_what_fresh_sets_give(n, dim, shift):
    """The interval holds the mean of the estimator at this size in about 95 of 100 experiments, and
    its error is the spread of fresh sets.
    """
    fresh = [
        distances.bootstrap(
            distances.frechet,
            features(n, dim, 2 * i),
            features(n, dim, 2 * i + 1, shift),
            20,
            seed=i,
        )
        for i in range(50)
    ]
    mean, spread = np.mean([each.value for each in fresh]), np.std([each.value for each in fresh])
    assert 0.85 <= np.mean([each.interval[0] <= mean <= each.interval[1] for each in fresh]) <= 1
    assert 0.75 * spread < np.mean([each.error for each in fresh]) < 1.5 * spread


@pytest.mark.parametrize("resamples", [1, 0, -5])
def test_a_bootstrap_of_fewer_than_two_halves_is_refused(resamples):
    with pytest.raises(ValueError, match=f"has {resamples} resamples: give 2 or more"):
        distances.bootstrap(distances.frechet, features(9, 2), features(9, 2), resamples)


def test_frechet_infinity_is_nearer_to_the_truth_than_frechet():
    """Two sets of one distribution: the truth is 0, FID lies above it."""
    pairs = [
        [torch.randn(160, 16, generator=torch.Generator().manual_seed(2 * i + j)) for j in (0, 1)]
        for i in range(12)
    ]
    plain, extended = (
        np.mean([f(*pair) for pair in pairs])
        for f in (distances.frechet, distances.frechet_infinity)
    )
    assert plain > 0.5
    assert abs(extended) < plain / 5
