"""Probing: principal components against numpy's SVD, zero-shot probabilities, pasted labels."""

import numpy as np
import pytest
import torch

from tests.factories import package_decoder
from unclip_pl.data.store_statistics import Statistics
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.probe import PrincipalComponents, paper_dimensions, paste_label, zero_shot
from unclip_pl.utils.errors import UserError


def embeddings(count=200, dim=16):
    random = np.random.default_rng(0)
    return random.standard_normal((count, dim)) * np.arange(dim, 0, -1) + 3


def statistics(x):
    return Statistics(len(x), torch.tensor(x.mean(0)), torch.tensor(np.cov(x.T, bias=True)))


def test_reconstructions_are_the_best_of_their_rank_as_svd_finds_them():
    x = embeddings()
    principal = PrincipalComponents.from_statistics(statistics(x))
    u, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for k in (1, 4, 15):
        best = x.mean(0) + u[:, :k] * s[:k] @ v[:k]
        np.testing.assert_allclose(
            principal.reconstruct(torch.tensor(x), k).numpy(), best, atol=1e-9
        )
        assert principal.explained_variance(k) == pytest.approx((s[:k] ** 2).sum() / (s**2).sum())


@pytest.mark.parametrize("count", [200, 5])
def test_all_components_give_the_embedding_back(count):
    principal = PrincipalComponents.from_statistics(statistics(embeddings(count)))
    z = torch.randn(3, 16)
    assert torch.equal(principal.reconstruct(z, 16), z)
    errors = [float((principal.reconstruct(z, k) - z).norm()) for k in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    if count > 16:  # the last one adds what is missing, no more
        step = principal.reconstruct(z, 15) - z
        assert float((step @ principal.components[:15].T.float()).abs().max()) < 1e-5


@pytest.mark.parametrize("k", [0, 17])
def test_an_impossible_number_of_components_is_a_sentence(k):
    principal = PrincipalComponents.from_statistics(statistics(embeddings()))
    with pytest.raises(UserError, match="principal components"):
        principal.reconstruct(torch.zeros(1, 16), k)


def test_the_papers_dimensions_are_those_of_1024_scaled():
    assert paper_dimensions(1024) == [20, 30, 40, 80, 120, 160, 200, 320]
    assert paper_dimensions(256) == [5, 8, 10, 20, 30, 40, 50, 80]
    assert paper_dimensions(16) == sorted(set(paper_dimensions(16)))


def test_zero_shot_probabilities_are_open_clips():
    unclip = UnCLIP(package_decoder())
    image, captions = torch.rand(1, 3, 64, 64) * 2 - 1, ["red apple", "teapot", "fox"]
    tokens = unclip.clip.tokenize(captions)
    with torch.no_grad():
        # only the model's text side and its temperature are taken
        _, text, scale = unclip.clip.model(torch.zeros(1, 3, 64, 64), tokens)
        embed = unclip.embed_images(image)
    expected = (scale * torch.nn.functional.normalize(embed, dim=1) @ text.T).softmax(1)
    torch.testing.assert_close(zero_shot(unclip, embed, captions), expected)


@pytest.mark.parametrize("text", ["iPod", "a very long label that must become small"])
def test_a_label_stands_in_the_middle_and_leaves_the_edges(text):
    image = -torch.ones(3, 96, 96)
    image[0] = 1
    pasted = paste_label(image, text)
    changed = (pasted - image).abs().amax(0) > 0.1
    rows, columns = (changed.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    assert columns[0] > 5 and columns[-1] < 90 and rows[0] > 20 and rows[-1] < 76
    assert abs(columns[0] + columns[-1] - 95) <= 4
    assert (pasted[:, 48] > 0.9).all(0).any()  # white paper
    assert (pasted[:, 40:56] < -0.5).all(0).any()  # black letters


def test_an_empty_label_is_refused():
    with pytest.raises(UserError, match="empty"):
        paste_label(torch.zeros(3, 96, 96), " ")
