"""Inversion against the closed form of Gaussian data; latents and their files."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.factories import package_decoder
from tests.manipulate.pictures import SPREAD, pictures
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.diffusion.process import DiffusionConfig, Process
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.manipulate import (
    Latent,
    decode,
    inversion_sampling,
    invert,
    reconstruct,
)
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import psnr


def test_inversion_of_gaussian_pictures_is_the_closed_form(gaussian):
    """The probability flow keeps the quantile: x_T = x sqrt(abar_T s^2 + 1 - abar_T) / s."""
    images = pictures()
    abar = float(gaussian.decoder.process.schedule.alphas_cumprod[-1])
    exact = images * math.sqrt(abar * SPREAD**2 + 1 - abar) / SPREAD
    errors = []
    for steps in (10, 50, 250):
        error = invert(gaussian, images, steps).x_T - exact
        errors.append(float(error.abs().max() / exact.abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_round_trips_grow_better_with_steps(gaussian):
    images = pictures()
    decibels = []
    for steps in (5, 20, 100):
        again = reconstruct(gaussian, invert(gaussian, images, steps))
        decibels.append(float(psnr(again, images.clamp(-1, 1)).mean()))
    assert decibels == sorted(decibels) and decibels[-1] > 45


def test_a_picture_comes_back_from_its_latent_and_is_conditioned_on_its_embedding(unclip):
    images = pictures().clamp(-1, 1)
    latent = invert(unclip, images, 25)
    torch.testing.assert_close(latent.image_embed, unclip.embed_images(images))
    right = psnr(reconstruct(unclip, latent), images)
    assert float(right.min()) > 35
    swapped = Latent(latent.image_embed.flip(0), latent.x_T, latent.steps)
    wrong = psnr(reconstruct(unclip, swapped), images)
    assert float(wrong.max()) < float(right.min())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_sampler_draws_from_a_latent(unclip, sampler):
    latent = invert(unclip, pictures(), 4)
    sampling = inversion_sampling(unclip, 4, sampler=sampler)
    drawn = decode(unclip, latent, [0, 1], sampling=sampling)
    assert drawn.shape == (2, 3, 16, 16) and drawn.isfinite().all()


@pytest.mark.parametrize("steps", [4, (2, 1), "ddim4"])
def test_a_latent_comes_back_from_its_file(unclip, tmp_path, steps):
    latent = invert(unclip, pictures(), steps)
    latent.save(tmp_path / "a.safetensors", unclip)
    loaded = Latent.load(tmp_path / "a.safetensors", unclip)
    assert torch.equal(loaded.x_T, latent.x_T)
    assert torch.equal(loaded.image_embed, latent.image_embed) and loaded.steps == steps
    assert load_file(tmp_path / "a.safetensors").keys() == {"x_T", "image_embed"}


def test_a_latent_does_not_name_settings_that_do_not_change_it(unclip, tmp_path):
    """So that files stay of use when the diffusion process gets a new setting."""
    path = tmp_path / "a.safetensors"
    invert(unclip, pictures(), 2).save(path, unclip)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    named = set(json.loads(header["model"])["schedule"])
    assert named == {"schedule", "timesteps", "parametrization", "variance"}
    assert header["steps"] == "2"


def test_a_latent_of_another_model_is_refused(unclip, tmp_path):
    path = tmp_path / "a.safetensors"
    latent = invert(unclip, pictures(), 4)
    latent.save(path, unclip)
    with pytest.raises(UserError, match="weights"):
        Latent.load(path, UnCLIP(package_decoder(seed=1)))
    linear = UnCLIP(package_decoder())
    linear.decoder.process = Process(DiffusionConfig(schedule="linear", parametrization="v"))
    with pytest.raises(UserError, match="schedule"):
        Latent.load(path, linear)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    model = json.loads(header["model"])
    model["clip_fingerprint"]["embed_dim"] = 512
    tensors = {"x_T": latent.x_T, "image_embed": latent.image_embed}
    save_file(tensors, path, header | {"model": json.dumps(model)})
    with pytest.raises(ClipMismatch, match="The latent"):
        Latent.load(path, unclip)


def test_what_is_no_latent_is_a_sentence(unclip, tmp_path):
    with pytest.raises(UserError, match="There is no latent"):
        Latent.load(tmp_path / "gone.safetensors", unclip)
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"x_T": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(UserError, match="is not a latent"):
            Latent.load(tmp_path / f"{name}.safetensors", unclip)
