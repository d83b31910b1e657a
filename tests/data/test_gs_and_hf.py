"""Shards on the hub, and shards and stores in Google Cloud Storage, are read as those in S3 are."""

import itertools
import logging

import pytest

from tests.data.fitkit import data_of, fit
from tests.data.loaderkit import keys_of, loader, take
from tests.data.shardkit import FakeCLIP, write_shards
from tests.data.storekit import fill
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.names import expand
from unclip_pl.data.shard_rows import describe_shard
from unclip_pl.data.shards import count_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.utils import remote
from unclip_pl.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def here(tmp_path):
    (tmp_path / "data").mkdir()
    return write_shards(tmp_path / "data", [9, 4, 12, 5])


@pytest.fixture
def there(here, bucket):
    return [bucket.put(shard, f"data/{shard[-9:]}") for shard in here]


def test_braces_globs_folders_and_names_mean_the_same_shards(here, there, bucket):
    bucket.put(here[0], "data/.hidden.tar")
    bucket.put(here[0], "data/deeper/00000.tar")
    for spec in ("data/{00000..00003}.tar", "data/*.tar", "data", "data/0000[0-3].tar"):
        assert expand(f"{bucket.url}/{spec}") == there, spec
    for spec, text in {
        "other/*.tar": "There is no shard .*/other/",
        "nothing": "There are no .tar files in .*/nothing",
    }.items():
        with pytest.raises(UserError, match=text):
            expand(f"{bucket.url}/{spec}")


def test_workers_read_every_sample_and_counts_are_the_same(here, there):
    assert [count_samples(url) for url in there] == [9, 4, 12, 5]
    keys = sorted(set(itertools.chain(*take(loader(there, steps=16, num_workers=2), 16))))
    assert keys == sorted(set(itertools.chain(*take(loader(here, steps=16, num_workers=2), 16))))


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_faults_lose_nothing_or_are_named(here, there, bucket, monkeypatch, fault):
    monkeypatch.setattr(remote, "BLOCK", 1 << 13)  # many ranges
    faults = bucket.faults
    faults.plan, faults.of = [fault, fault, ""] * 8, "00002.tar"
    counter = BadSampleCounter(0)
    assert keys_of(there[2], counter) == keys_of(here[2], BadSampleCounter(0))
    assert counter.bad == 0 and len(faults.seen) > 2
    ranges = [line for line in faults.requests if "bytes=" in line]
    assert len(set(ranges)) > 3
    monkeypatch.setattr(remote, "TRIES", 2)
    faults.plan, faults.always = [], fault
    assert len(keys_of(there[0], BadSampleCounter(0))) == 9
    with pytest.raises(UserError, match=r"data/00002\.tar failed 2 times"):
        keys_of(there[2], BadSampleCounter(1.0))


def test_no_byte_is_asked_for_twice(there, bucket):
    bucket.faults.requests.clear()
    with remote.open_remote(there[0], 1 << 14) as file:
        assert file.read() == bucket.objects["data/00000.tar"]
    ranges = [line.rpartition("bytes=") for line in bucket.faults.requests]
    asked = [last.split("-") for _, found, last in ranges if found]
    assert sum(int(end) - int(start) + 1 for start, end in asked) == file.raw.size


def test_what_may_not_be_read_is_said_at_once(there, bucket, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(UserError, match=r"The shard .*/00009\.tar is gone"):
        keys_of(f"{bucket.url}/data/00009.tar", BadSampleCounter(1.0))
    bucket.server.refuses, bucket.server.gated = 403, True
    with pytest.raises(UserError, match=r"00000\.tar may not be read .*credentials"):
        keys_of(there[0], BadSampleCounter(1.0))
    bucket.server.refuses = 401
    with pytest.raises(UserError, match="credentials"):
        expand(f"{bucket.url.replace('some-org', 'nobody')}/data/*.tar")
    assert "tried again" not in caplog.text


def test_another_object_of_the_same_name_is_seen(here, there, bucket, monkeypatch):
    before = describe_shard(there[0])
    assert describe_shard(there[0]) == before
    bucket.put(here[1], "data/00000.tar")
    monkeypatch.setattr(remote, "LISTING_AGE", 0.0)
    assert describe_shard(there[0])["digest"] != before["digest"]


def test_decoders_train_from_shards_there(here, there, tmp_path):
    local = fill(tmp_path / "local", here)
    remote_run = fit(
        data_of(ImageEmbeddingData, there, store=fill(tmp_path / "store", there).folder),
        tmp_path / "there",
        3,
    )
    local_run = fit(data_of(ImageEmbeddingData, here, store=local.folder), tmp_path / "here", 3)
    assert remote_run.keys == local_run.keys and len(local_run.keys) == 3


def test_a_killed_embedding_job_goes_on_in_google_cloud_storage(here, gs, tmp_path):
    store = f"{gs.url}/store"
    gs.faults.plan = ["503", "", "cut", "", "503"] * 8
    with pytest.raises(KeyboardInterrupt):
        fill(store, here, FakeCLIP(die_after=15))
    assert {"503", "cut"} <= set(gs.faults.seen)
    second = FakeCLIP()
    there, local = fill(store, here, second), fill(tmp_path / "local", here)
    assert second.seen < 30 and there.manifest == local.manifest and verify(store) == []
    for shard in here:
        rows, expected = there.shard(shard), local.shard(shard)
        assert rows.keys == expected.keys
        for name in ("image_embed", "text_embed", "tokens"):
            assert (getattr(rows, name) == getattr(expected, name)).all()
    runs = [
        fit(data_of(PriorData, here, store=folder), tmp_path / name, 3)
        for name, folder in {"there": store, "here": local.folder}.items()
    ]
    assert runs[0].keys == runs[1].keys and len(runs[0].keys) == 3


def test_a_bad_object_of_a_store_is_named(here, gs, hf, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    local = fill(tmp_path / "local", here)
    for place in (gs, hf):
        store = EmbeddingStore(place.put(local.folder, "store"))
        assert store.row_counts(here) == [9, 4, 12, 5]
        place.faults.of, place.faults.always = local.file_of(here[1]), "cut"
        with pytest.raises(UserError, match=f"{local.file_of(here[1])} failed 2 times"):
            store.shard(here[1])
    with pytest.raises(UserError, match="hf://.* cannot be written to"):
        fill(f"{hf.url}/new", here)


def test_an_object_is_created_once_and_large_ones_come_whole(gs, tmp_path):
    url, file = f"{gs.url}/lease", tmp_path / "large"
    assert remote.create(url, b"ours") and not remote.create(url, b"theirs")
    assert remote.read(url) == b"ours"
    file.write_bytes(bytes(range(256)) * (6 << 12))  # from 5 MB on they go in parts
    gs.faults.of, gs.faults.plan = "upload", ["", "503", "cut"]
    remote.upload(f"{gs.url}/large", file)
    assert gs.objects["large"] == file.read_bytes() and not gs.faults.plan
    remote.delete(url)
    remote.delete(url)
    assert list(gs.objects) == ["large"]
