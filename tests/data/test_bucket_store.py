"""An embedding store in a bucket is filled and read as one on a disk, whatever the server does."""

import json

import pytest

from tests.data.fitkit import data_of, fit
from tests.data.shardkit import FakeCLIP, write_shards
from tests.data.storekit import fill
from tests.remotekit import names_below, put
from unclip_pl.cli.unclip import main
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.data import store_files
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.text_tokens import ensure_text_tokens, read_text_tokens
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.utils import remote
from unclip_pl.utils.errors import UserError

STORE = "s3://bucket/store"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "data").mkdir()
    return write_shards(tmp_path / "data", [9, 4, 12])


def test_a_killed_job_goes_on_there_and_loses_no_row(shards, faults, tmp_path):
    tars = [put(shard, f"data/{shard[-9:]}") for shard in shards]
    faults.plan = ["503", "", "cut", "slow", "", "503"] * 8
    with pytest.raises(KeyboardInterrupt):
        fill(STORE, tars, FakeCLIP(die_after=15))
    assert {"503", "cut", "slow"} <= set(faults.seen)
    assert len([name for name in names_below("store") if name.endswith(".safetensors")]) == 2
    second = FakeCLIP()
    store, local = fill(STORE, tars, second), fill(tmp_path / "local", tars)
    assert second.seen == 12 and store.manifest == local.manifest
    for tar in tars:
        rows, expected = store.shard(tar), local.shard(tar)
        assert rows.keys == expected.keys and rows.source == expected.source
        for name in ("image_embed", "text_embed", "tokens"):
            assert (getattr(rows, name) == getattr(expected, name)).all()
    there, here = store.statistics(), local.statistics()
    assert there.count == 25 and there.covariance.equal(here.covariance)
    third = FakeCLIP()
    fill(STORE, tars, third)
    assert third.seen == 0 and verify(STORE) == [] and main(["data", "verify", STORE]) == 0


def test_decoders_and_priors_train_from_it(shards, faults, tmp_path):
    local = fill(tmp_path / "local", shards)
    put(local.folder, "store")
    for kind, workers in ((ImageEmbeddingData, 2), (PriorData, 0)):
        loader = {"num_workers": workers} if kind is ImageEmbeddingData else {}
        there = fit(data_of(kind, shards, store=STORE, **loader), tmp_path / "there", 3)
        here = fit(data_of(kind, shards, store=local.folder, **loader), tmp_path / "here", 3)
        assert there.keys == here.keys and len(there.keys) == 3


def test_what_needs_a_part_reads_a_part(tmp_path, faults, monkeypatch):
    (tmp_path / "data").mkdir()
    shards = write_shards(tmp_path / "data", [150, 145])
    put(fill(tmp_path / "local", shards).folder, "store")
    store = EmbeddingStore(STORE)
    first, second = (remote.stat(store.path(shard)).size for shard in shards)
    faults.requests.clear()
    assert len(store.shard(shards[0]).keys) == 150 and bytes_read(faults, store, shards) == first
    monkeypatch.setattr("unclip_pl.data.shard_rows.HEADER_BLOCK", second // 4)
    faults.requests.clear()
    assert store.row_counts(shards[1:]) == [145]
    assert 0 < bytes_read(faults, store, shards) < second


def bytes_read(faults, store, shards) -> int:
    """How many bytes of the shards' rows were asked for."""
    names = [store.file_of(shard) for shard in shards]
    lines = [line for line in faults.requests if any(name in line for name in names)]
    ranges = [line.rpartition("bytes=")[2].split("-") for line in lines if "bytes=" in line]
    return sum(int(last) - int(first) + 1 for first, last in ranges)


def test_captions_of_another_length_lie_there_too(shards, faults):
    store = fill(STORE, shards)
    assert (
        ensure_text_tokens(store, shards, 80)
        == 3
        == len([name for name in names_below("store") if ".text-80." in name])
    )
    assert ensure_text_tokens(EmbeddingStore(STORE), shards, 80) == 0
    assert read_text_tokens(store, shards[0], 80).shape == (9, 80)


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_an_object_that_stays_bad_is_named(shards, faults, monkeypatch, fault):
    monkeypatch.setattr(remote, "TRIES", 2)
    store = fill(STORE, shards)
    faults.of, faults.always = store.file_of(shards[1]), fault
    with pytest.raises(UserError, match=f"{store.file_of(shards[1])} failed 2 times"):
        EmbeddingStore(STORE).shard(shards[1])
    faults.of, faults.always = "new", "503"
    with pytest.raises(UserError, match="new/.* failed 2 times"):
        fill("s3://bucket/new", shards)
    faults.always = None
    assert fill("s3://bucket/new", shards).row_counts(shards) == [9, 4, 12]


def test_places_that_cannot_be_written_to_are_refused(shards, faults):
    with pytest.raises(UserError, match=r"memory://store cannot be written to"):
        fill("memory://store", shards)
    with pytest.raises(UserError, match=r"no whole embedding store"):
        EmbeddingStore("s3://bucket/none").manifest
    with pytest.raises(UserError, match=r"no whole rows for"):
        EmbeddingStore("s3://bucket/none").shard(shards[0])


def test_of_two_that_claim_it_at_one_time_one_is_refused(shards, faults, monkeypatch):
    create = store_files.create

    def late_create(url, content):
        remote.upload(
            url, json.dumps(FakeCLIP(seed=9).fingerprint()).encode()
        )  # by another machine
        return create(url, content)

    monkeypatch.setattr(store_files, "create", late_create)
    with pytest.raises(ClipMismatch, match=STORE):
        fill(STORE, shards, FakeCLIP())
    assert names_below("store") == ["clip.json"]
