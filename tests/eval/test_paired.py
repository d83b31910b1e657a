"""Differences between sets of pictures of the same captions, and how sure they are."""

from math import isfinite

import pytest
import torch

from eval import distances
from eval.evaluator import ImageFeatures
from eval.metrics import CLIPScore
from eval.paired import (
    Difference,
    distance_intervals,
    mean_clip_score,
    paired_differences,
    paired_kid,
    subset_kids,
)
from tests.eval.sets import features
from unclip_pl.utils.errors import UserError


def images(seed: int, n: int = 300, shift: float = 0.0) -> list[ImageFeatures]:
    rows = features(n, 16, seed, shift)
    return [ImageFeatures(torch.arange(n), rows, rows)]


def test_a_set_differs_from_itself_by_nothing_and_from_a_worse_one_for_sure():
    real, text = features(300, 16, 5), features(300, 16, 6)
    same = paired_differences(images(1), images(1), text, real, resamples=20)
    nothing = dict.fromkeys(("clip_score", "r1", "fd", "kid"), (0.0, 0.0, 0.0))
    assert {name: (one.value, one.low, one.high) for name, one in same.items()} == nothing
    worse = paired_differences(images(1), images(1, shift=1.0), text, real, resamples=20)
    better = paired_differences(images(1, shift=1.0), images(1), text, real, resamples=20)
    for name in ("fd", "kid"):
        assert worse[name].sure and worse[name].value > 0
        assert better[name].value == pytest.approx(-worse[name].value)
    assert not Difference(0.1, -0.1, 0.3).sure and not Difference(1.0, 0.5, 1.5, True).sure


def test_difference_of_kid_is_that_of_the_two_kids():
    real, a, b = features(200, 16, 5), images(1, 200), images(2, 200, shift=0.2)
    found = paired_differences(a, b, features(200, 16, 6), real, resamples=5)["kid"]
    kids = [distances.kid(real, one[0].features, paired=True).value for one in (a, b)]
    assert found.value == pytest.approx(kids[1] - kids[0], rel=1e-9)


def test_kid_of_pictures_that_resemble_their_captions_own_is_that_from_other_pictures():
    """An independent reference is the oracle: it must not matter which one it is."""
    against_own, against_others, with_own_pairs = [], [], []
    for k in range(30):
        real, other = features(100, 16, 3 * k), features(100, 16, 3 * k + 1)
        drawn = (0.9 * real + 0.1 * features(100, 16, 3 * k + 2) + 0.02).clamp(min=0)
        sets = [ImageFeatures(torch.arange(100), drawn, drawn)]
        against_own.append(paired_kid(real, sets)["kid"])
        against_others.append(distances.kid(other, drawn).value)
        with_own_pairs.append(distances.kid(real, drawn).value)
    own, others, wrong = map(torch.tensor, (against_own, against_others, with_own_pairs))
    error = (others.var() / 30 + own.var() / 30) ** 0.5
    assert abs(own.mean() - others.mean()) < 3 * error < others.mean() - wrong.mean()
    whole, one = paired_kid(real, sets), distances.kid(real, drawn, paired=True)
    inside = torch.ones(100, 1, dtype=torch.float64)
    at_once = subset_kids(real, drawn, inside, inside, paired=True).item()
    assert whole["kid"] == one.value == pytest.approx(at_once, rel=1e-6)
    assert one.error == pytest.approx(own.std().item(), rel=0.5)


def test_kids_of_many_subsets_at_once_are_those_of_each(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 64)  # several blocks
    real, fake = features(150, 16, 1), features(170, 16, 2, 0.1)
    generator = torch.Generator().manual_seed(0)
    subsets = [
        [torch.randperm(len(x), generator=generator)[:size] for x in (real, fake)]
        for size in (150, 75, 40)
    ]
    masks = [
        torch.stack([torch.zeros(len(x)).index_fill(0, rows[side], 1) for rows in subsets], 1)
        for side, x in enumerate((real, fake))
    ]
    found = subset_kids(real, fake, *(mask.double() for mask in masks))
    expected = [distances.kid(real[a], fake[b]).value for a, b in subsets]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["fd", "kid"])
def test_interval_of_a_distance_is_as_wide_as_new_sets_differ(name):
    """New sets are the oracle: the half width must be about 1.96 times their spread."""
    text, apart = features(200, 16, 6), []
    for k in range(24):
        sets = images(3 * k, 200), images(3 * k + 1, 200, shift=0.1)
        real = features(200, 16, 3 * k + 2)
        apart.append(paired_differences(*sets, text, real, resamples=20)[name])
    spread = 1.96 * torch.tensor([one.value for one in apart]).std().item()
    width = torch.tensor([(one.high - one.low) / 2 for one in apart]).mean().item()
    assert 0.6 < width / spread < 1.6


def test_interval_of_the_score_is_that_of_a_paired_mean():
    """Against the closed form: 1.96 standard errors of the mean of the differences, which pairing
    makes much smaller than unpaired ones."""
    a, text = images(1), features(300, 16, 6)
    b = [a[0]._replace(image_embed=a[0].image_embed + 0.05 * features(300, 16, 9))]
    one = paired_differences(a, b, text, None, resamples=800)["clip_score"]

    def cosine(x: list[ImageFeatures]) -> torch.Tensor:
        return 100 * torch.nn.functional.cosine_similarity(x[0].image_embed.double(), text.double())

    apart = cosine(b) - cosine(a)
    assert one.value == pytest.approx(apart.mean().item(), rel=1e-6)
    half = 1.96 * apart.std().item() / 300**0.5
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.1)


def test_reference_of_other_pictures_is_halved_by_itself():
    text, real = features(300, 16, 6), features(500, 16, 5)
    one, two = (
        paired_differences(images(1), images(2, shift=0.2), text, rows, resamples=30, paired=False)
        for rows in (real, real.flip(0))
    )
    for name in ("fd", "kid"):
        assert one[name].value == pytest.approx(two[name].value, rel=1e-9)
        assert one[name].sure and two[name].sure and one[name].low != two[name].low


def test_several_pictures_of_a_caption_are_averaged():
    """Every figure is the mean over the seeds, and an interval of the score that of captions."""
    text, real, n = features(200, 16, 6), features(200, 16, 5), 200
    a, b = [images(k, n)[0] for k in (1, 2, 3)], [images(k, n, shift=0.2)[0] for k in (4, 5, 6)]
    whole = paired_differences(a, b, text, real, resamples=10)
    for name in whole:
        single = [paired_differences([x], [y], text, real, 10)[name].value for x, y in zip(a, b)]
        assert whole[name].value == pytest.approx(sum(single) / 3, rel=1e-9)
    metric = CLIPScore()
    metric.update(a[0].image_embed, text)
    assert mean_clip_score(a[:1], text)["clip_score_low"] == pytest.approx(
        metric.compute()["clip_score_low"], rel=1e-9
    )
    assert mean_clip_score([a[0], a[0]], text) == pytest.approx(
        mean_clip_score(a[:1], text), rel=1e-9
    )
    assert (
        mean_clip_score(a, text)["clip_score_se"]
        < 0.9 * mean_clip_score(a[:1], text)["clip_score_se"]
    )


def test_spread_of_one_picture_is_the_bootstrap_of_the_distance_and_shrinks_with_more():
    real, sets = features(250, 16, 5), [images(k, 200)[0] for k in range(4)]
    one, four = (
        distance_intervals(real, images, "fd", 200, paired=False) for images in (sets[:1], sets)
    )
    expected = distances.bootstrap(distances.frechet, real, sets[0].features, 200, 0)
    assert (one["fd_low"] + one["fd_high"]) / 2 == pytest.approx(expected.value, rel=1e-9)
    assert one["fd_se"] == pytest.approx(expected.error, rel=0.25)
    assert one["kid_se"] == pytest.approx(distances.kid(real, sets[0].features).error, rel=0.25)
    assert four["fd_se"] < one["fd_se"]


def test_interval_of_pictures_that_resemble_their_captions_own_is_as_wide_as_new_ones_differ():
    """New captions with their pictures are the oracle. Halves of each set by itself, which are
    right for a reference of other pictures, give far too wide an interval here."""
    values, intervals, wrong = [], [], []
    for k in range(24):
        real = features(200, 16, 2 * k)
        drawn = 0.9 * real + 0.1 * features(200, 16, 2 * k + 1)
        sets = [ImageFeatures(torch.arange(200), drawn, drawn)]
        values.append((distances.frechet(real, drawn), paired_kid(real, sets)["kid"]))
        for found, paired in ((intervals, True), (wrong, False)):
            interval = distance_intervals(real, sets, "fd", 20, k, paired)
            found.append((interval["fd_se"], interval["kid_se"]))
    spread, of_pairs, of_sets = torch.tensor([values, intervals, wrong], dtype=torch.float64)
    ratio = of_pairs.mean(0) / spread.std(0)
    assert (ratio > 0.6).all() and ratio[0] < 1.6
    assert ratio[1] < 2.2  # halves of equal distributions spread more
    assert (of_sets.mean(0) / spread.std(0) > 2.5).all()


def test_sets_of_other_captions_are_refused():
    with pytest.raises(UserError, match="same captions"):
        paired_differences(images(1), images(1, 299), features(300, 16, 6), None)


def test_too_few_captions_for_kid_and_for_halves_are_refused():
    text, real = features(4, 16, 6), features(4, 16, 5)
    a, b = images(1, 4), images(2, 4)
    assert all(isfinite(value) for value in paired_kid(real, a).values())
    assert all(isfinite(value) for value in distance_intervals(real, a, "fd", 3).values())
    found = paired_differences(a, b, text, real, 3)
    assert all(isfinite(each.low) for each in found.values())
    for count in (2, 3):
        few, others, rows = images(1, count), images(2, count), real[:count]
        for function, *given in (
            (paired_kid, rows, few),
            (distance_intervals, rows, few, "fd", 3),
            (distance_intervals, real, few, "fd", 3, 0, False),
            (paired_differences, few, others, text, rows, 3),
        ):
            with pytest.raises(UserError, match=f"{count} captions are too few for KID"):
                function(*given)
        with pytest.raises(UserError, match=f"{count} real images are too few"):
            distance_intervals(rows, a, "fd", 3, paired=False)
