"""Degraded conditions: the odds of the recipe, no step shifts the picture, and the settings."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

import unclip_pl.data.degradation as degradation
from tests.data.degradationkit import KINDS, noise, rng, smooth
from tests.oracles import degradation as oracle
from unclip_pl.data.degradation import (
    INTERPOLATIONS,
    DegradationConfig,
    bsr_light,
    degrade,
    downscale,
)


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
    # JPEG in the middle: 90%
    assert set(seen) == {
        ("noise", "reduce", "jpeg", "blur", "jpeg"),
        ("noise", "reduce", "blur", "jpeg"),
    }
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
    # halved before
    assert {args[0].shape[-1] for args, _ in calls["random_reduce"] if args[2] == 2} == {16}
    aliased, antialiased = len(calls["resize"]) / draws, len(calls["bicubic"]) / draws
    assert aliased == pytest.approx(1 + 0.8 + 0.125, abs=0.05)  # fit, reduce, half of the halvings
    assert antialiased == pytest.approx(0.125, abs=0.03)
    sigmas = np.array([args[1] / (0.6 * args[2]) for args, _ in calls["blur_and_subsample"]])
    assert len(sigmas) / draws == pytest.approx(0.2, abs=0.04)
    assert sigmas.min() >= 0.04
    assert 0.95 < sigmas.max() <= 1
    reduced = np.array(
        [result.shape[-1] for args, result in calls["random_reduce"] if args[2] == 4]
    )
    # 32 / U(1, 8)
    assert reduced.min() == 4 and reduced.max() >= 30 and np.mean(reduced == 4) > 0.1
    anisotropic = [args for args, _ in calls["anisotropic_kernel"]]
    assert len(anisotropic) / draws == pytest.approx(0.5, abs=0.05)
    assert len(anisotropic) + len(calls["gaussian_blur"]) == draws
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
def test_the_share_of_degraded_conditions_is_the_probability(kind, probability, share):
    image, generator = noise(3, 16, 16) * 2 - 1, rng(5)
    clean, config = downscale(image), DegradationConfig(kind, probability)
    degraded = np.mean(
        [not torch.equal(degrade(image, config, generator), clean) for _ in range(400)]
    )
    assert degraded == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)


@pytest.mark.parametrize("seed", range(40))
def test_blurs_leave_a_ramp_where_it_is(seed):
    ramp = torch.linspace(0, 1, 40).expand(3, 40, -1)  # half a pixel of shift would be 0.013
    for image in (ramp, ramp.mT):
        change = degradation.random_blur(image, rng(seed), 4) - image
        assert change[:, 8:-8, 8:-8].abs().max() < 1e-5


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
        # the foot is cut off: noise has no weight far out
        weight = ((low.mean(0).double().numpy() + 1) / 2 - 0.25 - 0.05).clip(0)
        errors.append((oracle.centroid(weight) - at) * low.shape[-2:])
    errors = np.array(errors)
    # in pixels of the condition; a step off by half a large pixel makes 0.125
    assert np.abs(errors.mean(0)).max() < 0.02
    assert np.sqrt((errors**2).mean()) < 0.1


def test_the_test_of_places_sees_one_large_pixel():
    image, at = smooth(64, 64)
    low = downscale(torch.roll(image, 1, dims=-1) * 2 - 1)
    weight = ((low.mean(0).double().numpy() + 1) / 2 - 0.25 - 0.05).clip(0)
    assert (oracle.centroid(weight) - at)[1] * 16 == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (4, 4), (8, 4), (20, 36)])
def test_conditions_are_a_quarter_in_range_and_repeat_with_their_generator(kind, shape):
    extremes = (noise(3, *shape) > 0.5).float() * 2 - 1
    image = extremes.clone()
    config = DegradationConfig(kind, probability=1.0)
    for seed in range(25):
        low = degrade(image, config, rng(seed))
        assert low.shape == (3, shape[0] // 4, shape[1] // 4)
        assert low.dtype == torch.float32 and low.is_contiguous()
        assert low.min() >= -1 and low.max() <= 1 and torch.isfinite(low).all()
        assert torch.equal(low, degrade(image, config, rng(seed)))
        assert torch.equal(image, extremes)


def test_steps_leave_their_picture_alone_and_stay_in_range():
    extremes = (noise(3, 16, 16) > 0.5).float()
    image = extremes.clone()
    for seed in range(30):
        g = rng(seed)
        results = [
            degradation.random_blur(image, g, 4),
            degradation.random_reduce(image, g, 4),
            degradation.jpeg(image, 80),
            degradation.gaussian_noise(image, degradation.random_mixing(g), g),
            bsr_light(image, g),
        ]
        for result in results:
            assert result.min() >= 0 and result.max() <= 1 and torch.equal(image, extremes)


def test_another_generator_degrades_differently_and_torch_is_not_touched():
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
