"""The floor: the figures of real images against real ones, and how figures at it are named."""

from types import SimpleNamespace

import pytest
import torch

from eval import distances
from eval.comparison import Comparison
from eval.evaluator import Evaluator, ImageFeatures
from eval.floor import Floor, RealImages, compute_floor, reached_on_other_pictures
from eval.paired import Difference
from eval.tables import (
    Section,
    condition_row,
    difference_row,
    floor_line,
    floor_row,
    footnotes,
)
from tests.eval import tiny
from tests.eval.sets import features


def test_floor_is_what_new_real_sets_have_at_these_sizes():
    """New draws of the same distribution are the oracle; more images lower the floor."""
    found = compute_floor(features(2000, 16, 0), 100, 150, "fd")
    fresh = [
        distances.frechet(features(150, 16, 2 * k + 1), features(100, 16, 2 * k + 2))
        for k in range(20)
    ]
    assert found.mean["fd"] == pytest.approx(sum(fresh) / 20, rel=0.15)
    assert sum(value <= found.high["fd"] for value in fresh) >= 16
    assert abs(found.mean["kid"]) < found.high["kid"]
    assert compute_floor(features(2000, 16, 0), 400, 400, "fd").high["fd"] < 0.6 * found.mean["fd"]
    assert found == compute_floor(features(2000, 16, 0), 100, 150, "fd")
    assert compute_floor(features(240, 16, 0), 100, 150, "fd") is None
    itself = compute_floor(features(5000, 16, 0), 100, 5000, "fd")  # the reference, which is large
    assert (itself.count, itself.reference) == (100, 4900)


def test_pictures_near_their_captions_own_are_not_at_the_floor_for_that():
    """Copies of the reference that are all off by the same are nearer to it than other real images
    are, and still no real ones; new images of the same distribution are at the floor."""
    real, new = features(200, 16, 0), features(200, 16, 2)
    off = real + 0.08
    floor = compute_floor(features(2000, 16, 3), 200, 200, "fd")
    assert distances.frechet(real, off) < floor.high["fd"]

    def reached(rows: torch.Tensor) -> list[str]:
        return reached_on_other_pictures(
            real, [ImageFeatures(torch.arange(200), rows, rows)] * 2, "fd"
        )

    assert reached(new) == reached(real) == ["fd", "kid"]
    assert reached(off) == []


def test_real_images_for_the_floor_are_those_named_else_the_reference(tmp_path):
    evaluator = Evaluator("openmoji", "openmoji")
    shard, more = str(tiny.shards(tmp_path / "a", 6)), str(tiny.shards(tmp_path / "b", 9, seed=1))
    assert RealImages(shard, 16).floor_features(evaluator) is None
    assert RealImages(shard, 16, shard).floor_features(evaluator).shape == (6, 256)
    assert RealImages(shard, 16, shard, more).floor_features(evaluator).shape == (9, 256)


def test_embedded_captions_have_the_training_drawings(monkeypatch, tmp_path):
    drawings = tiny.shards(tmp_path, 7)
    drawings.rename(tmp_path / "train-00000.tar")
    monkeypatch.setattr("eval.floor.openmoji_shards", lambda size: tmp_path)
    real = RealImages("openmoji", 16)
    evaluator = Evaluator("openmoji", "openmoji")
    assert real.floor_features(evaluator).shape == (7, 256)
    other = str(tiny.shards(tmp_path / "other", 5))  # real images of another kind have their floor
    assert RealImages("openmoji", 16, other).floor_features(evaluator).shape == (5, 256)


FLOOR = Floor(12, 12, {"fd_clip": 10.0, "kid": 0.0}, {"fd_clip": 12.0, "kid": 0.01})
FIGURES = {
    **{"guidance_scale": 1.0, "fd_clip": 11.0, "fd_clip_low": 9.0, "fd_clip_high": 13.0},
    **{"kid": 0.02, "kid_se": 0.01, "clip_score": 70.0, "clip_score_low": 69.0},
    **{"clip_score_high": 71.0, "precision": 0.8, "recall": 0.9, "r1": 0.3},
}


def test_a_figure_is_near_the_floor_where_its_interval_reaches_it():
    figures = {"fd_clip": 13.0, "fd_clip_se": 0.6, "kid": 0.02, "kid_se": 0.004}
    assert FLOOR.reached_by(figures) == [] and FLOOR.near(figures) == ["fd_clip"]
    assert FLOOR.near(figures | {"kid_se": 0.006}) == ["fd_clip", "kid"]
    assert FLOOR.near(figures | {"fd_clip_se": 0.5}) == []


@pytest.mark.parametrize(
    ("kids", "floored"), [((0, 5), True), ((8, 14), True), ((0, 30), False), ((13, 14), False)]
)
def test_no_set_at_the_floor_is_called_better_than_one_that_may_be_there(kids, floored):
    """The floor of KID is 0.01, and the standard error 0.0025 of either."""
    sets = [
        {"fd_clip": 50.0, "fd_clip_se": 1.0, "kid": kid / 1000, "kid_se": 0.0025} for kid in kids
    ]
    sets = [figures | {"at_floor": FLOOR.reached_by(figures)} for figures in sets]
    comparison = SimpleNamespace(floor=lambda count: FLOOR, captions=range(12))
    for pair in (sets, sets[::-1]):
        assert Comparison.near_floor(comparison, *pair) == ({"kid"} if floored else set())
    comparison.floor = lambda count: None
    assert Comparison.near_floor(comparison, *sets) == set()


def test_a_figure_at_the_floor_is_called_so_and_not_better():
    at = FLOOR.reached_by(FIGURES)
    assert at == ["fd_clip"]
    figures = FIGURES | {"at_floor": at, "at_edge": ["guidance_scale"]}
    line = condition_row("text", "z_t", figures, "fd_clip")
    assert line[3] == "11 [9, 13], at the floor" and line[4] == "20 ± 10" and line[2] == "1*"
    assert floor_row(FLOOR, "fd_clip")[3:5] == ["10, up to 12", "0, up to 10"]
    assert floor_row(None, "fd_clip")[3:5] == ["-", "-"]
    far = figures | {"kid": 12.3429, "kid_se": 1.8619, "fd_clip_low": -4321.0}
    line = condition_row("text", "z_t", far, "fd_clip")
    assert line[3].startswith("11 [-4321, ") and line[4] == "12343 ± 1862"  # no exponents
    sure, unsure = Difference(-2.0, -3.0, -1.0), Difference(-2.0, -5.0, 1.0)
    floored = Difference(-2.0, -3.0, -1.0, at_floor=True)
    apart = {"fd_clip": floored, "kid": sure, "clip_score": unsure, "r1": sure}
    cells = difference_row("text", apart, "fd_clip")
    assert cells[1] == "at the floor" and cells[2].startswith("-2000.0 [")
    assert cells[3].startswith("(") and not floored.sure
    assert len(footnotes([Section("t", [""], [line, cells])])) == 3
    assert not footnotes([Section("t", [""], [["1.5"]])])
    swept = [(1.5, 20.0), (1.0, 30.0), (4.0, 25.0)]
    (level,) = floor_line(FLOOR, "fd_clip", swept).values()  # in the plots
    assert level == [(1.0, 12.0), (4.0, 12.0)]
    assert floor_line(FLOOR, "recall", swept) == floor_line(None, "fd_clip", swept) == {}
