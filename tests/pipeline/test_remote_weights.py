"""Releases and checkpoints in a bucket are read as those on a disk, whatever the server does."""

from pathlib import Path

import fsspec
import pytest
import torch

from tests.factories import package_decoder, write_checkpoint, write_release
from tests.remotekit import put
from unclip_pl.cli.unclip import main
from unclip_pl.pipeline.weights import load_pretrained, load_stage, read_weights
from unclip_pl.stages.decoder import Decoder
from unclip_pl.training.run_folder import find_checkpoint
from unclip_pl.training.trainer import check_options
from unclip_pl.utils import remote, remote_copies
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import cache_dir
from unclip_pl.utils.remote_copies import local_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK", 1 << 18)


@pytest.fixture
def decoder():
    return package_decoder()


def test_release_and_checkpoint_come_whole_through_faults(tmp_path, decoder, faults):
    release = write_release(tmp_path / "release", decoder, steps=7)
    checkpoint = write_checkpoint(tmp_path / "newest-step=7.ckpt", decoder)
    urls = {release: put(release, "runs/release"), checkpoint: put(checkpoint, "runs/a.ckpt")}
    for path, url in urls.items():
        faults.plan, faults.of, faults.methods = ["503", "cut", "slow"], "runs/", ("GET",)
        there, here = read_weights(url).tensors, read_weights(path).tensors
        assert not faults.plan and there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in here)
        load_pretrained(decoder, url)


def test_they_come_whole_from_google_and_the_hub_and_a_newer_one_is_seen(tmp_path, decoder, bucket):
    release = write_release(tmp_path / "release", decoder, steps=7)
    checkpoint = write_checkpoint(tmp_path / "newest-step=7.ckpt", decoder)
    for path, name in {release: "runs/release", checkpoint: "runs/a.ckpt"}.items():
        url = bucket.put(path, name)
        bucket.faults.of, bucket.faults.plan = "runs", ["", "503", "", "cut"] * 4
        there, here = read_weights(url).tensors, read_weights(path).tensors
        assert {"503", "cut"} <= set(bucket.faults.seen) and there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in here)
    assert find_checkpoint(f"resume:{url}", tmp_path).read_bytes() == Path(checkpoint).read_bytes()
    with torch.no_grad():
        next(decoder.parameters()).zero_()
    bucket.put(write_checkpoint(tmp_path / "b.ckpt", decoder), "runs/a.ckpt")
    assert next(iter(load_stage(url, Decoder).parameters())).eq(0).all()


def test_a_repository_of_the_hub_is_a_release(tmp_path, decoder, hf):
    release = write_release(tmp_path / "release", decoder, steps=7)
    hf.server.repositories["some-org/model"] = {
        str(path.relative_to(release)): path.read_bytes() for path in Path(release).iterdir()
    }
    there = read_weights("hf://some-org/model").tensors
    assert there.keys() == read_weights(release).tensors.keys()
    with pytest.raises(UserError, match="hf://some-org/nothing may not be read .*token"):
        read_weights("hf://some-org/nothing")


def test_a_copy_is_fetched_once_for_each_version(tmp_path, decoder, faults):
    path = write_checkpoint(tmp_path / "a.ckpt", decoder)
    url = put(path, "a.ckpt")
    read_weights(url)
    faults.requests.clear()
    read_weights(url)
    assert not [line for line in faults.requests if "bytes=" in line]
    with torch.no_grad():
        next(decoder.parameters()).zero_()
    put(write_checkpoint(tmp_path / "b.ckpt", decoder), "a.ckpt")
    assert next(iter(load_stage(url, Decoder).parameters())).eq(0).all()


def test_runs_resume_from_and_export_reads_a_checkpoint_there(tmp_path, decoder, faults, capsys):
    path = write_checkpoint(tmp_path / "newest-step=7.ckpt", decoder)
    url = put(path, "run/newest-step=7.ckpt")
    for option in (url, f"resume:{url}"):
        copy = find_checkpoint(option, tmp_path)
        assert copy.read_bytes() == Path(path).read_bytes() and copy.name == "newest-step=7.ckpt"
    main(["export", url, "--out", str(tmp_path / "release")])
    assert read_weights(tmp_path / "release").stage == "Decoder"


def test_what_is_bad_there_is_named(tmp_path, decoder, faults, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    with pytest.raises(UserError, match=r"There is no s3://bucket/none\.ckpt"):
        read_weights("s3://bucket/none.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(Path(write_checkpoint(tmp_path / "a.ckpt", decoder)).read_bytes()[:9999])
    with pytest.raises(UserError, match=r"s3/bucket/cut\.ckpt is no whole checkpoint"):
        read_weights(put(cut, "cut.ckpt"))
    url = put(tmp_path / "a.ckpt", "a.ckpt")
    faults.always, faults.of, faults.methods = "cut", "a.ckpt", ("GET",)
    with pytest.raises(UserError, match=r"s3://bucket/a\.ckpt failed 2 times"):
        read_weights(url)
    assert not list(cache_dir().rglob("a.ckpt"))


def test_what_is_not_written_there_is_refused():
    with pytest.raises(UserError, match="--mirror gs://bucket/run"):
        check_options({"default_root_dir": "gs://bucket/run"})
    with pytest.raises(UserError, match="is remote"):
        local_folder("s3://bucket/out")


@pytest.mark.parametrize("part", ["../../../x", "a/../../x", "/x"])
def test_an_object_whose_name_leads_out_of_the_cache_is_refused(part, monkeypatch):
    found = {"config.json": "memory://model/config.json", part: "memory://model/x"}
    monkeypatch.setattr(remote_copies, "find_below", lambda url: found)
    with pytest.raises(UserError, match="is no place in a folder"):
        remote_copies.local_path("memory://model")


def test_a_folder_that_changes_while_it_is_read_is_not_kept(monkeypatch):
    files = fsspec.filesystem("memory")
    files.pipe({"/changing/a": b"old", "/changing/b": b"old"})
    read = remote_copies.open_remote

    def replaced(url):
        opened = read(url)
        files.pipe("/changing/a", b"newer")
        return opened

    monkeypatch.setattr(remote_copies, "open_remote", replaced)
    with pytest.raises(UserError, match="was changed while it was read"):
        remote_copies.local_path("memory://changing")
    assert not list(cache_dir().rglob("a"))
    copy = remote_copies.local_path("memory://changing")  # which has settled
    assert ((copy / "a").read_bytes(), (copy / "b").read_bytes()) == (b"newer", b"old")
