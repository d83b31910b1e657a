"""Variations, interpolations and text diffs: their ends, directions and seeds."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from tests.manipulate.pictures import great_circle, pictures
from unclip_pl.diffusion.noise import Noise
from unclip_pl.manipulate import (
    Latent,
    interpolate,
    inversion_sampling,
    invert,
    reconstruct,
    text_diff,
    variations,
    vary,
)
from unclip_pl.utils.errors import UserError


def test_eta_0_gives_the_picture_back_whatever_the_seed_and_distance_grows_with_eta(gaussian):
    images = pictures(8).clamp(-1, 1)
    latent = invert(gaussian, images, 50)
    torch.testing.assert_close(vary(gaussian, latent, range(8), 0.0), reconstruct(gaussian, latent))
    distances = []
    for eta in (0.0, 0.3, 0.6, 1.0):
        drawn = vary(gaussian, latent, range(8), eta)
        distances.append(float((drawn - images).square().mean()))
    assert distances == sorted(distances)


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_outside_its_range_is_a_sentence(unclip, eta):
    with pytest.raises(UserError, match="eta"):
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
    with pytest.raises(UserError, match="steps"):
        interpolate(unclip, latent, Latent(torch.ones(1, 256), pictures(1), 5), torch.ones(1))


def test_with_a_seed_the_way_has_one_noise_and_another_seed_is_another_way(unclip):
    latent = invert(unclip, pictures(), 4)
    a, b, theta = latent[[0, 0]], latent[[1, 1]], torch.tensor([0.0, 0.5])
    drawn = interpolate(unclip, a, b, theta, seed=3)
    sampling, x_T = inversion_sampling(unclip, 4), Noise([3])((3, 16, 16))
    expected = unclip.decode(latent.image_embed[:1], [0], None, sampling, x_T=x_T)
    torch.testing.assert_close(drawn[:1], expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn, interpolate(unclip, a, b, theta, seed=4), atol=1e-2)


def test_a_text_diff_turns_z_i_towards_the_difference_and_keeps_its_norm(unclip, monkeypatch):
    latent, seen = invert(unclip, pictures(), 4), []
    record = lambda unclip, latent, *rest, **more: seen.append(latent)
    monkeypatch.setattr(variations, "decode", record)
    text_diff(unclip, latent, ["a photo", "a cat"], ["a fox", "a dog"], torch.tensor([0.25, 0.5]))
    z = latent.image_embed.double().numpy()
    captions = ["a fox", "a dog"], ["a photo", "a cat"]
    texts = (unclip.embed_text(each).double() for each in captions)
    t, t0 = (normalize(x, dim=1).numpy() for x in texts)
    for k, theta in enumerate((0.25, 0.5)):
        direction, _ = great_circle(z[k], (t - t0)[k], theta)
        found = seen[0].image_embed[k].double().numpy()
        np.testing.assert_allclose(found / np.linalg.norm(found), direction, atol=1e-5)
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(z[k]), rel=1e-5)
    assert torch.equal(seen[0].x_T, latent.x_T)  # the base noise is fixed
    text_diff(unclip, latent, None, ["a fox", "a dog"], torch.tensor([1.0, 1.0]))
    target = unclip.embed_text(["a fox", "a dog"])
    similarity = cosine_similarity(seen[1].image_embed, target)
    torch.testing.assert_close(similarity, torch.ones(2))


def test_a_text_diff_of_0_is_the_reconstruction_and_one_that_goes_nowhere_is_a_sentence(unclip):
    latent = invert(unclip, pictures(), 4)
    drawn = text_diff(unclip, latent, ["a photo"] * 2, ["a fox"] * 2, torch.zeros(2))
    torch.testing.assert_close(drawn, reconstruct(unclip, latent), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="a fox"):
        text_diff(unclip, latent, ["a photo", "a fox"], ["a cat", "a fox"], torch.ones(2))


def test_variation_k_depends_on_only_seed_k(unclip):
    latent = invert(unclip, pictures(1), 4)[[0, 0, 0]]
    drawn = vary(unclip, latent, [5, 6, 7], 0.8)
    alone = vary(unclip, latent[:1], [6], 0.8)
    torch.testing.assert_close(alone[0], drawn[1], rtol=1e-4, atol=1e-4)
    assert (drawn[0] - drawn[1]).abs().max() > 0.05
