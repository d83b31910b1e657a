"""The metrics give what the distances give, in any batches and over any ranks, and refuse bad
input."""

import json

import pytest
import torch
from torch import distributed

from eval import distances, metrics
from tests.cluster.forks import Ranks
from tests.eval.sets import features
from unclip_pl.utils.errors import UserError


def filled(metric, a, b, batch):
    for x, real in ((a, True), (b, False)):
        for rows in x.split(batch):
            metric.update(rows, real=real)
    return metric.compute()


@pytest.mark.parametrize(
    ("n", "m", "batch"), [(1500, 1300, 100), (1500, 20, 70), (2048, 1024, 1024), (30, 20, 7)]
)
def test_frechet_from_running_sums_equals_that_of_all_features(n, m, batch):
    a, b = features(n, 32, 1), features(m, 32, 2, 0.02)
    assert filled(metrics.FrechetDistance(32), a, b, batch)["fd"] == pytest.approx(
        distances.frechet(a, b), rel=1e-8
    )


def test_running_sums_stay_small():
    metric = metrics.FrechetDistance(8)
    for rows in features(5000, 8).split(50):
        metric.update(rows, real=True)
        assert sum(map(len, metric.real)) <= 1024


def test_every_metric_gives_the_figures_of_its_distance():
    a, b = features(120, 16, 1), features(90, 16, 2, 0.1)
    precision, recall = distances.precision_recall(a, b, 5)
    assert filled(metrics.PrecisionRecall(16, k=5), a, b, 32) == {
        "precision": precision,
        "recall": recall,
    }
    assert filled(metrics.CMMD(16), a, b, 32) == {"cmmd": distances.cmmd(a, b)}
    kid = distances.kid(a, b)
    assert filled(metrics.KernelDistance(16), a, b, 32) == {"kid": kid.value, "kid_se": kid.error}
    spread = filled(metrics.FrechetSpread(16, resamples=20), a, b, 32)
    whole = distances.frechet(a, b)
    assert spread["fd_low"] < whole < spread["fd_high"] and spread["fd_infinity"] < whole
    few = metrics.FrechetSpread(60, resamples=5)
    assert filled(few, features(120, 60, 1), features(120, 60, 2), 32)["fd_infinity"] is None


def test_clip_score_equals_torchmetrics_and_its_interval_that_of_a_mean():
    """torchmetrics gets a model whose features of an image and of a caption are the numbers in
    them."""
    functional = pytest.importorskip("torchmetrics.functional.multimodal")
    image = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) - 0.2
    text = torch.rand(50, 8, generator=torch.Generator().manual_seed(1)) - 0.2

    class Plain:
        config = None

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return pixels.flatten(1)

        def get_text_features(self, tokens, mask):
            return tokens

    def processor(images=None, text=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return {
            "input_ids": torch.tensor([[float(x) for x in row.split()] for row in text]),
            "attention_mask": torch.ones(len(text), 8),
        }

    # torchmetrics cuts the mean at 0, not each score.
    positive = torch.cosine_similarity(image, text) > 0
    captions = [" ".join(str(x) for x in row.tolist()) for row in text[positive]]
    theirs = functional.clip_score(
        list(image[positive].view(-1, 8, 1, 1)), captions, lambda: (Plain(), processor)
    )
    ours = metrics.CLIPScore()
    ours.update(image[positive], text[positive])
    assert ours.compute()["clip_score"] == pytest.approx(theirs.item(), rel=1e-6)
    metric = metrics.CLIPScore()
    for i in range(0, 50, 15):
        metric.update(image[i : i + 15], text[i : i + 15])
    each = 100 * torch.cosine_similarity(image.double(), text.double()).clamp(min=0)
    found = metric.compute()
    assert found["clip_score"] == pytest.approx(each.mean().item(), rel=1e-9)
    assert found["clip_score_se"] == pytest.approx((each.std() / 50**0.5).item(), rel=1e-9)
    assert found["clip_score_high"] - found["clip_score_low"] == pytest.approx(
        2 * 1.96 * found["clip_score_se"], rel=1e-9
    )


def test_retrieval_rank_is_by_hand_what_it_should_be_and_equal_captions_are_one():
    text = torch.eye(4)[[0, 1, 2, 2]]
    image = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0, 0], [0.5, 0.4, 0.3, 0], [0, 0, 1, 0]])
    metric = metrics.RetrievalRank(4)
    metric.update(image[:3], text[:3])
    metric.update(image[3:], text[3:])
    assert metric.compute() == {
        "rank_mean": 1.75,
        "rank_median": 1.5,
        "r1": 0.5,
        "r5": 1.0,
        "captions": 4,
    }
    same = metrics.RetrievalRank(4)
    same.update(torch.ones(3, 4), torch.eye(4)[:3])
    assert same.compute()["rank_mean"] == 3  # a CLIP that tells nothing apart earns nothing


def figures(share) -> dict:
    """Of every metric, from the rows that `share` gives this rank."""
    a, b = features(1301, 12, 1), features(1101, 12, 2, 0.1)
    found = {}
    for metric in (
        metrics.FrechetDistance(12),
        metrics.KernelDistance(12),
        metrics.CMMD(12),
        metrics.PrecisionRecall(12),
        metrics.FrechetSpread(12, 3),
    ):
        for x, real in ((a, True), (b, False)):
            for rows in share(x).split(100):
                if len(rows):
                    metric.update(rows, real=real)
        found |= metric.compute()
    for metric in (metrics.CLIPScore(), metrics.RetrievalRank(12)):
        if len(share(b)):
            metric.update(share(b), share(a[:1101]))
        found |= metric.compute()
    return found


def test_two_ranks_give_the_figures_of_one_also_where_one_has_no_images(tmp_path):
    def work() -> None:
        distributed.init_process_group("gloo")
        rank, size = distributed.get_rank(), distributed.get_world_size()
        last = rank == size - 1
        found = figures(lambda x: x[rank::size]), figures(lambda x: x if last else x[:0])
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))
        distributed.destroy_process_group()

    ranks = Ranks(tmp_path / "output", work, 2)
    assert ranks.wait() == [0, 0], ranks.output()[-3000:]
    shared, of_one = json.loads((tmp_path / "0.json").read_text())
    expected = figures(lambda x: x)
    assert of_one == pytest.approx(expected, rel=1e-9)
    assert shared.keys() == expected.keys()
    # Random subsets are drawn by the numbers of rows, which have another order on two ranks.
    for name in ("fd_se", "fd_low", "fd_high", "fd_infinity"):
        del shared[name], expected[name]
    assert shared == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "metric",
    [metrics.FrechetDistance, metrics.KernelDistance, metrics.CMMD, metrics.PrecisionRecall],
)
def test_bad_features_are_a_sentence(metric):
    rows = features(20, 8)
    rows[3, 2], rows[5, 1] = torch.nan, torch.inf
    with pytest.raises(UserError, match="not finite"):
        metric(8).update(rows, real=True)
    with pytest.raises(UserError, match="dim"):
        metric(9).update(features(20, 8), real=True)
    few = metric(8)
    few.update(features(20, 8), real=True)
    few.update(features(1, 8), real=False)
    with pytest.raises(UserError, match="20 and 1"):
        few.compute()


def test_a_set_smaller_than_the_features_and_unequal_sets_are_named_once(caplog):
    metrics.warn_once.cache_clear()
    for seed in range(2):
        filled(metrics.FrechetDistance(64), features(40, 64), features(30, 64, seed), 10)
    assert len(caplog.records) == 2
    assert "30 images and the features have 64 numbers" in caplog.text and "rank 29" in caplog.text
    assert "The sets have 40 and 30 images" in caplog.text and "biased" in caplog.text
    caplog.clear()
    filled(metrics.FrechetDistance(4), features(40, 4), features(40, 4, 1), 10)
    assert not caplog.text


def test_embeddings_that_are_no_pairs_are_a_sentence():
    with pytest.raises(UserError, match="one caption per image"):
        metrics.CLIPScore().update(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(UserError, match="not finite"):
        metrics.RetrievalRank(4).update(
            torch.ones(2, 4), torch.tensor([[1.0] * 4, [torch.nan] * 4])
        )
    with pytest.raises(UserError, match="no image"):
        metrics.CLIPScore().compute()


def test_sums_in_parts_give_the_covariance():
    """Its lower triangle is numpy's."""
    x = features(900, 600, 1)
    metric = metrics.FrechetDistance(600)
    for rows in (x[:600], x[600:]):
        metric.update(rows, real=True)
        metric.update(rows + 0.1, real=False)
    gaussian = metric._gaussian("real")
    torch.testing.assert_close(
        gaussian.covariance.tril(), torch.cov(x.double().T).tril(), rtol=1e-9, atol=1e-12
    )
    assert metric.compute()["fd"] == pytest.approx(600 * 0.1**2, rel=1e-5)
