"""Tiny data train: fewer samples than readers, fewer than ranks fill batches of."""

import itertools

import pytest

from tests.data.loaderkit import loader, take
from tests.data.shardkit import write_shards
from tests.datamodules.test_prior import module
from tests.stages.tiny_diffusion_prior import batch, prior
from unclip_pl.data.embedding_loader import EmbeddingLoader
from unclip_pl.data.loader import count_steps_per_epoch
from unclip_pl.data.loader_config import EmbeddingLoaderConfig, LoaderConfig
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.utils.errors import UserError


@pytest.mark.parametrize("workers", [2, 3])
def test_one_picture_feeds_all_readers_and_a_resume_is_exact(tmp_path, workers):
    shards = write_shards(tmp_path, [1])
    first = loader(shards, steps=5, num_workers=workers, batch_size=2)
    assert take(first, 7) == [["000000"] * 2] * 7
    second = loader(shards, steps=5, num_workers=workers, batch_size=2)
    second.load_state_dict(first.state_dict())
    epochs = [found["epoch"].tolist() for found in itertools.islice(first, 3)]
    assert [found["epoch"].tolist() for found in itertools.islice(second, 3)] == epochs
    second.close()
    first.close()


def test_one_sample_on_two_ranks(tmp_path):
    shards = write_shards(tmp_path, [1])
    for rank in range(2):
        assert take(loader(shards, rank=rank, world=2, batch_size=1), 3) == [["000000"]] * 3
    assert count_steps_per_epoch(LoaderConfig(batch_size=1), 1, world=2) == 1
    shards = write_shards(tmp_path, [2, 1])
    given = {
        key
        for rank in range(4)
        for keys in take(loader(shards, rank=rank, world=4), 4)
        for key in keys
    }
    assert given == {"000000", "000001", "000002"}


def test_a_shard_without_one_usable_sample_is_still_an_error(tmp_path):
    shards = write_shards(tmp_path, [3], bad={0, 1, 2})
    with pytest.raises(UserError, match="no usable sample"):
        take(loader(shards, rank=3, world=4, max_bad_rate=1.0), 1)


def test_few_rows_on_many_ranks(tmp_path):
    shards = write_shards(tmp_path, [3, 1, 1, 1])
    data: PriorData = module(shards, batch_size=4)
    data.prepare_data()
    rows = data._table(data.train_shards)
    batches = []
    for rank in range(3):
        one = EmbeddingLoader(rows, EmbeddingLoaderConfig(batch_size=4), rank=rank, world=3)
        batches.append([found["key"] for _ in range(3) for found in one])
        assert len(one) == 1 and [len(keys) for keys in batches[-1]] == [4, 4, 4]
    for together in zip(*batches, strict=True):
        assert {key for keys in together for key in keys} == {f"{n:06d}" for n in range(5)}
    with pytest.raises(UserError, match="5 rows do not fill a batch of 6: lower"):
        EmbeddingLoader(rows, EmbeddingLoaderConfig(batch_size=6))


def test_the_long_end_of_a_prior_on_few_rows_has_a_bar(capsys):
    prior().estimate_variance([batch()], draws=1)
    assert "analytic variance: 100%" in capsys.readouterr().err
