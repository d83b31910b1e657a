"""Images that a model draws for a metric.

They are drawn once, resumably, the same from any number of ranks, and never mixed with those of
other settings.
"""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval.captions import Caption
from eval.generated import GeneratedImages
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

CAPTIONS = [Caption(f"key {k}", f"caption {k}") for k in range(11)]


def draw(indices):
    """Image k depends on seed k only."""
    generators = [torch.Generator().manual_seed(k) for k in indices]
    return torch.stack([torch.rand(3, 8, 8, generator=one) * 2 - 1 for one in generators])


def drawn(folder: Path, draw=draw, captions=CAPTIONS, settings=None, **options) -> GeneratedImages:
    settings = settings or {"guidance": 1.5}
    return GeneratedImages(folder, captions, draw, settings, shard_size=4, **options)


def all_of(source: GeneratedImages, batch_size: int = 3) -> dict[str, tuple[bytes, str]]:
    images = {}
    for batch in source.batches(batch_size):
        for key, image, text in zip(batch["keys"], batch["images"], batch["captions"]):
            images[key] = image.numpy().tobytes(), text
    return images


def test_images_come_back_as_they_were_drawn_with_their_captions(tmp_path):
    found = all_of(drawn(tmp_path))
    assert list(found) == [f"{k:07d}" for k in range(11)]
    for k, (image, caption) in enumerate(found.values()):
        assert image == to_uint8(draw([k]))[0].numpy().tobytes() and caption == f"caption {k}"
    assert len(list(tmp_path.glob("*.tar"))) == 3 and len(drawn(tmp_path)) == 11


def test_the_bar_counts_the_steps_of_the_batch_that_is_being_drawn(tmp_path, monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: 2.0 * next(clock))
    stage = SimpleNamespace(watch=None)

    def draw_in_steps(indices):
        for _ in range(5):
            stage.watch(torch.zeros(1))
        return draw(indices)

    other = drawn(tmp_path / "other", draw_in_steps, stages=[stage], rank=1, world_size=2)
    other.draw_missing(2)
    assert capsys.readouterr().err == ""  # only rank 0 has a bar
    drawn(tmp_path, draw_in_steps, stages=[stage]).draw_missing(2)
    said = capsys.readouterr().err
    assert "this batch: step 5" in said and "step 6" not in said
    assert stage.watch is None


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_have_disjoint_shares_which_are_together_those_of_one(tmp_path, world):
    of_one = all_of(drawn(tmp_path / "one"))
    ranks = [drawn(tmp_path / "many", rank=rank, world_size=world) for rank in range(world)]
    shares = [all_of(rank) for rank in ranks]
    assert sum(map(len, shares)) == 11
    assert {key: value for share in shares for key, value in share.items()} == of_one

    def contents(folder):
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    assert contents("one") == contents("many")


def test_a_killed_run_keeps_whole_shards_and_draws_the_rest(tmp_path):
    def killed(indices):
        if 6 in indices:
            os.kill(os.getpid(), signal.SIGKILL)  # in mid-shard, with a part of it written
        return draw(indices)

    if (child := os.fork()) == 0:
        drawn(tmp_path, killed).draw_missing(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("[0-9]*.tar")] == ["00000.tar"]
    assert list(tmp_path.glob(".*.tmp"))
    asked = []

    def count_and_draw(indices):
        asked.extend(indices)
        return draw(indices)

    again = drawn(tmp_path, count_and_draw)
    assert all_of(again) == all_of(drawn(tmp_path / "whole")) and asked == list(range(4, 11))
    assert not list(tmp_path.glob(".*.tmp"))  # and what the kill left is gone
    asked.clear()
    assert all_of(again) and not asked


def test_the_first_captions_are_part_of_all(tmp_path):
    first, whole = drawn(tmp_path, first=6), drawn(tmp_path)
    assert len(first) == 6 and list(all_of(first)) == [f"{k:07d}" for k in range(6)]
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert all(batch["keys"] for batch in first.batches(1))
    assert dict(list(all_of(whole).items())[:6]) == all_of(first) and len(all_of(whole)) == 11
    torch.testing.assert_close(whole.load([10, 0]), draw([10, 0]), rtol=0, atol=1 / 255)


@pytest.mark.parametrize(
    ("changes", "keyword"),
    [
        ({"settings": {"guidance": 2.0}}, "guidance 1.5"),
        ({"captions": [*CAPTIONS[:-1], Caption("x", "another")]}, "captions_sha256"),
        ({"settings": {"guidance": 1.5, "seed": 1}}, "seed None"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, changes, keyword):
    drawn(tmp_path).draw_missing(4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=keyword):
        drawn(tmp_path, **changes).draw_missing(4)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_folder_of_other_shards_is_left_alone(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="samples.json"):
        drawn(tmp_path).draw_missing(4)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        drawn(tmp_path).draw_missing(4)
