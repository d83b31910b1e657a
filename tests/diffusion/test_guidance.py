"""Guidance and thresholds as wrappers of Predict."""

import numpy as np
import pytest
import torch

from unclip_pl.diffusion.guidance import (
    classifier_free_guidance,
    dynamic_threshold,
    static_threshold,
    thresholded,
)
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Prediction, Process
from unclip_pl.diffusion.samplers import SAMPLERS

PROCESS = Process(DiffusionConfig(variance="fixed_small"))
T = torch.tensor([10, 400, 990])


def two_models():
    conditional = PROCESS.adapt(lambda x, t: torch.tanh(x + 0.4))
    null = PROCESS.adapt(lambda x, t: torch.sin(2 * x))
    return conditional, null


def together(conditional, null):
    """One predictor of a doubled batch."""

    def predict(x, t):
        (x1, x2), (t1, t2) = x.chunk(2), t.chunk(2)
        return Prediction(*map(torch.cat, zip(conditional(x1, t1), null(x2, t2), strict=True)))

    return predict


def x_of(size=3):
    return Noise(range(size))((3, 4, 4))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scale_one_draws_exactly_what_the_conditional_draws(sampler):
    conditional, null = two_models()
    schedule = PROCESS.schedule.respaced(10)
    predict = classifier_free_guidance(together(conditional, null), 1.0)
    draw = SAMPLERS[sampler]
    assert torch.equal(
        draw(predict, x_of(), schedule, noise=Noise([1, 2, 3])),
        draw(conditional, x_of(), schedule, noise=Noise([1, 2, 3])),
    )


def test_guidance_extrapolates_x0_and_eps_alike():
    conditional, null = two_models()
    x = x_of()
    cond, uncond = conditional(x, T), null(x, T)
    both = together(conditional, null)
    ours = classifier_free_guidance(both, 3.0)(x, T)
    torch.testing.assert_close(ours.eps, uncond.eps + 3 * (cond.eps - uncond.eps))
    torch.testing.assert_close(ours.x0, PROCESS.to_x0(ours.eps, x, T), rtol=1e-4, atol=1e-3)
    assert torch.equal(ours.log_var, cond.log_var)
    assert torch.equal(classifier_free_guidance(both, 0.0)(x, T).eps, uncond.eps)


def test_the_null_branch_sees_the_noised_sample():
    both = together(*two_models())
    x = x_of().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier_free_guidance(both, 0.0)(x, T).eps.sum(), x)
    assert gradient.abs().min() > 0
    torch.testing.assert_close(gradient, 2 * torch.cos(2 * x))


def test_static_threshold_is_a_clamp_and_eps_still_describes_x_t():
    conditional, _ = two_models()
    x = 3 * x_of()
    for mode in ("static", "dynamic"):
        ours = thresholded(conditional, PROCESS, mode)(x, T)
        assert ours.x0.abs().max() <= 1
        torch.testing.assert_close(PROCESS.diffuse(ours.x0, T, ours.eps), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        static_threshold(torch.tensor([-12.0, 0.5, 11.0]), 10.0), torch.tensor([-10.0, 0.5, 10.0])
    )


def test_a_threshold_changes_nothing_where_x0_is_in_range():
    inside = PROCESS.adapt(lambda x, t: PROCESS.x0_to_eps(0.5 * torch.tanh(x), x, t))
    x = x_of()
    for mode in ("static", "dynamic", None):
        for ours, plain in zip(thresholded(inside, PROCESS, mode)(x, T), inside(x, T), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_dynamic_threshold_agrees_with_numpy_and_treats_samples_apart():
    x0 = torch.stack([0.1 * x_of(1)[0], 2 * x_of(2)[1], 5 * x_of(3)[2]])
    ours = dynamic_threshold(x0, quantile=0.9)
    for row, result in zip(x0.double().numpy(), ours, strict=True):
        s = max(np.quantile(np.abs(row), 0.9), 1.0)
        np.testing.assert_allclose(result, np.clip(row, -s, s) / s, rtol=1e-5)
    assert torch.equal(ours[1:2], dynamic_threshold(x0[1:2], quantile=0.9))


def test_an_unknown_threshold_is_a_sentence():
    with pytest.raises(ValueError, match="static, dynamic"):
        thresholded(lambda x, t: Prediction(x, x, x), PROCESS, "soft")
