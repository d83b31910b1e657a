"""Spoiled conditions: each step against a float64 reference, the recipe's odds, and no step that
shifts the picture."""

import math
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

import unclip_pl.data.degradation as degradation
from tests.oracles import degradation as oracle
from unclip_pl.data.degradation import (
    INTERPOLATIONS,
    DegradationConfig,
    bsr_light,
    degrade,
    downscale,
)

KINDS = ["none", "blur", "bsr"]


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(*shape, seed=0):
    return torch.from_numpy(rng(seed).random(shape, dtype=np.float32))


def by_channel(reference, image, *args):
    return np.stack([reference(channel, *args) for channel in image.double().numpy()])


def smooth(height, width):
    """(3, H, W) in [0, 1]: a bright blob at a place that is no pixel's centre, on grey, and its
    place (y, x) in units of the sides."""
    at = np.array([0.47, 0.54])
    y, x = (
        (np.arange(height)[:, None] + 0.5) / height - at[0],
        (np.arange(width) + 0.5) / width - at[1],
    )
    blob = np.exp(-0.5 * ((y * height) ** 2 + (x * width) ** 2) / (min(height, width) / 8) ** 2)
    return torch.from_numpy(0.25 + 0.5 * blob).float().expand(3, -1, -1), at


# Each step against its reference.


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


# The recipe's odds.


def test_orders_are_all_those_that_reduce_before_they_fit_and_equally_likely():
    orders = Counter(
        tuple(degradation.random_order(generator)) for generator in [rng(1)] for _ in range(6000)
    )
    assert all(
        order.index("reduce") < order.index("fit")
        and sorted(order) == ["blur", "fit", "jpeg", "noise", "reduce"]
        for order in orders
    )
    assert len(orders) == math.factorial(5) // 2
    assert min(orders.values()) >= 55 and max(orders.values()) <= 150  # 100 each


def test_steps_run_in_the_order_that_was_drawn(monkeypatch):
    ran = []
    order = ["noise", "reduce", "jpeg", "blur", "fit"]
    spied = {
        "noise": "gaussian_noise",
        "reduce": "random_reduce",
        "blur": "random_blur",
        "jpeg": "jpeg",
    }
    for step, name in spied.items():
        original = getattr(degradation, name)
        monkeypatch.setattr(
            degradation,
            name,
            lambda *args, step=step, original=original: ran.append(step) or original(*args),
        )
    monkeypatch.setattr(degradation, "random_order", lambda generator: order)
    seen = Counter()
    for seed in range(40):
        ran.clear()
        assert bsr_light(noise(3, 16, 16), rng(seed)).shape == (3, 4, 4)
        seen[tuple(ran)] += 1
    assert set(seen) == {
        ("noise", "reduce", "jpeg", "blur", "jpeg"),
        ("noise", "reduce", "blur", "jpeg"),
    }  # JPEG in the middle: 90%
    assert seen["noise", "reduce", "blur", "jpeg"] < 14


def test_choices_have_the_odds_and_ranges_of_the_recipe(monkeypatch):
    calls = {
        name: []
        for name in (
            "random_reduce",
            "blur_and_subsample",
            "anisotropic_kernel",
            "gaussian_blur",
            "jpeg",
            "random_interpolation",
            "resize",
            "bicubic",
        )
    }
    for name, seen in calls.items():

        def spy(*args, seen=seen, original=getattr(degradation, name)):
            result = original(*args)
            seen.append((args, result))
            return result

        monkeypatch.setattr(degradation, name, spy)
    draws, generator = 1500, rng(2)
    image = noise(3, 32, 32)
    for _ in range(draws):
        bsr_light(image, generator)
    factors = Counter(args[2] for args, _ in calls["random_reduce"])
    assert factors[2] + factors[4] == draws and factors[2] / draws == pytest.approx(0.25, abs=0.04)
    assert {args[0].shape[-1] for args, _ in calls["random_reduce"] if args[2] == 2} == {
        16
    }  # halved before
    aliased, antialiased = len(calls["resize"]) / draws, len(calls["bicubic"]) / draws
    assert aliased == pytest.approx(1 + 0.8 + 0.125, abs=0.05)  # fit, reduce, half of the halvings
    assert antialiased == pytest.approx(0.125, abs=0.03)
    sigmas = np.array([args[1] / (0.6 * args[2]) for args, _ in calls["blur_and_subsample"]])
    assert (
        len(sigmas) / draws == pytest.approx(0.2, abs=0.04)
        and sigmas.min() >= 0.04
        and 0.95 < sigmas.max() <= 1
    )
    reduced = np.array(
        [result.shape[-1] for args, result in calls["random_reduce"] if args[2] == 4]
    )
    assert (
        reduced.min() == 4 and reduced.max() >= 30 and np.mean(reduced == 4) > 0.1
    )  # 32 / U(1, 8)
    anisotropic = [args for args, _ in calls["anisotropic_kernel"]]
    assert (
        len(anisotropic) / draws == pytest.approx(0.5, abs=0.05)
        and len(anisotropic) + len(calls["gaussian_blur"]) == draws
    )
    assert {args[0] % 2 for args in anisotropic} == {1} and max(
        args[0] for args in anisotropic
    ) <= 15
    variances = np.array([args[2:] for args in anisotropic])
    assert 1.9 < variances.max() <= 2 and variances.mean() == pytest.approx(
        0.5 * (0.75 * 2 + 0.25 * 1.5), abs=0.08
    )
    sizes, widths = (
        np.array([args[1] for args, _ in calls["gaussian_blur"]]),
        np.array([args[2] for args, _ in calls["gaussian_blur"]]),
    )
    assert set(sizes) <= {1, 3, 5, 7} and 0.66 < widths.max() <= 0.7
    qualities = Counter(args[1] for args, _ in calls["jpeg"])
    assert set(qualities) == set(range(80, 96)) and sum(
        qualities.values()
    ) / draws == pytest.approx(1.9, abs=0.03)
    modes = Counter(result for _, result in calls["random_interpolation"])
    assert all(
        modes[mode] / modes.total() == pytest.approx(1 / 3, abs=0.04) for mode in INTERPOLATIONS
    )


@pytest.mark.parametrize(
    "kind,probability,share",
    [
        ("blur", None, 0.5),
        ("bsr", None, 1),
        ("none", 1.0, 0),
        ("blur", 0.2, 0.2),
        ("bsr", 0.7, 0.7),
        ("blur", 0.0, 0),
    ],
)
def test_the_share_of_spoiled_conditions_is_the_probability(kind, probability, share):
    image, generator = noise(3, 16, 16) * 2 - 1, rng(5)
    clean, config = downscale(image), DegradationConfig(kind, probability)
    spoiled = np.mean(
        [not torch.equal(degrade(image, config, generator), clean) for _ in range(400)]
    )
    assert spoiled == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)


# Nothing shifts.


@pytest.mark.parametrize("seed", range(40))
def test_blurs_leave_a_ramp_where_it_is(seed):
    ramp = torch.linspace(0, 1, 40).expand(3, 40, -1)  # half a pixel of shift would be 0.013
    for image in (ramp, ramp.mT):
        assert (degradation.random_blur(image, rng(seed), 4) - image)[
            :, 8:-8, 8:-8
        ].abs().max() < 1e-5


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.4])
def test_subsampling_puts_pixels_at_the_centres_of_their_blocks(factor, sigma):
    ramp = torch.arange(96.0).expand(3, 96, -1)
    small = degradation.blur_and_subsample(ramp, sigma, factor)
    expected = torch.arange(96 // factor) * factor + (factor - 1) / 2
    inside = slice(16 // factor, -16 // factor)
    assert (small[0, 0] - expected)[inside].abs().max() < 1e-3


@pytest.mark.parametrize("mode", INTERPOLATIONS)
@pytest.mark.parametrize("size", [7, 13, 16, 31, 33, 61, 90])
def test_resizing_to_any_size_and_on_to_a_quarter_keeps_places(mode, size):
    ramp = torch.arange(64.0).expand(3, 64, -1)
    between = degradation.resize(ramp, size, size, mode)
    small = degradation.resize(between, 16, 16, mode)[0, 0]
    error = (small - (torch.arange(16) * 4 + 1.5))[3:-3]  # in pixels of the large picture
    assert error.mean().abs() < 0.05 and error.abs().max() < (0.5 if size >= 16 else 2.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(64, 64), (52, 76)]
)  # 76 / scale and 38 / scale are odd half the time
def test_the_blob_of_the_condition_lies_where_that_of_the_picture_lies(kind, shape):
    image, at = smooth(*shape)
    config, generator = DegradationConfig(kind, probability=1.0), rng(3)
    errors = []
    for _ in range(150):
        low = degrade(image * 2 - 1, config, generator)
        weight = ((low.mean(0).double().numpy() + 1) / 2 - 0.25 - 0.05).clip(
            0
        )  # the foot is cut off: noise has no weight far out
        errors.append((oracle.centroid(weight) - at) * low.shape[-2:])
    errors = np.array(errors)
    assert (
        np.abs(errors.mean(0)).max() < 0.02
    )  # in pixels of the condition; a step off by half a large pixel makes 0.125
    assert np.sqrt((errors**2).mean()) < 0.1


def test_the_test_of_places_sees_one_large_pixel():
    image, at = smooth(64, 64)
    low = downscale(torch.roll(image, 1, dims=-1) * 2 - 1)
    weight = ((low.mean(0).double().numpy() + 1) / 2 - 0.25 - 0.05).clip(0)
    assert (oracle.centroid(weight) - at)[1] * 16 == pytest.approx(0.25, abs=0.02)


# What callers rely on.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (4, 4), (8, 4), (20, 36)])
def test_conditions_are_a_quarter_in_range_and_repeat_with_their_generator_and_leave_the_picture_alone(
    kind, shape
):
    extremes = (noise(3, *shape) > 0.5).float() * 2 - 1
    image = extremes.clone()
    config = DegradationConfig(kind, probability=1.0)
    for seed in range(25):
        low = degrade(image, config, rng(seed))
        assert (
            low.shape == (3, shape[0] // 4, shape[1] // 4)
            and low.dtype == torch.float32
            and low.is_contiguous()
        )
        assert low.min() >= -1 and low.max() <= 1 and torch.isfinite(low).all()
        assert torch.equal(low, degrade(image, config, rng(seed)))
        assert torch.equal(image, extremes)


def test_steps_leave_their_picture_alone_and_stay_in_range():
    extremes = (noise(3, 16, 16) > 0.5).float()
    image = extremes.clone()
    for seed in range(30):
        g = rng(seed)
        for result in (
            degradation.random_blur(image, g, 4), degradation.random_reduce(image, g, 4), degradation.jpeg(image, 80),
            degradation.gaussian_noise(image, degradation.random_mixing(g), g), bsr_light(image, g),
        ):  # fmt: skip
            assert result.min() >= 0 and result.max() <= 1 and torch.equal(image, extremes)


def test_another_generator_spoils_otherwise_and_torch_is_not_touched():
    image = noise(3, 32, 32) * 2 - 1
    state = torch.get_rng_state()
    results = [degrade(image, DegradationConfig("bsr"), rng(seed)) for seed in range(8)]
    assert all(not torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(state, torch.get_rng_state())


def test_a_picture_cut_out_of_another_gives_the_same_as_its_copy():
    large = noise(3, 40, 40) * 2 - 1
    cut = large[:, 3:35, 5:37]
    channels_last = cut.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for kind in KINDS:
        expected = degrade(cut.contiguous(), DegradationConfig(kind, 1.0), rng(4))
        for view in (cut, channels_last):
            before = view.clone()
            np.testing.assert_allclose(
                degrade(view, DegradationConfig(kind, 1.0), rng(4)),
                expected,
                atol=1e-5 if kind != "bsr" else 2.5 / 255,
            )
            assert torch.equal(view, before)


@pytest.mark.parametrize("shape", [(3, 30, 32), (3, 32, 30), (1, 32, 32), (3, 0, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_cannot_become_a_quarter_are_refused(shape, kind):
    with pytest.raises(ValueError, match="multiples of 4"):
        degrade(torch.zeros(shape), DegradationConfig(kind), rng())


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "haze"},
        {"probability": 1.5},
        {"probability": -0.1},
        {"kernel_size": 4},
        {"kernel_size": -1},
        {"sigma": 0},
        {"sigma": math.nan},
    ],
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="DegradationConfig"):
        DegradationConfig(**wrong)


def test_yaml_and_command_line_can_set_everything():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--degradation", type=DegradationConfig, default=DegradationConfig())
    parsed = parser.parse_args(["--degradation.kind", "bsr", "--degradation.probability", "0.9"])
    assert parser.instantiate(parsed).degradation == DegradationConfig("bsr", 0.9)
    assert parser.instantiate(
        parser.parse_object({"degradation": {"sigma": 1.5}})
    ).degradation == DegradationConfig(sigma=1.5)
