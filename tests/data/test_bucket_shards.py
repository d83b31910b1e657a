"""Shards in a bucket: patterns, ranges, faults of the server, names of what is bad."""

import itertools
import logging
from pathlib import Path

import pytest

from tests.data.loaderkit import keys_of, loader, take
from tests.data.shardkit import FakeCLIP, picture, write_shards, write_tar
from tests.data.storekit import fill
from tests.remotekit import put
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.names import expand
from unclip_pl.data.shard_rows import describe_shard
from unclip_pl.data.shards import count_samples
from unclip_pl.data.verify import verify
from unclip_pl.utils import remote
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path, faults):
    """(local shards, their URLs)"""
    (tmp_path / "data").mkdir()
    here = write_shards(tmp_path / "data", [9, 4, 12])
    return here, [put(shard, f"data/{shard[-9:]}") for shard in here]


def test_braces_globs_folders_and_names_mean_the_same_shards(shards):
    _, there = shards
    put(shards[0][0], "data/.hidden.tar")
    put(shards[0][0], "data/deeper/00000.tar")
    for spec in ("data/{00000..00002}.tar", "data/*.tar", "data", "data/", "data/0000[0-2].tar"):
        assert expand(f"s3://bucket/{spec}") == there, spec
    assert expand(there[:1]) == there[:1]
    for spec, text in {
        "other/*.tar": "There is no shard s3://bucket/other/",
        "nothing": "There are no .tar files in s3://bucket/nothing",
    }.items():
        with pytest.raises(UserError, match=text):
            expand(f"s3://bucket/{spec}")


def test_samples_and_counts_are_those_of_the_files(shards):
    here, there = shards
    for local, url in zip(here, there, strict=True):
        assert keys_of(url, BadSampleCounter(0)) == keys_of(local, BadSampleCounter(0))
        assert count_samples(url) == count_samples(local)


def test_workers_read_every_sample(shards):
    here, there = shards
    keys = sorted(set(itertools.chain(*take(loader(there, steps=12, num_workers=2), 12))))
    assert keys == sorted(set(itertools.chain(*take(loader(here, steps=12, num_workers=2), 12))))


@pytest.mark.parametrize("fault", ["503", "slow", "cut"])
def test_faults_that_pass_lose_nothing(shards, faults, monkeypatch, caplog, fault):
    here, there = shards
    monkeypatch.setattr(remote, "BLOCK", 1 << 13)  # many ranges
    faults.plan, faults.of = [fault, fault, ""] * 2, "00002.tar"
    counter = BadSampleCounter(0)
    with caplog.at_level(logging.WARNING):
        assert keys_of(there[2], counter) == keys_of(here[2], BadSampleCounter(0))
    assert faults.seen == [fault] * 4 and counter.bad == 0
    named = [line for line in caplog.messages if there[2] in line and "tried again" in line]
    assert bool(named) == (fault != "slow")
    ranges = [line for line in faults.requests if "bytes=" in line]
    assert len(set(ranges)) > 3


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_an_object_that_stays_bad_is_named_and_never_taken_for_a_shorter_one(
    shards, faults, monkeypatch, fault
):
    _, there = shards
    monkeypatch.setattr(remote, "TRIES", 3)
    faults.always, faults.of, faults.methods = fault, "00001.tar", ("GET",)
    assert len(keys_of(there[0], BadSampleCounter(0))) == 9
    for read in (lambda url: keys_of(url, BadSampleCounter(1.0)), count_samples):
        with pytest.raises(UserError, match=r"s3://bucket/data/00001\.tar failed 3 times"):
            read(there[1])
    with pytest.raises(UserError, match=r"00001\.tar failed 3 times"):
        take(loader(there, steps=12, num_workers=2), 12)


def test_a_missing_object_and_a_missing_bucket_are_named(shards, faults):
    faults.requests.clear()
    with pytest.raises(UserError, match=r"The shard s3://bucket/data/00009\.tar is gone"):
        keys_of("s3://bucket/data/00009.tar", BadSampleCounter(1.0))
    assert len(faults.requests) < 5  # nothing is tried again that cannot pass
    with pytest.raises(UserError, match=r"s3://nobody/a\.tar cannot be read \(there is no such"):
        describe_shard("s3://nobody/a.tar")


def test_a_damaged_object_counts_as_a_damaged_file_does(shards, tmp_path):
    here, _ = shards
    damaged = tmp_path / "damaged.tar"
    content = Path(here[2]).read_bytes()
    half = len(content) // 2
    damaged.write_bytes(content[:half] + b"x" * half)
    url, file, there = put(damaged, "damaged.tar"), BadSampleCounter(1.0), BadSampleCounter(1.0)
    assert keys_of(url, there) == keys_of(str(damaged), file)
    assert there.bad == file.bad > 0


def test_another_object_of_the_same_name_is_seen(shards, tmp_path):
    _, there = shards
    before = describe_shard(there[0])
    assert before == describe_shard(there[0]) and before["size"] > 0
    files = {f"{n:06d}.png": picture(n + 100) for n in range(9)}
    put(write_tar(tmp_path / "new.tar", files), "data/00000.tar")
    assert describe_shard(there[0])["digest"] != before["digest"]


def test_a_killed_embedding_job_goes_on_and_loses_no_row(shards, faults, tmp_path):
    here, there = shards
    faults.plan, faults.of, faults.methods = ["503", "", "cut", "slow"] * 2, ".tar", ("GET",)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "store", there, FakeCLIP(die_after=15))
    second = FakeCLIP()
    store, local = fill(tmp_path / "store", there, second), fill(tmp_path / "local", here)
    assert second.seen == 12 and "503" in faults.seen and "cut" in faults.seen
    for url, path in zip(there, here, strict=True):
        rows, expected = store.shard(url), local.shard(path)
        assert rows.keys == expected.keys
        assert (rows.image_embed == expected.image_embed).all()
        assert (rows.tokens == expected.tokens).all()
    assert verify(store.folder) == []


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_one_sentence(monkeypatch, scheme, package):
    import fsspec

    def missing(*_, **__):
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match=f"needs a package for {scheme}://.*pip install {package}"):
        expand(f"{scheme}://bucket/*.tar")
