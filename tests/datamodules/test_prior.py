"""Rows of the embedding store as batches: each row once per epoch, disjoint over ranks, resumed at
the very next batch, and no image is opened."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.fitkit import SaveAt, data_of, fit
from tests.data.shardkit import write_shards
from unclip_pl.data import shards as shard_files
from unclip_pl.data.embedding_loader import EmbeddingLoader, SequentialEmbeddingLoader
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.data.permutation import permute
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.utils.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    made = write_shards(folder, [9, 4, 12, 7])
    module(made).prepare_data()
    return made


def module(shards, **loader) -> PriorData:
    data = data_of(PriorData, shards[:3], shards[3:], Path(shards[0]).parent / "store")
    data.config = EmbeddingLoaderConfig(**{"batch_size": 4, **loader})
    return data


def ready(shards, **loader) -> PriorData:
    data = module(shards, **loader)
    data.setup("fit")
    return data


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


@pytest.mark.parametrize("total", [1, 2, 3, 5, 64, 1000, 4097])
def test_the_order_is_a_permutation_that_seed_and_epoch_change(total):
    orders = [permute(np.arange(total), total, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(order), np.arange(total)) for order in orders)
    assert np.array_equal(orders[0], permute(np.arange(total), total, 0, 0))
    assert total < 64 or all(
        np.mean(a == b) < 0.1 for i, a in enumerate(orders) for b in [np.arange(total), *orders[:i]]
    )


def test_the_order_looks_random():
    """First places over many epochs are even (chi-square, 63 degrees of freedom).

    Neighbours are independent.
    """
    orders = np.stack([permute(np.arange(64), 64, 0, epoch) for epoch in range(640)])
    counts = np.bincount(orders[:, 0], minlength=64)
    assert ((counts - 10) ** 2 / 10).sum() < 120
    large = permute(np.arange(100_000), 100_000, 0, 0)
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 0.01


def test_a_batch_is_what_the_store_and_the_other_module_say(shards):
    data = ready(shards)
    other = data_of(ImageEmbeddingData, shards[:3], None, Path(shards[0]).parent / "store")
    other.setup("fit")
    expected = {}
    for batch in other.train_dataloader():
        for i, key in enumerate(batch["key"]):
            expected[key] = {
                name: batch[name][i] for name in ("tokens", "text_embed", "image_embed")
            }
    batches = list(data.train_dataloader())
    assert len(batches) == 6 and set(batches[0]) == {
        "key",
        "tokens",
        "text_mask",
        "text_embed",
        "image_embed",
    }
    assert len(set(keys(batches)) & set(expected)) > 12
    for batch in batches:
        for i, key in enumerate(batch["key"]):
            for name, value in expected.get(key, {}).items():
                assert torch.equal(batch[name][i], value) and batch[name].dtype == value.dtype
            # as this CLIP says, whose last token is not the largest id
            assert torch.equal(batch["text_mask"][i], batch["tokens"][i] > 0)


def test_token_states_are_added_on_request(shards):
    data = ready(shards)
    batch = next(iter(data.train_dataloader()))
    assert "text_states" not in data.on_after_batch_transfer(dict(batch), 0)
    data.text_states = True
    assert data.on_after_batch_transfer(batch, 0)["text_states"].shape == (4, 12, 5)


def test_no_image_is_opened(shards, monkeypatch):
    data = module(shards)

    def never(*_, **__):
        raise AssertionError("a tar was read")

    monkeypatch.setattr(shard_files, "read_shard", never)
    data.prepare_data()
    data.setup("fit")
    assert len(keys(data.train_dataloader())) == 24 and len(keys(data.val_dataloader())) == 7


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_are_disjoint_and_have_equally_many_steps(shards, world):
    table = ready(shards).train_dataloader().table
    loaders = [
        EmbeddingLoader(table, EmbeddingLoaderConfig(batch_size=4), rank=rank, world=world)
        for rank in range(world)
    ]
    for _ in range(3):
        seen = [keys(loader) for loader in loaders]
        assert {len(part) for part in seen} == {25 // (4 * world) * 4}
        together = [key for part in seen for key in part]
        assert len(set(together)) == len(together)


def test_rows_left_over_have_their_turn(shards):
    loader = EmbeddingLoader(
        ready(shards).train_dataloader().table, EmbeddingLoaderConfig(batch_size=4)
    )
    assert len({key for _ in range(6) for key in keys(loader)}) == 25


def test_a_resumed_run_goes_on_at_the_next_batch(shards, tmp_path):
    straight = fit(ready(shards), tmp_path, 15)
    fit(ready(shards), tmp_path, 8, SaveAt(tmp_path / "at.ckpt", 8))
    resumed = fit(ready(shards), tmp_path, 15, ckpt=tmp_path / "at.ckpt")
    assert resumed.keys == straight.keys[8:] and straight.keys[:6] != straight.keys[6:12]


def test_a_state_of_other_rows_goes_on_at_the_next_epoch(shards, caplog):
    table = ready(shards).train_dataloader().table
    theirs = EmbeddingLoader(table, EmbeddingLoaderConfig(batch_size=2))
    for _ in zip(range(15), theirs):  # 12 fill an epoch
        pass
    for ours, said in (
        (
            EmbeddingLoader(table, EmbeddingLoaderConfig(batch_size=4, seed=5)),
            "seed 0 there and 5 here",
        ),
        (EmbeddingLoader(table, EmbeddingLoaderConfig(batch_size=4)), ""),
    ):
        state = theirs.state_dict()
        if not said:  # what versions before this one wrote
            state = {
                "shape": state["shape"] | {"ranks": 1, "batch size": 2},
                "given": 15,
                "done": 3,
                "epoch": 1,
            }
        ours.load_state_dict(state)
        assert (said or "of an earlier form") in caplog.text
        assert (ours.epoch, ours.row) == (theirs.epoch + 1 if said else 2, 0)


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 4)), ((1, 3), (2, 2)), ((3, 1), (2, 1))]
)
def test_another_number_of_ranks_goes_on_at_the_next_row(shards, before, after, caplog):
    table = ready(shards).train_dataloader().table
    order = list(range(len(table)))

    def given(world, batch, steps, state=None):
        loaders = [
            EmbeddingLoader(
                table,
                EmbeddingLoaderConfig(batch_size=batch, steps_per_epoch=steps),
                rank=rank,
                world=world,
            )
            for rank in range(world)
        ]
        for loader in loaders:
            if state:
                loader.load_state_dict(state | {"done": 0})
        found = [[batch["key"] for batch in loader] for loader in loaders]
        return [key for step in zip(*found, strict=True) for part in step for key in part], loaders[
            0
        ].state_dict()

    straight, _ = given(1, 1, len(order))
    first, state = given(*before, 3)
    second, _ = given(*after, (len(order) - len(first)) // (after[0] * after[1]), state)
    assert first + second == straight[: len(first) + len(second)]
    assert len(order) - len(first) - len(second) < after[0] * after[1]
    assert not caplog.messages


def test_epochs_of_the_trainer_can_be_shorter_or_longer(shards):
    table = ready(shards).train_dataloader().table
    plain, short, long = (
        EmbeddingLoader(table, EmbeddingLoaderConfig(batch_size=4, steps_per_epoch=steps))
        for steps in (None, 4, 9)
    )
    order = [key for _ in range(6) for key in keys(plain)]
    assert len(short) == 4 and len(long) == 9
    assert [key for _ in range(9) for key in keys(short)] == order and [
        key for _ in range(4) for key in keys(long)
    ] == order


@pytest.mark.parametrize(
    ("world", "expected"), [(1, [7]), (2, [4, 4]), (3, [3, 3, 3]), (8, [1] * 8)]
)
def test_validation_takes_each_row_once_and_ranks_wait_for_nobody(shards, world, expected):
    table = ready(shards).val_dataloader().table
    parts = [
        keys(SequentialEmbeddingLoader(table, 3, rank=rank, world=world)) for rank in range(world)
    ]
    assert [len(part) for part in parts] == expected
    assert len({key for part in parts for key in part}) == 7
    assert len(list(SequentialEmbeddingLoader(table, 3, world=world))) == len(
        SequentialEmbeddingLoader(table, 3, world=world)
    )
    assert world > 1 or parts[0] == sorted(parts[0])


def test_no_validation_is_no_loader(shards):
    data = ready(shards)
    data.val_shards = []
    assert data.val_dataloader() == []


def test_statistics_are_those_of_the_training_rows(shards):
    data = ready(shards)
    rows = torch.cat(
        [
            batch["image_embed"]
            for batch in SequentialEmbeddingLoader(data.train_dataloader().table, 5)
        ]
    ).double()
    statistics = data.statistics()
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    torch.testing.assert_close(statistics.std, rows.std(0, correction=0))


def test_bad_settings_are_sentences(shards):
    with pytest.raises(UserError, match=r"25 rows do not fill a batch of 26"):
        ready(shards, batch_size=26).train_dataloader()
    for wrong in ({"batch_size": 0}, {"steps_per_epoch": 0}, {"max_bad_rate": 2.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=r"data\.loader"):
            EmbeddingLoaderConfig(**wrong)


def test_the_store_is_enough_where_the_tars_are_gone(tmp_path):
    made = write_shards(tmp_path, [9, 4])
    data = data_of(PriorData, made[:1], made[1:], tmp_path / "store")
    data.config = EmbeddingLoaderConfig(batch_size=4)
    data.prepare_data()
    data.setup("fit")
    before = next(iter(data.train_dataloader()))
    for tar in made:
        Path(tar).unlink()
    data.prepare_data()
    data.setup("fit")
    after = next(iter(data.train_dataloader()))
    assert after["key"] == before["key"] and torch.equal(
        after["image_embed"], before["image_embed"]
    )
    other = data_of(PriorData, [*made[:1], str(tmp_path / "never.tar")], None, tmp_path / "store")
    with pytest.raises(UserError, match="There is no shard"):
        other.prepare_data()
