"""Each step of a degradation against a float64 reference."""

import math
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import unclip_pl.data.degradation as degradation
from tests.data.degradationkit import by_channel, noise, rng, smooth
from tests.oracles import degradation as oracle
from unclip_pl.data.degradation import (
    INTERPOLATIONS,
    downscale,
)


@pytest.mark.parametrize(
    "shape", [(9, 12), (3, 5), (1, 2)]
)  # the kernel is larger than some of the pictures
@pytest.mark.parametrize("size,sigma", [(1, 0.6), (3, 0.6), (5, 0.9), (7, 0.0)])
def test_gaussian_blur_is_convolution_with_mirrored_borders(shape, size, sigma):
    image = noise(3, *shape)
    kernel = oracle.gaussian_kernel(size, max(sigma, 1e-3) ** 2 * np.eye(2))
    np.testing.assert_allclose(
        degradation.gaussian_blur(image, size, sigma),
        by_channel(oracle.convolve, image, kernel),
        atol=2e-6,
    )


@pytest.mark.parametrize("shape,size", [((9, 12), 5), ((16, 17), 9), ((4, 3), 9)])
@pytest.mark.parametrize(
    "angle,variances", [(0.5, (2.0, 0.3)), (2.1, (0.1, 1.4)), (0.0, (1.0, 0.2))]
)
def test_anisotropic_blur_is_convolution_with_a_turned_gaussian(shape, size, angle, variances):
    image, kernel = noise(3, *shape), degradation.anisotropic_kernel(size, angle, *variances)
    expected = oracle.gaussian_kernel(size, oracle.rotated_covariance(angle, *variances))
    np.testing.assert_allclose(kernel, expected, atol=1e-12)
    np.testing.assert_allclose(
        degradation.anisotropic_blur(image, kernel),
        by_channel(oracle.convolve, image, expected),
        atol=2e-6,
    )


def test_a_gaussian_without_width_leaves_the_picture_as_it_is():
    kernel = degradation.anisotropic_kernel(15, 0.7, 0.0, 0.0)
    assert kernel[7, 7] == 1 and kernel.sum() == 1


CV2 = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}
SIZES = [
    *[((16, 12), (4, 3)), ((17, 13), (7, 6)), ((16, 16), (15, 9)), ((9, 8), (9, 8))],
    *[((5, 4), (12, 9)), ((14, 20), (58, 56)), ((2, 3), (8, 8))],  # larger
    *[((12, 9), (8, 13)), ((9, 12), (13, 8)), ((40, 1), (7, 3))],  # one side larger
]


def by_cv2(image, height, width, mode):
    resized = cv2.resize(image.permute(1, 2, 0).numpy(), (width, height), interpolation=CV2[mode])
    return resized.transpose(2, 0, 1)


@pytest.mark.parametrize("mode", INTERPOLATIONS)
@pytest.mark.parametrize("before,after", SIZES)
def test_resizing_is_that_of_cv2(mode, before, after):
    image = noise(3, *before)
    expected = by_cv2(image, *after, mode)
    np.testing.assert_allclose(degradation.resize(image, *after, mode), expected, atol=2e-5)


def test_resizes_of_bsr_light_alias_as_those_of_cv2():
    """An antialiased step would leave a fraction of this noise."""
    image, resized = noise(3, 96, 80), 0
    for seed in range(30):
        same, small = rng(seed), degradation.random_reduce(image, rng(seed), 4)
        if same.random() >= 0.8:
            continue
        scale = same.uniform(1, 8)
        size = int(96 / scale), int(80 / scale)
        expected = by_cv2(image, *size, INTERPOLATIONS[same.integers(3)]).clip(0, 1)
        np.testing.assert_allclose(small, expected, atol=2e-5)
        resized += 1
    assert resized > 15


@pytest.mark.parametrize(
    "before,after", [((16, 12), (4, 3)), ((17, 13), (7, 6)), ((5, 4), (12, 9))]
)
def test_bicubic_weighs_pixels_like_the_reference(before, after):
    image = noise(3, *before)
    expected = by_channel(oracle.bicubic, image, *after)
    np.testing.assert_allclose(degradation.bicubic(image, *after), expected, atol=3e-6)


def test_bicubic_to_a_quarter_agrees_with_pillow():
    image = noise(3, 32, 48)
    pillow = [
        Image.fromarray(channel).resize((12, 8), Image.Resampling.BICUBIC)
        for channel in image.numpy()
    ]
    np.testing.assert_allclose(degradation.bicubic(image, 8, 12), np.stack(pillow), atol=2e-6)


def test_low_resolution_sources_are_antialiased_bicubic_and_batches_are_their_pictures():
    images = noise(2, 3, 24, 32) * 2 - 1
    small = downscale(images)
    for one, image in zip(small, images):
        np.testing.assert_allclose(
            one, by_channel(oracle.bicubic, image, 6, 8).clip(-1, 1), atol=5e-6
        )
        assert torch.equal(downscale(image), one)
    stripes = torch.ones(3, 32, 32)
    stripes[
        ..., ::2
    ] = (
        -1
    )  # finer than the small picture can hold: grey, where nearest neighbour gives black or white
    assert downscale(stripes)[..., 2:-2].abs().max() < 0.02


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.4])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_subsampling_takes_gaussian_means_around_the_centres_of_the_blocks(sigma, factor):
    image = noise(3, 12, 24)
    np.testing.assert_allclose(
        degradation.blur_and_subsample(image, sigma, factor),
        by_channel(oracle.blur_and_subsample, image, sigma, factor),
        atol=3e-6,
    )


@pytest.mark.parametrize("seed", range(6))
def test_noise_has_the_covariance_of_its_mixing_and_no_memory_from_pixel_to_pixel(seed):
    mixing = degradation.random_mixing(rng(seed)) * 10  # louder, still far from the clipping
    grey = torch.full((3, 200, 300), 0.5)
    added = (degradation.gaussian_noise(grey, mixing, rng(seed)) - grey).double().numpy()
    covariance = mixing @ mixing.T
    np.testing.assert_allclose(
        np.cov(added.reshape(3, -1)), covariance, atol=0.03 * covariance.max()
    )
    assert np.abs(added.mean((1, 2))).max() < 5 * math.sqrt(covariance.max() / 60_000)
    for near, far in ((added[0][:, 1:], added[0][:, :-1]), (added[0][1:], added[0][:-1])):
        assert abs(np.mean(near * far)) < 0.03 * covariance[0, 0]


def test_levels_and_kinds_of_noise_are_those_of_the_recipe():
    kinds = Counter()
    for seed in range(1500):
        mixing = degradation.random_mixing(rng(seed))
        covariance = mixing @ mixing.T * 255**2
        if np.allclose(covariance, covariance[0, 0] * np.eye(3)):
            kinds["colour", round(math.sqrt(covariance[0, 0]), 6)] += 1
        elif np.allclose(covariance, covariance[0, 0]):
            kinds["grey", round(math.sqrt(covariance[0, 0]), 6)] += 1
        else:
            kinds["correlated"] += 1
            same = rng(seed)
            same.integers(1, 3), same.random()  # level and kind
            np.testing.assert_allclose(
                covariance / 255**2,
                oracle.correlated_covariance(same.random((3, 3)), same.random(3)),
                atol=1e-10,
            )
    shares = {kind: count / 1500 for kind, count in kinds.items()}
    expected = {
        ("colour", 1): 0.2,
        ("colour", 2): 0.2,
        ("grey", 1): 0.2,
        ("grey", 2): 0.2,
        "correlated": 0.2,
    }
    assert shares == pytest.approx(expected, abs=0.04)


def test_jpeg_keeps_colours_and_places_and_loses_more_at_a_lower_quality():
    image = torch.stack(
        [
            smooth(40, 56)[0][0],
            torch.linspace(0, 1, 56).expand(40, -1),
            torch.linspace(1, 0, 40)[:, None].expand(-1, 56),
        ]
    )
    loss = [
        (degradation.jpeg(image, quality) - image).abs().mean().item() for quality in (95, 80, 10)
    ]
    assert loss[0] < loss[1] < loss[2] and loss[1] < 3 / 255
    levels = degradation.jpeg(image, 90) * 255
    assert levels.shape == image.shape and levels.dtype == torch.float32
    assert (
        (levels - levels.round()).abs().max() < 1e-4 and levels.min() >= 0 and levels.max() <= 255
    )
