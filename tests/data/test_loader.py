"""Loaders of shards: a stopped run goes on at the very next sample, ranks share the samples."""

import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import pytest

from tests.data.loaderkit import keep, loader, take
from tests.data.shardkit import write_shards
from unclip_pl.data.loader import ValidationLoader, count_steps_per_epoch
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.reader import SequentialShards, ShuffledShards
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, [9, 4, 12, 7, 5, 11])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_to_the_sample(shards, workers):
    # 48 samples, epochs of 7 batches of 4: stop within an epoch, at its end, after the end of the
    # shards, and twice
    straight = take(loader(shards, num_workers=workers), 30)
    for cut in (0, 3, 7, 12, 14, 23) if workers == 0 else (3, 7, 23):
        first = loader(shards, num_workers=workers)
        assert take(first, cut) == straight[:cut] if cut else True
        second = loader(shards, num_workers=workers)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        assert len(list(second)) == 7 - (cut % 7 if cut % 7 else 0)
        second = loader(shards, num_workers=workers)
        second.load_state_dict(first.state_dict())
        assert take(second, 30 - cut) == straight[cut:], cut
    third = loader(shards, num_workers=workers)
    third.load_state_dict(first.state_dict())
    take(third, 2)
    fourth = loader(shards, num_workers=workers)
    fourth.load_state_dict(third.state_dict())
    assert take(fourth, 4) == straight[25:29]


def test_resume_is_exact_with_bad_samples_and_at_the_end_of_the_only_window(tmp_path):
    shards = write_shards(tmp_path, [10, 8], bad={0, 17})
    straight = take(loader(shards, steps=4, max_bad_rate=1), 16)
    for cut in range(1, 12):
        first, second = (loader(shards, steps=4, max_bad_rate=1) for _ in range(2))
        take(first, cut)
        second.load_state_dict(first.state_dict())
        assert take(second, 4) == straight[cut : cut + 4]


def test_a_state_of_an_earlier_form_starts_the_next_epoch(shards, caplog):
    second = loader(shards)
    second.load_state_dict(
        {
            "shape": {"world": 1},
            "done": 3,
            "loader": {"dataset_state": {"epoch": 4, "window": 0, "offset": 8}},
        }
    )
    assert (
        next(iter(second))["epoch"].tolist() == [5] * 4 and "start of the next epoch" in caplog.text
    )


def test_a_pass_gives_each_sample_once_and_the_next_another_order(shards):
    flat = [key for keys in take(loader(shards, steps=12), 24) for key in keys]
    one, two = flat[:48], flat[48:]
    assert sorted(one) == sorted(two) == [f"{n:06d}" for n in range(48)]
    assert one != two and one != sorted(one)
    other = [key for keys in take(loader(shards, steps=12, seed=1), 12) for key in keys]
    assert other != one and sorted(other) == sorted(one)


@pytest.mark.parametrize("counts", [[40], [9, 4, 12, 7, 8], [3] * 20])
def test_ranks_and_workers_share_the_samples_and_none_twice(tmp_path, counts, monkeypatch):
    shards, total = write_shards(tmp_path, counts), sum(counts)
    given = Counter()
    for rank in range(2):
        samples = ShuffledShards(shards, 8, LoaderConfig(window=3), keep, rank=rank, world=2)
        for sample in samples:
            if sample["epoch"] > 0:
                break
            given[sample["key"]] += 1
    assert given == Counter(f"{n:06d}" for n in range(total))


def test_fewer_shards_than_workers_still_feed_all_of_them(tmp_path):
    shards = write_shards(tmp_path, [32])
    batches = [take(loader(shards, num_workers=2, rank=rank, world=2), 4) for rank in range(2)]
    flat = [key for rank in batches for keys in rank for key in keys]
    assert len(set(flat)) == len(flat) == 32


def test_spawned_workers_know_their_rank(tmp_path):
    shards = write_shards(tmp_path, [32])
    forked = take(loader(shards, num_workers=1, rank=1, world=2), 4)
    spawned = loader(shards, num_workers=1, rank=1, world=2, start_method="spawn")
    assert take(spawned, 4) == forked
    del spawned
    assert multiprocessing.get_start_method(allow_none=True) in (None, "fork", "forkserver")


@pytest.mark.parametrize("change", [{"seed": 5}, {"window": 1}])
def test_a_state_of_another_shape_starts_the_next_epoch_with_a_warning(shards, caplog, change):
    first, second = loader(shards), loader(shards, **change)
    take(first, 15)  # 60 samples of 48: in epoch 1
    second.load_state_dict(first.state_dict())
    assert "start of the next epoch" in caplog.text and len(caplog.messages) == 1
    assert all(epoch == 2 for epoch in next(iter(second))["epoch"].tolist())
    assert len(list(loader(shards, steps=3))) == 3


@pytest.mark.parametrize(("total", "world"), [(10, 3), (12, 3), (2, 3), (7, 1)])
def test_validation_gives_every_rank_as_much_and_repeats_only_to_fill(tmp_path, total, world):
    shards = write_shards(tmp_path, [total - 1, 1])
    ranks = []
    for rank in range(world):
        samples = SequentialShards(
            shards,
            8,
            LoaderConfig(batch_size=2, num_workers=0),
            keep,
            rank=rank,
            world=world,
            total=total,
        )
        batches = list(ValidationLoader(samples))
        assert len(ValidationLoader(samples)) == len(batches)
        ranks.append([key for batch in batches for key in batch["key"]])
    flat = [key for rank in ranks for key in rank]
    assert {len(rank) for rank in ranks} == {-(-total // world)}
    assert set(flat) == {f"{n:06d}" for n in range(total)} and len(flat) - total < world
    assert ranks[0] == [f"{n:06d}" for n in range(0, total, world)]


def test_validation_with_bad_samples_keeps_ranks_in_step(tmp_path):
    shards = write_shards(tmp_path, [12], bad={0, 3})  # both of rank 0
    config = LoaderConfig(batch_size=2, num_workers=0, max_bad_rate=1.0)
    lengths = [
        len(list(SequentialShards(shards, 8, config, keep, rank=rank, world=3, total=12)))
        for rank in range(3)
    ]
    assert lengths == [4, 4, 4]
    alone = [s["key"] for s in SequentialShards(shards, 8, config, keep, total=12)]
    assert alone == [f"{n:06d}" for n in range(12) if n not in (0, 3)]


def test_steps_of_an_epoch():
    assert count_steps_per_epoch(LoaderConfig(batch_size=8), 100, world=3) == 4
    assert count_steps_per_epoch(LoaderConfig(batch_size=8, steps_per_epoch=9), 100, world=3) == 9
    with pytest.raises(UserError, match="lower data.loader.batch_size"):
        count_steps_per_epoch(LoaderConfig(batch_size=64), 63, world=2)


def test_a_state_is_for_the_same_files_not_for_the_same_names(tmp_path, shards, caplog):
    first = loader(shards)
    take(first, 3)
    for folder, counts in (("moved", [9, 4, 12, 7, 5, 11]), ("other", [9, 4, 12, 7, 50, 11])):
        (tmp_path / folder).mkdir()
        second = loader(write_shards(tmp_path / folder, counts))
        second.load_state_dict(first.state_dict())
        assert ("start of the next epoch" in caplog.text) == (folder == "other")


def test_what_a_rank_reads_can_be_compared_and_says_what_is_missing(shards):
    one, two = (loader(shards, rank=rank, world=2).rank_summary() for rank in range(2))
    assert one | {"rank": 1} == two and one["missing"] == []
    Path(shards[2]).unlink()
    gone = loader(shards, rank=1, world=2).rank_summary()
    assert gone["missing"] == [shards[2]] and gone["shards"] != two["shards"]
