"""Loaders that Lightning builds again within a run go on where the last one was."""

import pytest
from lightning.pytorch.callbacks import BatchSizeFinder

from tests.data.fitkit import SaveAt, data_of, fit
from tests.data.shardkit import write_shards
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.datamodules.image_text import ImageTextData
from unclip_pl.datamodules.prior import PriorData


def of_kind(kind, shards, folder, workers):
    store = folder / "store" if kind is PriorData else None
    data = data_of(kind, shards, store=store, num_workers=workers, steps_per_epoch=3)
    if kind is PriorData:
        data.config = EmbeddingLoaderConfig(batch_size=4, steps_per_epoch=3)
    return data


@pytest.mark.parametrize(
    ("kind", "workers"), [(ImageTextData, 0), (ImageTextData, 2), (PriorData, 0)]
)
def test_a_loader_for_each_epoch_gives_what_one_for_all_gives(tmp_path, kind, workers):
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", [9, 4, 12, 7])

    def keys(*callbacks, **options):
        data = of_kind(kind, shards, tmp_path, workers)
        return fit(data, tmp_path, 12, *callbacks, **options).keys

    saved = tmp_path / "a.ckpt"
    straight = keys()
    assert keys(SaveAt(saved, 5), reload_dataloaders_every_n_epochs=1) == straight
    assert keys(ckpt=saved, reload_dataloaders_every_n_epochs=1) == straight[5:]
    flat = [key for batch in straight[:8] for key in batch]
    assert len(set(flat)) == 32  # a whole pass: none came twice before


def test_a_loader_that_was_given_a_state_hands_it_on_before_its_first_batch(tmp_path):
    data = data_of(ImageTextData, write_shards(tmp_path, [9, 4, 12, 7]), steps_per_epoch=9)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    seen = [next(batches)["key"] for _ in range(2)]
    state = data._train_loader.state_dict()
    seen += [batch["key"] for batch in batches]
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["key"] for batch in data.train_dataloader()] == seen[2:]


@pytest.mark.parametrize("kind", [ImageTextData, PriorData])
def test_trials_of_batch_sizes_use_up_no_sample_twice(tmp_path, kind):
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", [32] * 4)
    data = of_kind(kind, shards, tmp_path, 0)
    finder = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=3)
    keys = fit(data, tmp_path, 4, finder).keys
    assert data.batch_size == 8 and {len(batch) for batch in keys[-4:]} == {8}
    flat = [key for batch in keys for key in batch]
    assert len(set(flat)) == len(flat)


def test_a_loader_that_another_one_followed_still_tells_its_place(tmp_path):
    data = data_of(ImageTextData, write_shards(tmp_path, [9, 4, 12, 7]), steps_per_epoch=9)
    data.setup("fit")
    first = data.train_dataloader()
    batches = iter(first)
    seen = [next(batches)["key"] for _ in range(3)]
    batches.close()
    state = first.state_dict()
    seen += [batch["key"] for batch in data.train_dataloader()]
    assert first.state_dict()["done"] == state["done"] == 3
    resumed = data_of(ImageTextData, data.train, steps_per_epoch=9)
    resumed.setup("fit")
    loader = resumed.train_dataloader()
    loader.load_state_dict(first.state_dict())
    assert [batch["key"] for batch in loader] == seen[3:9]
