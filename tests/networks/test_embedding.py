"""EmbeddingNormalizer: the paper's scale, round trips, saved numbers."""

import pytest
import torch

from unclip_pl.networks.embedding import EmbeddingNormalizer


def data(dim: int = 16, count: int = 400):
    return torch.randn(count, dim) * torch.rand(dim) * 3 + torch.randn(dim)


def test_unit_norm_is_17_2_at_1024():
    norms = EmbeddingNormalizer(1024, "unit").normalize(torch.randn(5, 1024) * 7).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full((5,), 17.2))


def test_unit_round_trip_keeps_direction_and_typical_norm():
    z = data()
    normalizer = EmbeddingNormalizer(16, "unit")
    normalizer.fit(z.mean(0), z.std(0, correction=0))
    back = normalizer.denormalize(normalizer.normalize(z))
    torch.testing.assert_close(torch.cosine_similarity(back, z), torch.ones(len(z)))
    torch.testing.assert_close(back.norm(dim=-1), z.square().sum(-1).mean().sqrt().expand(len(z)))
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(back)), back)


def test_standard_round_trip():
    z = data()
    normalizer = EmbeddingNormalizer(16, "standard")
    normalizer.fit(z.double().mean(0), z.double().std(0))
    small = normalizer.normalize(z)
    torch.testing.assert_close(small.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(small.std(0), torch.ones(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalizer.denormalize(small), z, rtol=1e-5, atol=1e-5)


def test_none_changes_nothing():
    z = data()
    normalizer = EmbeddingNormalizer(16, "none")
    normalizer.fit(z.mean(0), z.std(0))
    assert torch.equal(normalizer.normalize(z), z) and torch.equal(normalizer.denormalize(z), z)


@pytest.mark.parametrize("mode", ["none", "unit", "standard"])
def test_numbers_are_saved_with_the_weights(mode):
    z = data()
    one, two = EmbeddingNormalizer(16, mode), EmbeddingNormalizer(16, mode)
    one.fit(z.mean(0), z.std(0))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.denormalize(z), two.denormalize(z)) and not list(one.parameters())
    assert one.normalize(z.half()).dtype == torch.float32


def test_zero_stays_finite_and_wrong_use_is_refused():
    assert not EmbeddingNormalizer(16, "unit").normalize(torch.zeros(1, 16)).any()
    with pytest.raises(ValueError, match="whiten"):
        EmbeddingNormalizer(16, "whiten")
    with pytest.raises(ValueError, match=r"\(16,\)"):
        EmbeddingNormalizer(16, "standard").fit(torch.zeros(8), torch.ones(8))
    with pytest.raises(ValueError, match="positive"):
        EmbeddingNormalizer(16, "standard").fit(torch.zeros(16), torch.zeros(16))
