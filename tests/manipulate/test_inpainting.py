"""Inpainting and image to image: what stays, what is drawn, and the limits of strength."""

import pytest
import torch

from tests.manipulate.pictures import pictures
from unclip_pl.diffusion.process import Prediction
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.manipulate import (
    image_to_image,
    inpaint,
)
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.errors import UserError

every_sampler = pytest.mark.parametrize(
    "sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm_solver_pp", 0.0)]
)


@every_sampler
def test_inpainting_keeps_what_is_known_and_draws_the_rest(unclip, sampler, eta):
    images = pictures().clamp(-1, 1)
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[:, :, 4:12, 4:12] = True
    settings = DecoderSamplingConfig(sampler=sampler, steps=5, eta=eta)
    drawn = inpaint(unclip, None, [0, 1], sampling=settings, images=images, mask=mask)
    inside = mask.expand_as(images)
    assert torch.equal(drawn[~inside], images[~inside])
    assert (drawn - images)[inside].abs().mean() > 0.05
    other = inpaint(unclip, None, [2, 3], sampling=settings, images=images, mask=mask)
    assert not torch.allclose(other[inside], drawn[inside], atol=1e-2)


@every_sampler
def test_inpainting_follows_what_is_known_the_more_the_more_rounds(
    unclip, monkeypatch, sampler, eta
):
    """Both halves correlate by 0.8, and the left one is known to be 0.6.

    Without it the right half's mean would be 0; its exact conditional mean is 0.48.
    """
    process = unclip.decoder.process
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]]) * 0.25

    def predict(x, t):
        a = process.schedule.alphas_cumprod[t[0]].float()
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2))
        left, right = x.chunk(2, dim=3)
        halves = [row[0] * left + row[1] * right for row in gain]
        x0 = torch.cat(halves, dim=3)
        log_variance = process.log_variance(torch.full_like(x, -1.0), t, x.ndim)
        return Prediction(x0, process.x0_to_eps(x0, x, t), log_variance)

    monkeypatch.setattr(unclip.decoder, "predictor", lambda *_: predict)
    known = torch.full((4, 3, 16, 16), 0.6)
    mask = torch.arange(16).ge(8).expand(4, 1, 16, 16)
    settings = DecoderSamplingConfig(sampler=sampler, steps=40, eta=eta)
    means = []
    for rounds in (0, 3):
        start = {"images": known, "mask": mask, "rounds": rounds}
        drawn = inpaint(unclip, None, range(4), sampling=settings, **start)
        means.append(float(drawn[..., 8:].mean()))
    assert 0.15 < means[0] < means[1] - 0.05 and means[1] < 0.48


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda mask: mask, "whole picture"),
        (lambda mask: ~mask, "all black"),
        (lambda mask: mask[:, :, :8], "size"),
        (lambda mask: mask.float(), "bool"),
    ],
)
def test_impossible_masks_are_sentences(unclip, make, word):
    mask = make(torch.ones(2, 1, 16, 16, dtype=torch.bool))
    with pytest.raises(UserError, match=word):
        inpaint(unclip, None, [0, 1], images=pictures(), mask=mask)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_gives_the_picture_and_1_forgets_it(unclip, sampler):
    images, settings = pictures(), DecoderSamplingConfig(sampler=sampler, steps=6)

    def draw(strength):
        start = {"images": images, "strength": strength}
        return image_to_image(unclip, None, [0, 1], sampling=settings, **start)

    assert torch.equal(draw(0.0), images)
    fresh = unclip.decode(None, [0, 1], sampling=settings)
    torch.testing.assert_close(draw(1.0), fresh, rtol=0, atol=0)


def test_distance_grows_with_strength(gaussian):
    images = pictures(8).clamp(-1, 1)
    settings = DecoderSamplingConfig(sampler="ddim", steps=20)

    def distance(strength):
        start = {"images": images, "strength": strength}
        drawn = image_to_image(gaussian, None, range(8), sampling=settings, **start)
        return float((drawn - images).square().mean())

    distances = [distance(strength) for strength in (0.05, 0.3, 0.6, 1.0)]
    assert distances == sorted(distances)
    with pytest.raises(UserError, match="strength"):
        distance(1.1)
