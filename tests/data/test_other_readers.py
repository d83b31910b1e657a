"""A run that goes on with another number of ranks or workers."""

import pickle
from collections import Counter

import pytest

from tests.data.loaderkit import loader
from tests.data.shardkit import write_shards
from unclip_pl.data.loader import TrainLoader


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, [9, 4, 12, 7, 5, 11])


def until(loaders, epoch, limit=400) -> list[tuple[int, str]]:
    """(epoch, key) of all samples that the ranks' loaders give until each is past `epoch`."""
    given = []
    for one in loaders:
        for batch in (batch for _ in range(limit) for batch in one):
            given += zip(batch["epoch"].tolist(), batch["key"], strict=True)
            if min(batch["epoch"].tolist()) > epoch:
                break
    return given


def resumed(shards, given, old, **shape) -> list[TrainLoader]:
    """Loaders of all ranks of the new `shape`, from the state that those of `old` have together.

    There is no process group here, so it is put together by hand.
    """
    states = [one.state_dict() for one in old]
    state = states[0] | {"ranks": [one["ranks"][0] for one in states]}
    world = shape.pop("world", 1)
    new = [loader(shards, rank=rank, world=world, **shape) for rank in range(world)]
    for one in new:
        one.load_state_dict(pickle.loads(pickle.dumps(state)))
    return new


@pytest.mark.parametrize(
    "counts", [[9, 4, 12, 7, 5, 11], [3] * 40], ids=["samples shared out", "shards shared out"]
)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"world": 2}, {"world": 1}),
        ({"world": 1}, {"world": 3}),
        ({"world": 3}, {"world": 2, "batch_size": 2}),
        ({"num_workers": 2}, {"world": 2}),
        ({"world": 2}, {"num_workers": 2}),
    ],
    ids=str,
)
def test_another_number_of_readers_gives_each_sample_of_the_epoch_once(
    tmp_path, counts, before, after, caplog
):
    shards, world = write_shards(tmp_path, counts), before.get("world", 1)
    old = [loader(shards, rank=rank, **before) for rank in range(world)]
    steps = round(1.4 * sum(counts) / (4 * world))  # somewhere in epoch 1
    given = [
        pair
        for one in old
        for batch in one_by_one(one, steps)
        for pair in zip(batch["epoch"].tolist(), batch["key"], strict=True)
    ]
    given += until(resumed(shards, given, old, **after), 2)
    every = Counter(given)
    for epoch in range(3):
        assert {key: every[epoch, key] for key in (f"{n:06d}" for n in range(sum(counts)))} == {
            f"{n:06d}": 1 for n in range(sum(counts))
        }, epoch
    assert not caplog.messages


def one_by_one(one, steps):
    batches = (batch for _ in range(steps) for batch in one)
    return [next(batches) for _ in range(steps)]


def test_a_second_change_of_readers_within_the_epoch_loses_nothing_either(tmp_path):
    shards = write_shards(tmp_path, [3] * 40)
    old, given = [loader(shards, rank=rank, world=2) for rank in range(2)], []
    for world in (3, 1, 2):
        given += [
            pair
            for one in old
            for batch in one_by_one(one, 4)
            for pair in zip(batch["epoch"].tolist(), batch["key"], strict=True)
        ]
        old = resumed(shards, given, old, world=world)
    given += until(old, 1)
    every = Counter(given)
    assert all(every[epoch, f"{n:06d}"] == 1 for epoch in range(2) for n in range(120))
