"""PCA and buckets: numpy's eigenvectors, the 1 % rule, what a round trip may lose, and the dot
product's top half."""

import numpy as np
import pytest
import torch

from unclip_pl.networks.quantizer import EmbeddingQuantizer, pca, quantile_buckets
from unclip_pl.utils.errors import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def data(count: int = 3000, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated images with a mean, standard deviations falling by half, and texts to match."""
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q
    image = torch.randn(count, dim) * 0.5 ** torch.arange(dim) @ rotation + torch.randn(dim)
    return image, image + 0.5 * torch.randn(count, dim)


def fitted(
    image: torch.Tensor, text: torch.Tensor, max_codes: int = 12, **options
) -> EmbeddingQuantizer:
    quantizer = EmbeddingQuantizer(image.shape[1], max_codes, **options)
    quantizer.fit(image.double().mean(0), image.double().T.cov(correction=0), image, text)
    return quantizer


def test_pca_against_numpy():
    covariance = data()[0].double().T.cov(correction=0)
    found, _ = pca(covariance, 0.0, 12)
    values, vectors = np.linalg.eigh(covariance.numpy())
    for k, row in enumerate(found.numpy()):
        reference = vectors[:, ::-1][:, k]
        assert abs(abs(row @ reference) - 1) < 1e-10
        assert abs(row @ covariance.numpy() @ row - values[::-1][k]) < 1e-10
        assert row[np.abs(row).argmax()] > 0


@pytest.mark.parametrize("max_error", [0.5, 0.1, 0.01, 0.001])
def test_fewest_dimensions_that_lose_less_than_the_rule_allows(max_error):
    image, text = data()
    quantizer = fitted(image, text, max_error=max_error)

    def lost(count: int) -> float:
        directions = np.linalg.svd((image - image.mean(0)).double().numpy(), full_matrices=False)[
            2
        ][:count]
        centred = (image - image.mean(0)).double().numpy()
        return ((centred - centred @ directions.T @ directions) ** 2).sum() / (centred**2).sum()

    assert lost(quantizer.codes) < max_error <= lost(quantizer.codes - 1)
    assert abs(quantizer.error(image).pca_mse - lost(quantizer.codes)) < 1e-5


def test_embeddings_that_need_more_codes_are_refused_with_how_many_they_need():
    image, text = data()
    needed = fitted(image, text).codes
    with pytest.raises(UserError, match=rf"max_codes to {needed}") as caught:
        fitted(image, text, max_codes=2)
    loss = float(str(caught.value).split("model.max_error to ")[1].split()[0])
    assert fitted(image, text, max_codes=2, max_error=loss).codes == 2  # as the sentence says
    assert fitted(image, text, max_codes=needed).codes == needed
    assert fitted(image, text, max_codes=2, max_error=0.0).codes == 2  # however much it loses


def test_number_of_codes_can_be_fixed():
    image, text = data()
    assert fitted(image, text, max_codes=9, max_error=0.0).codes == 9
    components, needed = pca(torch.eye(12), 0.0, 9)
    assert len(components) == needed == 9  # asks for no more than it gets


def test_quantiles_hold_equal_shares_and_stand_for_their_mean():
    x = torch.randn(16000)
    edges, values, counts = quantile_buckets(x, 16)
    assert (counts == 1000).all() and edges.diff().min() > 0
    ordered = x.sort().values.double().view(16, 1000)
    torch.testing.assert_close(values.double(), ordered.mean(1), rtol=1e-5, atol=1e-6)
    assert (ordered[:-1, -1] < edges).all() and (edges <= ordered[1:, 0]).all()


@pytest.mark.parametrize("count", [2, 3, 7, 100, 1023, 1024])
def test_fewer_numbers_than_buckets_come_back_exactly(count):
    x = torch.randn(count)
    edges, values, counts = quantile_buckets(x, 1024)
    codes = torch.searchsorted(edges, x, right=True)
    assert counts.sum() == count and codes.unique().numel() == count
    torch.testing.assert_close(values[codes], x, rtol=1e-6, atol=1e-7)
    # Every bucket decodes to a number among them.
    assert values.diff().min() >= 0 and values.min() >= x.min() and values.max() <= x.max()


def test_equal_numbers_share_a_bucket():
    edges, values, counts = quantile_buckets(torch.tensor([1.0] * 500 + [2.0] * 3), 1024)
    assert sorted(counts[counts > 0].tolist()) == [3, 500]
    assert values.isfinite().all()
    assert edges.isfinite().all()
    assert values[counts == 500].item() == 1.0 and values[counts == 3].item() == 2.0


def test_round_trip_stays_within_the_bucket():
    image, text = data()
    quantizer = fitted(image, text, buckets=32, max_error=0.0)
    codes = quantizer.encode(image)
    assert codes.shape == (3000, 12)
    assert codes.dtype == torch.int64
    assert codes.min() == 0
    assert codes.max() == 31
    coordinates, back = quantizer.project(image), quantizer.project(quantizer.decode(codes))
    outer = coordinates.min(0).values[:, None], coordinates.max(0).values[:, None]
    width = torch.cat([outer[0], quantizer.edges, outer[1]], 1).diff(dim=1)
    assert ((coordinates - back).abs() <= width.gather(1, codes.T).T + 1e-4).all()
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)
    for count in torch.stack([column.bincount(minlength=32) for column in codes.T]).flatten():
        assert 3000 // 32 <= count <= 3000 // 32 + 1


def test_order_is_by_variance_and_reported_errors_are_those_of_the_codes():
    image, text = data()
    quantizer = fitted(image, text, buckets=64)
    assert quantizer.project(image).var(0).diff().max() < 0
    error = quantizer.error(image)
    back = quantizer.decode(quantizer.encode(image))
    expected = ((back - image) ** 2).sum() / ((image - image.mean(0)) ** 2).sum()
    assert abs(error.mse - expected) < 1e-5 and error.pca_mse < error.mse < 0.02
    assert abs(error.cosine - torch.nn.functional.cosine_similarity(back, image).mean()) < 1e-5
    assert error.cosine < error.pca_cosine < 1


def test_more_buckets_lose_less():
    image, text = data()
    losses = [
        fitted(image, text, buckets=buckets).error(image).mse for buckets in (4, 32, 256, 1024)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] - fitted(image, text).error(image).pca_mse < 1e-4


def test_dot_product_is_of_unit_vectors_and_drawn_from_the_top_half():
    image, text = data()
    quantizer = fitted(image, text, buckets=64)
    dots = torch.nn.functional.cosine_similarity(image, text)
    codes = quantizer.encode_dot(image, text)
    assert torch.equal(codes, quantizer.encode_dot(image * 3, text * 0.1))
    assert codes[dots.argsort()].diff().min() >= 0
    assert torch.equal(codes.bincount(minlength=64), quantizer.dot_counts)
    drawn = quantizer.draw_dot(torch.rand(20000))
    # Of an even number, torch's median is the lower of the two in the middle.
    top = codes[dots > dots.median()]
    assert drawn.min() == top.min() and drawn.max() == 63
    shares = [x.bincount(minlength=64) / len(x) for x in (drawn, top)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    top_twentieth = codes[dots >= dots.double().quantile(0.95)]
    assert quantizer.draw_dot(torch.rand(1000), 95).min() == top_twentieth.min()
    drawn = quantizer.draw_dot(torch.rand(20000), 0).bincount(minlength=64) / 20000
    assert (drawn - quantizer.dot_counts / 3000).abs().max() < 0.01
    assert quantizer.draw_dot(torch.tensor([1 - 2**-24])).item() == 63


def test_few_pairs_give_only_dot_products_that_occurred():
    image, text = data(8)
    quantizer = fitted(image, text)
    dots = torch.nn.functional.cosine_similarity(image, text)
    top = quantizer.encode_dot(image, text)[dots > dots.median()]
    assert set(quantizer.draw_dot(torch.rand(200)).tolist()) == set(top.tolist())


def test_saved_and_loaded_it_is_the_same_also_in_half_precision():
    image, text = data()
    quantizer = fitted(image, text)
    again = EmbeddingQuantizer(12, 12)
    again.load_state_dict(quantizer.state_dict())
    codes = quantizer.encode(image)
    assert again.codes == quantizer.codes
    assert torch.equal(again.encode(image), codes)
    assert torch.equal(again.decode(codes), quantizer.decode(codes))
    halved = quantizer.state_dict()  # as releases keep weights
    for name, value in halved.items():
        if value.is_floating_point():
            halved[name] = value.half().float()
    again.load_state_dict(halved)
    decoded = quantizer.decode(codes)
    assert (again.decode(codes) - decoded).norm() < 2e-3 * decoded.norm()
    uniform = torch.linspace(0, 0.99, 50)
    assert torch.equal(again.draw_dot(uniform), quantizer.draw_dot(uniform))


def test_precision_around_does_not_reach_the_codes():
    image, text = data()
    quantizer = fitted(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer.encode(image)
        decoded = quantizer.decode(codes)
    assert torch.equal(codes, quantizer.encode(image))
    assert torch.equal(decoded, quantizer.decode(codes))


def test_unfitted_and_unfit_data_are_sentences():
    quantizer = EmbeddingQuantizer(12, 12)
    for call in (
        lambda: quantizer.encode(torch.zeros(1, 12)),
        lambda: quantizer.decode(torch.zeros(1, 12).long()),
        lambda: quantizer.draw_dot(torch.zeros(1)),
    ):
        with pytest.raises(ValueError, match="not fitted"):
            call()
    one = torch.ones(1, 12)
    with pytest.raises(UserError, match="at least two"):
        quantizer.fit(one[0], torch.zeros(12, 12), one, one)
    same = torch.ones(5, 12)
    with pytest.raises(UserError, match="do not differ"):
        fitted(same, same)
    with pytest.raises(ValueError, match=r"twice \(N, 12\)"):
        quantizer.fit(one[0], torch.zeros(12, 12), torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="max_codes 13"):
        EmbeddingQuantizer(12, 13)
    with pytest.raises(ValueError, match="max_error 1"):
        EmbeddingQuantizer(12, 12, max_error=1)
    with pytest.raises(ValueError, match="1 buckets"):
        EmbeddingQuantizer(12, 12, buckets=1)
