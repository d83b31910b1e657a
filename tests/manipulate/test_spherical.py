"""Slerp against a reference in float64; its ends, limits and refusals."""

import math

import numpy as np
import pytest
import torch

from tests.manipulate.pictures import great_circle, pictures
from unclip_pl.manipulate import (
    slerp,
)
from unclip_pl.utils.errors import UserError


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, math.pi / 2, 2.5, math.pi - 1e-3])
@pytest.mark.parametrize("theta", [0.0, 0.25, 0.5, 1.0])
def test_slerp_has_the_angle_and_the_norm_of_the_reference(angle, theta):
    random = np.random.default_rng(0)
    u, w = np.linalg.qr(random.standard_normal((64, 2)))[0].T
    a, b = 3 * u, 5 * (math.cos(angle) * u + math.sin(angle) * w)
    start, end = torch.tensor(a)[None], torch.tensor(b)[None]
    ours = slerp(start, end, torch.tensor([theta]))[0].numpy()
    direction, omega = great_circle(a, b, theta)
    assert np.linalg.norm(ours) == pytest.approx((1 - theta) * 3 + theta * 5, rel=1e-9)
    np.testing.assert_allclose(ours / np.linalg.norm(ours), direction, atol=1e-9)
    assert omega == pytest.approx(angle, abs=1e-7)


def test_slerp_ends_are_its_ends_and_a_batch_is_rows():
    a, b = pictures(3, 1), pictures(3, 2)
    theta = torch.tensor([0.0, 0.4, 1.0])
    way = slerp(a, b, theta)
    torch.testing.assert_close(way[0], a[0])
    torch.testing.assert_close(way[2], b[2])
    torch.testing.assert_close(way[1:2], slerp(a[1:2], b[1:2], theta[1:2]), rtol=0, atol=0)
    assert way.dtype == torch.float32


def test_slerp_of_the_same_vector_is_that_vector():
    a = pictures(1)
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.3])), a)
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor([0.5])), 1.5 * a)


@pytest.mark.parametrize("factor, word", [(-1.0, "opposite"), (-2.0, "opposite"), (0.0, "zero")])
def test_slerp_between_opposite_vectors_or_zero_is_a_sentence(factor, word):
    a = pictures(1)
    with pytest.raises(UserError, match=word):
        slerp(a, factor * a, torch.tensor([0.3]))


@pytest.mark.parametrize("theta", [-0.1, 1.1, float("nan")])
def test_theta_outside_its_range_is_a_sentence(theta):
    with pytest.raises(UserError, match="theta"):
        slerp(pictures(1), pictures(1, 1), torch.tensor([theta]))
