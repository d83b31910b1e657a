"""Full disks, read-only disks, and clocks that run backwards."""

import itertools
import os
import re
import time

import pytest
import torch

from tests.data.fitkit import data_of, fit
from tests.data.shardkit import FakeCLIP, write_shards
from tests.disk import enlarge, read_only, small_disk
from tests.training import toy
from unclip_pl.cluster.checkpoint_io import newest_checkpoint
from unclip_pl.data.openmoji import openmoji_shards
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.utils.errors import UserError


@pytest.mark.parametrize("may_mount", [True, False])
def test_a_store_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path, monkeypatch, may_mount
):
    if not may_mount:
        monkeypatch.setattr("tests.disk.mount", lambda *_: False)
    shards = write_shards(tmp_path, [150] * 4)
    with small_disk(tmp_path / "disk", "48k") as disk:
        store = EmbeddingStore(disk / "store")
        with pytest.raises(
            UserError,
            match=r"cannot be written \(the disk is full\): free space, or choose another folder",
        ) as error:
            store.ensure(shards, FakeCLIP(), progress=False)
        done = len(list(store.folder.glob("*.safetensors")))
        assert (
            "\n" not in str(error.value) and not list(store.folder.glob("*.tmp")) and 0 < done < 4
        )
        enlarge(disk, "4m")
        second = FakeCLIP()
        store.ensure(shards, second, progress=False)
        assert second.seen == 150 * (4 - done) and verify(store.folder, shards) == []


def test_a_whole_cache_may_be_read_only_and_one_that_is_not_says_so(tmp_path, monkeypatch):
    (tmp_path / "tars").mkdir()
    shards = write_shards(tmp_path / "tars", [9, 4])
    cache = tmp_path / "cache"
    store = EmbeddingStore(cache / "store")
    store.ensure(shards[:1], FakeCLIP(), progress=False)
    monkeypatch.setenv("UNCLIP_CACHE", str(cache))
    with read_only(cache), read_only(cache / "store") as folder:
        data = data_of(ImageEmbeddingData, shards[:1], store=folder)
        assert [len(keys) for keys in fit(data, tmp_path, 3).keys] == [4, 4, 4]
        uses = [
            lambda: EmbeddingStore(folder).ensure(shards, FakeCLIP(), progress=False),
            lambda: EmbeddingStore(cache / "new").ensure(shards, FakeCLIP()),
            lambda: openmoji_shards(32, progress=False),
        ]
        for use in uses:
            with pytest.raises(UserError, match=r"(read-only|no permission)\).*UNCLIP_CACHE"):
                use()


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "tars").mkdir()
    shards = write_shards(tmp_path / "tars", [9, 4])
    hours = itertools.count(1_900_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * 10**9)
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(shards, FakeCLIP(), 2)
    again = FakeCLIP()
    assert store.ensure(shards, again) == 0 and again.seen == 0 and verify(store.folder) == []
    toy.trainer(tmp_path / "run", NewestCheckpoint(2), steps=5).fit(toy.Toy(), toy.loader())
    assert newest_checkpoint(tmp_path / "run").name == "newest-step=5.ckpt"
    rates = [float(rate) for rate in re.findall(r"(\S+) images/s", capsys.readouterr().err)]
    assert rates and all(0 <= rate < 1e6 for rate in rates)


def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_its_time(tmp_path):
    for age, step in enumerate([30, 9, 100]):
        torch.save({}, tmp_path / f"newest-step={step}.ckpt")
        os.utime(tmp_path / f"newest-step={step}.ckpt", (2e9 - 1e6 * step - age,) * 2)
    assert newest_checkpoint(tmp_path).name == "newest-step=100.ckpt"
    (tmp_path / "copy").mkdir()
    for name in ("copy/newest-step=100.ckpt", "best-step=100.ckpt"):
        torch.save({}, tmp_path / name)
    for times in ((1, 2e9), (2e9, 1)):
        for name, moment in zip(
            ("newest-step=100.ckpt", "copy/newest-step=100.ckpt"), times, strict=True
        ):
            os.utime(tmp_path / name, (moment, moment))
        assert newest_checkpoint(tmp_path) == tmp_path / "newest-step=100.ckpt"
