"""Noise: sample k depends only on its own seed."""

import pytest
import torch

from unclip_pl.diffusion.noise import Noise


def test_a_sample_has_the_same_noise_in_any_batch():
    batch = Noise([3, 1, 4, 1])
    first, second = batch((3, 5, 5)), batch((3, 5, 5))
    for k, seed in enumerate([3, 1, 4, 1]):
        alone = Noise([seed])
        assert torch.equal(alone((3, 5, 5))[0], first[k]) and torch.equal(
            alone((3, 5, 5))[0], second[k]
        )
    assert torch.equal(first[1], first[3])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_slices_share_the_streams():
    whole, parts = Noise([1, 2, 3]), Noise([1, 2, 3])
    for _ in range(2):
        assert torch.equal(whole((4,)), torch.cat([parts[0:2]((4,)), parts[2]((4,))]))


def test_like_has_the_shape_and_refuses_another_batch():
    assert Noise([0, 1]).like(torch.zeros(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="one seed per sample"):
        Noise([0, 1]).like(torch.zeros(3, 4))


def test_large_seeds_are_told_apart_and_negative_ones_refused():
    assert not torch.equal(Noise([7])((8,)), Noise([7 + 2**40])((8,)))
    for seeds in ([], [-1]):
        with pytest.raises(ValueError, match="seed"):
            Noise(seeds)


def test_it_is_standard_normal():
    x = Noise(range(100))((1000,))
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


def test_uniform_draws_are_uniform_and_each_samples_own():
    u = Noise(range(100)).uniform((1000,))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.005
    whole = Noise([3, 1, 4])
    first, second = whole.uniform((5,)), whole.uniform((5,))
    alone = Noise([1])
    assert torch.equal(alone.uniform((5,))[0], first[1]) and torch.equal(
        alone.uniform((5,))[0], second[1]
    )
    assert not torch.equal(first, second)
