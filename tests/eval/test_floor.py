"""The floor: what real pictures have against real pictures, and what is said of figures at it."""

import argparse

import pytest

from eval import distances
from eval.floor import Floor, floor_of, other_real
from eval.judge import Judge
from eval.paired import Difference
from eval.tables import Section, difference_row, floor_row, notes, row
from tests.eval import tiny
from tests.eval.sets import features


def test_floor_is_what_fresh_real_sets_have_at_these_sizes():
    """Fresh draws of the same distribution are the oracle; more pictures lower the floor."""
    found = floor_of(features(2000, 16, 0), 100, 150, "fd")
    fresh = [
        distances.frechet(features(150, 16, 2 * k + 1), features(100, 16, 2 * k + 2))
        for k in range(20)
    ]
    assert found.mean["fd"] == pytest.approx(sum(fresh) / 20, rel=0.15)
    assert sum(value <= found.high["fd"] for value in fresh) >= 16
    assert abs(found.mean["kid"]) < found.high["kid"]
    assert floor_of(features(2000, 16, 0), 400, 400, "fd").high["fd"] < 0.6 * found.mean["fd"]
    assert found == floor_of(features(2000, 16, 0), 100, 150, "fd")
    assert floor_of(features(249, 16, 0), 100, 150, "fd") is None


def test_real_pictures_for_the_floor_are_those_named_else_the_reference(tmp_path):
    judge = Judge("openmoji", "openmoji")
    shard, more = tiny.shards(tmp_path / "a", 6), tiny.shards(tmp_path / "b", 9, seed=1)
    given = argparse.Namespace(
        captions=str(shard),
        reference=None,
        reference_size=None,
        floor=None,
        batch_size=4,
        device="cpu",
    )
    assert other_real(given, judge, 16) is None
    given.reference = str(shard)
    assert other_real(given, judge, 16).shape == (6, 256)
    given.floor = str(more)
    assert other_real(given, judge, 16).shape == (9, 256)


def test_embedded_captions_have_the_training_drawings(monkeypatch, tmp_path):
    drawings = tiny.shards(tmp_path, 7)
    drawings.rename(tmp_path / "train-00000.tar")
    monkeypatch.setattr("eval.floor.openmoji_shards", lambda size, name: tmp_path)
    given = argparse.Namespace(
        captions="openmoji",
        reference=None,
        reference_size=None,
        floor=None,
        batch_size=4,
        device="cpu",
    )
    assert other_real(given, Judge("openmoji", "openmoji"), 16).shape == (7, 256)


FLOOR = Floor(12, 12, {"fd_clip": 10.0, "kid": 0.0}, {"fd_clip": 12.0, "kid": 0.01})
FIGURES = {
    **{"guidance_scale": 1.0, "fd_clip": 11.0, "fd_clip_low": 9.0, "fd_clip_high": 13.0},
    **{"kid": 0.02, "kid_se": 0.01, "clip_score": 70.0, "clip_score_low": 69.0},
    **{"clip_score_high": 71.0, "precision": 0.8, "recall": 0.9, "r1": 0.3},
}


def test_a_figure_at_the_floor_is_called_so_and_not_better():
    at = FLOOR.at(FIGURES)
    assert at == ["fd_clip"]
    line = row("text", "z_t", FIGURES | {"at_floor": at, "at_edge": ["guidance_scale"]}, "fd_clip")
    assert line[3] == "11 [9, 13], at the floor" and line[4] == "20 ± 10" and line[2] == "1*"
    assert floor_row(FLOOR, "fd_clip")[3:5] == ["10, up to 12", "0, up to 10"]
    assert floor_row(None, "fd_clip")[3:5] == ["-", "-"]
    sure, unsure = Difference(-2.0, -3.0, -1.0), Difference(-2.0, -5.0, 1.0)
    floored = Difference(-2.0, -3.0, -1.0, at_floor=True)
    apart = {"fd_clip": floored, "kid": sure, "clip_score": unsure, "r1": sure}
    cells = difference_row("text", apart, "fd_clip")
    assert cells[1] == "both at the floor" and cells[2].startswith("-2000.0 [")
    assert cells[3].startswith("(") and not floored.sure
    said = notes([Section("t", [""], [line, cells])])
    assert len(said) == 3 and not notes([Section("t", [""], [["1.5"]])])
