"""Several processes and killed ones fill one store."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.data.shardkit import FakeCLIP, write_shards
from tests.data.storekit import fill
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, [9, 4, 12])


def test_a_killed_run_goes_on_and_gives_the_same_rows(tmp_path, shards):
    fresh = fill(tmp_path / "fresh", shards)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "store", shards, FakeCLIP(die_after=15))
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2 and not list(
        (tmp_path / "store").glob(".*.tmp")
    )
    with pytest.raises(UserError, match="no whole embedding store"):
        verify(tmp_path / "store")
    second = FakeCLIP()
    store = fill(tmp_path / "store", shards, second)
    assert second.seen == 12
    for shard in shards:
        assert (
            store.path(shard).read_bytes() == (fresh.folder / store.path(shard).name).read_bytes()
        )
    assert store.manifest == fresh.manifest


class Logging(FakeCLIP):
    """Writes into a file how many images it has seen. It ends its process by SIGKILL at a batch, or
    just before a shard's file gets its name."""

    def __init__(self, log, batch: int | None, write: int | None) -> None:
        super().__init__()
        self.log, self.batch, self.write = log, batch, write

    def embed_images(self, images):
        with self.log.open("a") as file:
            print(len(images), file=file)
        if self.batch is not None:
            self.batch -= 1
            if self.batch < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_images(images)


def _fill_and_die(folder, shards, log, batch, write) -> None:
    torch.set_num_threads(1)
    if write is not None:
        names = iter(range(write))

        def replace(self, target, real=Path.replace):
            if target.suffix == ".safetensors" and next(names, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        Path.replace = replace
    fill(folder, shards, Logging(log, batch, write))


@pytest.mark.slow
def test_a_store_killed_three_times_ends_whole_and_does_no_shard_twice(tmp_path):
    shards = write_shards(tmp_path, [20] * 12)  # four batches a shard
    fresh = fill(tmp_path / "fresh", shards)
    store, log, done = EmbeddingStore(tmp_path / "store"), tmp_path / "seen.txt", 0
    context = multiprocessing.get_context("spawn")
    for batch, write, whole in ((6, None, 1), (None, 3, 4), (13, None, 7), (None, None, 12)):
        log.write_text("")
        process = context.Process(
            target=_fill_and_die, args=(store.folder, shards, log, batch, write)
        )
        process.start()
        process.join(120)
        assert process.exitcode == (0 if whole == 12 else -signal.SIGKILL)
        assert [store.is_done(shard) for shard in shards] == [True] * whole + [False] * (12 - whole)
        embedded = sum(map(int, log.read_text().split()))
        # the shards that were done already stayed as they were
        assert embedded <= 20 * (min(whole + 1, 12) - done)
        assert len(list(store.folder.glob(".*.tmp"))) == (write is not None)
        done = whole
    for shard in shards:
        assert (
            store.path(shard).read_bytes() == (fresh.folder / store.path(shard).name).read_bytes()
        )
    assert store.manifest == fresh.manifest and verify(store.folder, shards, FakeCLIP()) == []


def _ensure(folder, shards, queue) -> None:
    clip = FakeCLIP()
    fill(folder, shards, clip)
    queue.put(clip.seen)


@pytest.mark.slow
def test_two_processes_fill_one_store_and_share_the_work(tmp_path):
    shards = write_shards(tmp_path, [20] * 12)
    context = multiprocessing.get_context("spawn")  # torch threads do not survive a fork
    queue = context.Queue()
    processes = [
        context.Process(target=_ensure, args=(tmp_path / "store", shards, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    seen = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sum(seen) == 240
    assert verify(tmp_path / "store", shards) == []


def test_ranks_take_disjoint_shards_and_one_finishes(tmp_path, shards):
    clips = [FakeCLIP(), FakeCLIP()]
    for rank, clip in enumerate(clips):
        store = EmbeddingStore(tmp_path / "store")
        store.embed(shards[rank::2], clip, progress=False)
    assert [clip.seen for clip in clips] == [21, 4]
    assert not (tmp_path / "store" / "manifest.json").exists()
    store.finish(shards, clips[0])
    assert verify(store.folder, shards) == []


def test_what_another_process_embedded_meanwhile_is_not_counted(tmp_path, shards):
    class Meanwhile(FakeCLIP):
        def embed_images(self, images):
            if self.seen == 0:
                fill(tmp_path / "store", shards[1:2])
            return super().embed_images(images)

    store = EmbeddingStore(tmp_path / "store")
    assert store.ensure(shards, Meanwhile(), progress=False) == 2 and store.row_counts(shards) == [
        9,
        4,
        12,
    ]
    assert store.ensure(shards, FakeCLIP(), progress=False) == 0
