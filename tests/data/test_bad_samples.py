"""Bad samples and broken shards count once against the limit, whatever the readers and their order,
and the same after a resume."""

import itertools
import multiprocessing
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from tests.data.fitkit import Recorder, data_of
from tests.data.loaderkit import ReaderOf, keep, keys_of, loader, take
from tests.data.shardkit import FakeCLIP, picture, write_shards, write_tar
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.reader import SKIPPED
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.datamodules.image_text import ImageTextData
from unclip_pl.training.progress import Progress
from unclip_pl.utils.errors import UserError


def without_images(folder: Path, counts: list[int], missing: set[int]) -> list[str]:
    """Shards numbered through, where some samples have only a caption."""
    shards, ends = [], list(itertools.accumulate(counts))
    for index, (count, end) in enumerate(zip(counts, ends, strict=True)):
        numbers = range(end - count, end)
        files = {
            f"{n:06d}.{kind}": picture(n, 8) if kind == "png" else b"x"
            for n in numbers
            for kind in ("txt", "png")
            if kind == "txt" or n not in missing
        }
        shards.append(write_tar(folder / f"{index:05d}.tar", files))
    return shards


def passes(shards: list[str], readers: int, epochs: int = 1, **config) -> list[tuple[int, int]]:
    """(good, bad) of each reader after so many whole passes."""
    found = []
    for place in range(readers):
        stream = ReaderOf(shards, 8, LoaderConfig(**config), keep)
        stream.place = place, readers
        good = bad = 0
        for sample in stream:
            if sample["epoch"] == epochs:
                bad += sample[SKIPPED]  # those that were due at the end
                break
            good, bad = good + 1, bad + sample[SKIPPED]
        found.append((good, bad))
    return found


@pytest.mark.parametrize("readers", [1, 4, 8])
@pytest.mark.parametrize(
    "missing", [{0, 200, 400, 600, 800}, {0, 1, 2, 3, 4}, {995, 996, 997, 998, 999}]
)
def test_samples_without_an_image_below_the_limit_stop_no_reader_and_count_once(
    tmp_path, readers, missing
):
    shards = without_images(tmp_path, [1000], missing)
    # before, "5 of 100 samples could not be used"
    counts = passes(shards, readers, epochs=2, max_bad_rate=0.01)
    assert [sum(column) for column in zip(*counts, strict=True)] == [2 * 995, 2 * 5]


@pytest.mark.parametrize("readers", [1, 4, 8])
def test_too_many_samples_without_an_image_stop_a_reader(tmp_path, readers):
    with pytest.raises(UserError, match=r"of 1\d\d samples could not be used.*it has no image"):
        passes(
            without_images(tmp_path, [1000], set(range(0, 1000, 50))), readers, max_bad_rate=0.01
        )


@pytest.mark.parametrize("readers", [1, 4, 8])
def test_a_broken_shard_is_counted_once_among_all_readers(tmp_path, readers):
    shards = write_shards(tmp_path, [100, 100, 100])
    for shard in shards[:2]:
        data = Path(shard).read_bytes()
        Path(shard).write_bytes(data[: len(data) * 3 // 4 + 100])
    counts = passes(shards, readers, epochs=2, max_bad_rate=0.3, window=3)
    good, bad = (sum(column) for column in zip(*counts, strict=True))
    assert (good, bad) == (2 * 254, 2 * 46) and max(bad for _, bad in counts) <= 96 / readers + 2


def test_resume_is_exact_among_samples_without_an_image(tmp_path):
    shards = without_images(tmp_path, [30, 10, 25], {0, 7, 8, 9, 31, 32, 64})
    config = {"steps": 4, "max_bad_rate": 0.2}
    straight, total = take(loader(shards, **config), 29), 58
    flat = list(itertools.chain(*straight))
    assert len(set(flat[:total])) == total
    for cut in range(1, 25):
        first, second, through = (loader(shards, **config) for _ in range(3))
        take(first, cut)
        second.load_state_dict(first.state_dict())
        assert take(second, 4) == straight[cut : cut + 4]
        take(through, cut + 4)
        assert first.bad + second.bad == through.bad


def test_damage_in_the_middle_of_a_file_counts_for_what_lies_behind_it(tmp_path):
    (shard,) = write_shards(tmp_path, [200])
    data = Path(shard).read_bytes()
    half = len(data) // 1024 * 512
    Path(shard).write_bytes(data[:half] + b"\x99" * 3072 + data[half + 3072 :])
    counter = BadSampleCounter(1.0)
    read = len(keys_of(shard, counter))
    assert 95 < read < 105 and 190 <= read + counter.bad <= 200


def test_what_broken_shards_lost_is_the_same_in_any_order(tmp_path):
    shards = write_shards(tmp_path, [200, 200, 200])
    for shard, part in zip(shards, (0.25, 0.5, 1), strict=True):
        data = Path(shard).read_bytes()
        Path(shard).write_bytes(data[: round(len(data) * part)])
    for order in itertools.permutations(shards):
        counter = BadSampleCounter(1.0)
        assert sum(len(keys_of(shard, counter)) for shard in order) + counter.bad == 600
    counter = BadSampleCounter(1.0)
    # the half one shows what the quarter lost
    assert sum(len(keys_of(shard, counter)) for shard in shards[:2]) + counter.bad >= 200
    assert counter.bad > 45


def test_samples_without_an_image_below_the_limit_do_not_stop_embedding(tmp_path):
    shards = without_images(tmp_path, [1000], {90, 95, 400, 600, 800})
    counter = BadSampleCounter(0.01)
    EmbeddingStore(tmp_path / "store").ensure(shards, FakeCLIP(), progress=False, counter=counter)
    assert (counter.seen, counter.bad) == (1000, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_progress_bar_counts_bad_samples_that_any_worker_met(tmp_path, workers):
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", [20] * 4, bad={3, 17, 30, 44, 45, 61, 70, 79})

    class Watching(Recorder):
        def training_step(self, batch, batch_idx):
            # a number of the host, which no device needs to be asked for
            assert SKIPPED not in batch
            return super().training_step(batch, batch_idx)

    progress = Progress(refresh_rate=1)
    data = data_of(ImageTextData, shards, num_workers=workers, max_bad_rate=0.2)
    module = Watching()
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=54,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[progress],
    )
    before = set(multiprocessing.active_children())
    # 54 batches of 4 are three passes over the 72 good samples
    trainer.fit(module, datamodule=data)
    assert set(multiprocessing.active_children()) <= before  # no worker outlives the training
    count = trainer.train_dataloader.bad
    readers = [
        ReaderOf(data.train_shards, 8, data.config, data.sample_transform(train=True))
        for _ in range(workers or 1)
    ]
    for place, reader in enumerate(readers):
        reader.place = place, len(readers)
    assert count == sum(
        sample[SKIPPED]
        for reader in readers
        for sample in itertools.islice(reader, 216 // len(readers))
    )
    assert isinstance(count, int) and 16 < count < 32
    shown = progress.train_progress_bar.postfix
    assert f"bad={count}" in shown and "loss=" in shown
    clean = loader(write_shards(tmp_path, [20] * 4), num_workers=workers)
    take(clean, 14)
    assert clean.bad == 0
