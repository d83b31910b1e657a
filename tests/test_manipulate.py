"""Manipulations: slerp against float64, inversion against the closed form of Gaussian data, ends and limits, what stays where it must."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unclip_pl import manipulate
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Prediction, Process
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.manipulate import (
    Latent,
    deterministic,
    image_to_image,
    inpaint,
    interpolate,
    invert,
    reconstruct,
    slerp,
    text_diff,
    vary,
)
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import psnr

NET = UNetConfig(
    image_size=16,
    width=32,
    mults=(1,),
    depth=1,
    attention=(),
    middle_attention=False,
    head_width=32,
    embed_dim=256,
)
QUICK = SamplingConfig(sampler="ddim", steps=4)
SPREAD = 0.4  # standard deviation of the Gaussian pictures


def make(seed=0):
    torch.manual_seed(seed)
    stage = Decoder(net=NET, sampling=QUICK, diffusion=DiffusionConfig(parametrization="v"))
    for parameter in stage.net.parameters():  # outputs start at zero: make them speak
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    stage.clip_fingerprint = FrozenCLIP().fingerprint()
    return UnCLIP(stage)


@pytest.fixture(scope="module")
def unclip():
    return make()


@pytest.fixture
def gaussian(unclip, monkeypatch):
    """An UnCLIP whose decoder is the best there is for pixels of N(0, SPREAD^2)."""
    process = unclip.decoder.process

    def predict(x, t):
        abar = process.schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        x0 = abar.sqrt() * SPREAD**2 / (abar * SPREAD**2 + 1 - abar) * x
        return Prediction(
            x0, process.x0_to_eps(x0, x, t), process.log_variance(torch.zeros_like(x), t, 4)
        )

    monkeypatch.setattr(
        unclip.decoder, "predictor", lambda batch, size, schedule, settings: predict
    )
    return unclip


def pictures(count=2, seed=0):
    return SPREAD * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def great_circle(a, b, theta):
    """Slerp of unit vectors in float64, by turning a towards b in their plane."""
    a, b = (x.astype(np.float64) for x in (a, b))
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    across = v - (v @ u) * u
    if np.linalg.norm(across) < 1e-12:
        return u, 0.0
    omega = np.arctan2(np.linalg.norm(across), v @ u)
    return np.cos(theta * omega) * u + np.sin(theta * omega) * across / np.linalg.norm(
        across
    ), omega


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, math.pi / 2, 2.5, math.pi - 1e-3])
@pytest.mark.parametrize("theta", [0.0, 0.25, 0.5, 1.0])
def test_slerp_has_the_angle_and_the_norm_of_the_reference(angle, theta):
    random = np.random.default_rng(0)
    u, w = np.linalg.qr(random.standard_normal((64, 2)))[0].T
    a, b = 3 * u, 5 * (math.cos(angle) * u + math.sin(angle) * w)
    ours = slerp(torch.tensor(a)[None], torch.tensor(b)[None], torch.tensor([theta]))[0].numpy()
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


@pytest.mark.parametrize(
    "other, words", [(-1.0, "opposite directions"), (-2.0, "opposite directions"), (0.0, "zero")]
)
def test_slerp_between_opposite_vectors_or_zero_is_a_sentence(other, words):
    a = pictures(1)
    with pytest.raises(UserError, match=words):
        slerp(a, other * a, torch.tensor([0.3]))


@pytest.mark.parametrize("theta", [-0.1, 1.1, float("nan")])
def test_theta_outside_its_range_is_a_sentence(theta):
    with pytest.raises(UserError, match="theta is"):
        slerp(pictures(1), pictures(1, 1), torch.tensor([theta]))


def test_inversion_of_gaussian_pictures_is_the_closed_form(gaussian):
    """The probability flow keeps the quantile: x_T = x sqrt(abar_T s^2 + 1 - abar_T) / s."""
    images = pictures()
    abar = float(gaussian.decoder.process.schedule.alphas_cumprod[-1])
    exact = images * math.sqrt(abar * SPREAD**2 + 1 - abar) / SPREAD
    errors = [
        float((invert(gaussian, images, steps).x_T - exact).abs().max() / exact.abs().max())
        for steps in (10, 50, 250)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_round_trips_grow_better_with_steps(gaussian):
    images = pictures()
    found = [
        float(
            psnr(reconstruct(gaussian, invert(gaussian, images, steps)), images.clamp(-1, 1)).mean()
        )
        for steps in (5, 20, 100)
    ]
    assert found == sorted(found) and found[-1] > 45


def test_a_picture_comes_back_from_its_latent_and_is_conditioned_on_its_embedding(unclip):
    images = pictures().clamp(-1, 1)
    latent = invert(unclip, images, 25)
    torch.testing.assert_close(latent.image_embed, unclip.embed_images(images))
    assert float(psnr(reconstruct(unclip, latent), images).min()) > 35
    other = Latent(latent.image_embed.flip(0), latent.x_T, latent.steps)
    assert float(psnr(reconstruct(unclip, other), images).max()) < float(
        psnr(reconstruct(unclip, latent), images).min()
    )


def test_eta_0_gives_the_picture_back_whatever_the_seed_and_distance_grows_with_eta(gaussian):
    images = pictures(8).clamp(-1, 1)
    latent = invert(gaussian, images, 50)
    torch.testing.assert_close(vary(gaussian, latent, range(8), 0.0), reconstruct(gaussian, latent))
    distances = [
        float((vary(gaussian, latent, range(8), eta) - images).square().mean())
        for eta in (0.0, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances)


def test_variation_k_depends_on_seed_k_alone(unclip):
    latent = invert(unclip, pictures(1), 4)[[0, 0, 0]]
    drawn = vary(unclip, latent, [5, 6, 7], 0.8)
    torch.testing.assert_close(
        vary(unclip, latent[:1], [6], 0.8)[0], drawn[1], rtol=1e-4, atol=1e-4
    )
    assert (drawn[0] - drawn[1]).abs().max() > 0.05


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_outside_its_range_is_a_sentence(unclip, eta):
    with pytest.raises(UserError, match="eta is"):
        vary(unclip, Latent(torch.ones(1, 256), pictures(1), 4), [0], eta)


def test_the_ends_of_an_interpolation_are_the_reconstructions(unclip):
    latent = invert(unclip, pictures(), 10)
    a, b = latent[[0, 0, 0]], latent[[1, 1, 1]]
    way = interpolate(unclip, a, b, torch.tensor([0.0, 0.5, 1.0]))
    again = reconstruct(unclip, latent)
    torch.testing.assert_close(way[[0, 2]], again, rtol=1e-4, atol=1e-4)
    assert (way[1] - again).abs().amax((1, 2, 3)).min() > 0.05


def test_latents_of_different_steps_are_not_mixed(unclip):
    latent = Latent(torch.ones(1, 256), pictures(1), 4)
    with pytest.raises(UserError, match="in 4 steps and the other in 5"):
        interpolate(unclip, latent, Latent(torch.ones(1, 256), pictures(1), 5), torch.ones(1))


def test_with_a_seed_the_way_has_one_noise_and_another_seed_is_another_way(unclip):
    latent = invert(unclip, pictures(), 4)
    a, b, theta = latent[[0, 0]], latent[[1, 1]], torch.tensor([0.0, 0.5])
    drawn = interpolate(unclip, a, b, theta, seed=3)
    expected = unclip.decode(
        latent.image_embed[:1], [0], None, deterministic(unclip, 4), x_T=Noise([3])((3, 16, 16))
    ).clamp(-1, 1)
    torch.testing.assert_close(drawn[:1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn, interpolate(unclip, a, b, theta, seed=4), atol=1e-2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_sampler_draws_from_a_latent(unclip, sampler):
    latent = invert(unclip, pictures(), 4)
    drawn = manipulate.decode(
        unclip, latent, [0, 1], sampling=deterministic(unclip, 4, sampler=sampler)
    )
    assert drawn.shape == (2, 3, 16, 16) and drawn.isfinite().all()


def test_a_text_diff_turns_z_i_towards_the_difference_and_keeps_its_norm(unclip, monkeypatch):
    latent, seen = invert(unclip, pictures(), 4), []
    monkeypatch.setattr(
        manipulate, "decode", lambda unclip, latent, *rest, **more: seen.append(latent)
    )
    text_diff(unclip, latent, ["a photo", "a cat"], ["a fox", "a dog"], torch.tensor([0.25, 0.5]))
    z = latent.image_embed.double().numpy()
    texts = (
        unclip.embed_text(captions).double()
        for captions in (["a fox", "a dog"], ["a photo", "a cat"])
    )
    t, t0 = ((x / x.norm(dim=1, keepdim=True)).numpy() for x in texts)
    for k, theta in enumerate((0.25, 0.5)):
        direction, _ = great_circle(z[k], (t - t0)[k], theta)
        found = seen[0].image_embed[k].double().numpy()
        np.testing.assert_allclose(found / np.linalg.norm(found), direction, atol=1e-5)
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(z[k]), rel=1e-5)
    assert torch.equal(seen[0].x_T, latent.x_T)  # the base noise is fixed
    text_diff(unclip, latent, None, ["a fox", "a dog"], torch.tensor([1.0, 1.0]))
    similarity = torch.nn.functional.cosine_similarity(
        seen[1].image_embed, unclip.embed_text(["a fox", "a dog"])
    )
    torch.testing.assert_close(similarity, torch.ones(2))


def test_a_text_diff_of_0_is_the_reconstruction_and_one_that_goes_nowhere_is_a_sentence(unclip):
    latent = invert(unclip, pictures(), 4)
    drawn = text_diff(unclip, latent, ["a photo"] * 2, ["a fox"] * 2, torch.zeros(2))
    torch.testing.assert_close(drawn, reconstruct(unclip, latent), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match='the same for CLIP \\("a fox"\\)'):
        text_diff(unclip, latent, ["a photo", "a fox"], ["a cat", "a fox"], torch.ones(2))


@pytest.mark.parametrize(
    "sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm_solver_pp", 0.0)]
)
def test_inpainting_keeps_what_is_known_and_draws_the_rest(unclip, sampler, eta):
    images = pictures().clamp(-1, 1)
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[:, :, 4:12, 4:12] = True
    drawn = inpaint(
        unclip,
        None,
        [0, 1],
        sampling=SamplingConfig(sampler=sampler, steps=5, eta=eta),
        images=images,
        mask=mask,
    )
    inside = mask.expand_as(images)
    assert torch.equal(drawn[~inside], images[~inside])
    assert (drawn - images)[inside].abs().mean() > 0.05
    other = inpaint(
        unclip,
        None,
        [2, 3],
        sampling=SamplingConfig(sampler=sampler, steps=5, eta=eta),
        images=images,
        mask=mask,
    )
    assert not torch.allclose(other[inside], drawn[inside], atol=1e-2)


@pytest.mark.parametrize(
    "sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm_solver_pp", 0.0)]
)
def test_inpainting_follows_what_is_known_the_more_the_more_rounds(
    unclip, monkeypatch, sampler, eta
):
    """Right half and left half correlate by 0.8 and the left one is 0.6: without it the right one's mean would be 0, its exact conditional mean is 0.48."""
    process = unclip.decoder.process
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]]) * 0.25

    def predict(x, t):
        a = process.schedule.alphas_cumprod[t[0]].float()
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2))
        left, right = x.chunk(2, dim=3)
        x0 = torch.cat(
            [gain[0, 0] * left + gain[0, 1] * right, gain[1, 0] * left + gain[1, 1] * right], dim=3
        )
        return Prediction(
            x0,
            process.x0_to_eps(x0, x, t),
            process.log_variance(torch.full_like(x, -1.0), t, x.ndim),
        )

    monkeypatch.setattr(
        unclip.decoder, "predictor", lambda batch, size, schedule, settings: predict
    )
    known, mask = torch.full((4, 3, 16, 16), 0.6), torch.arange(16).ge(8).expand(4, 1, 16, 16)
    settings = SamplingConfig(sampler=sampler, steps=40, eta=eta)
    means = [
        float(
            inpaint(
                unclip, None, range(4), sampling=settings, images=known, mask=mask, rounds=rounds
            )[..., 8:].mean()
        )
        for rounds in (0, 3)
    ]
    assert 0.15 < means[0] < means[1] - 0.05 and means[1] < 0.48


def test_impossible_masks_are_sentences(unclip):
    images = pictures()
    everything = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    other = {
        "whole picture": [everything],
        "all black": [~everything],
        "of their size": [everything[:, :, :8], everything.float()],
    }
    for words, mask in ((words, mask) for words, masks in other.items() for mask in masks):
        with pytest.raises(UserError, match=words):
            inpaint(unclip, None, [0, 1], images=images, mask=mask)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_gives_the_picture_and_1_forgets_it(unclip, sampler):
    images, settings = pictures(), SamplingConfig(sampler=sampler, steps=6)
    assert torch.equal(
        image_to_image(unclip, None, [0, 1], sampling=settings, images=images, strength=0.0), images
    )
    forgotten = image_to_image(unclip, None, [0, 1], sampling=settings, images=images, strength=1.0)
    torch.testing.assert_close(
        forgotten, unclip.decode(None, [0, 1], sampling=settings), rtol=0, atol=0
    )


def test_distance_grows_with_strength(gaussian):
    images = pictures(8).clamp(-1, 1)
    settings = SamplingConfig(sampler="ddim", steps=20)
    distances = [
        float(
            (
                image_to_image(
                    gaussian, None, range(8), sampling=settings, images=images, strength=s
                )
                - images
            )
            .square()
            .mean()
        )
        for s in (0.05, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances)
    with pytest.raises(UserError, match="strength is 1.1"):
        image_to_image(gaussian, None, range(8), images=images, strength=1.1)


@pytest.mark.parametrize("steps", [4, (2, 1), "ddim4"])
def test_a_latent_comes_back_from_its_file(unclip, tmp_path, steps):
    latent = invert(unclip, pictures(), steps)
    latent.save(tmp_path / "a.safetensors", unclip)
    found = Latent.load(tmp_path / "a.safetensors", unclip)
    assert (
        torch.equal(found.x_T, latent.x_T)
        and torch.equal(found.image_embed, latent.image_embed)
        and found.steps == steps
    )
    assert load_file(tmp_path / "a.safetensors").keys() == {"x_T", "image_embed"}


def test_a_latent_does_not_name_settings_that_do_not_change_it(unclip, tmp_path):
    """So that files stay of use when the diffusion process gets a new setting."""
    path = tmp_path / "a.safetensors"
    invert(unclip, pictures(), 2).save(path, unclip)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert set(json.loads(header["model"])["schedule"]) == {
        "schedule",
        "timesteps",
        "parametrization",
        "variance",
    }
    assert header["steps"] == "2"


def test_a_latent_of_another_model_is_refused(unclip, tmp_path):
    path = tmp_path / "a.safetensors"
    latent = invert(unclip, pictures(), 4)
    latent.save(path, unclip)
    with pytest.raises(UserError, match="another decoder \\(its weights differ\\)"):
        Latent.load(path, make(seed=1))
    linear = make()
    linear.decoder.process = Process(DiffusionConfig(schedule="linear", parametrization="v"))
    with pytest.raises(UserError, match="its schedule differ"):
        Latent.load(path, linear)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    model = json.loads(header["model"])
    model["clip_fingerprint"]["embed_dim"] = 512
    save_file(
        {"x_T": latent.x_T, "image_embed": latent.image_embed},
        path,
        header | {"model": json.dumps(model)},
    )
    with pytest.raises(ClipMismatch, match="The latent"):
        Latent.load(path, unclip)


def test_what_is_no_latent_is_a_sentence(unclip, tmp_path):
    with pytest.raises(UserError, match="There is no latent"):
        Latent.load(tmp_path / "gone.safetensors", unclip)
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"x_T": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(UserError, match="is no latent of ours"):
            Latent.load(tmp_path / f"{name}.safetensors", unclip)
