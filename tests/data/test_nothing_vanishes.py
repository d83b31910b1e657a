"""Every file in a tar is used, or counted and named: keys with dots, links, tars put together."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from tests.data.loaderkit import keys_of
from tests.data.shardkit import FakeCLIP, picture, write_shards, write_tar
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.shards import count_samples, raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import images_in, verify


def found(shard: str, counter: BadSampleCounter) -> dict[str, str]:
    return {sample["key"]: sample["caption"] for sample in raw_samples(shard, counter)}


def test_keys_with_dots_are_keys(tmp_path):
    files = {}
    for n in range(300):
        files |= {f"{n:06d}.png": picture(n), f"{n:06d}.txt": b"plain"}
    for n in range(200):
        files |= {f"v1.5/photo.{n:04d}.PNG": picture(n), f"v1.5/photo.{n:04d}.txt": b"dotted"}
    shard = write_tar(tmp_path / "a.tar", files)
    counter = BadSampleCounter(0)
    captions = found(shard, counter)
    assert len(captions) == 500 == count_samples(shard) and counter.bad == 0
    assert captions["v1.5/photo.0199"] == "dotted" and captions["000299"] == "plain"
    store = EmbeddingStore(tmp_path / "store")
    store.ensure([shard], FakeCLIP(), progress=False)
    notes = []
    assert store.row_counts([shard]) == [500] and verify(store.folder, notes=notes) == notes == []


@pytest.mark.parametrize(
    ("files", "captions", "bad"),
    [
        (["a.input.jpg", "a.txt", "b.input.jpg", "b.txt"], {"a": "a.txt", "b": "b.txt"}, 0),
        (["a.jpg", "a.mask.png", "a.txt"], {"a": "a.txt"}, 0),
        (["a.input.jpg", "a.target.jpg", "a.txt"], {}, 2),
        (["a.input.jpg", "a.target.jpg"], {"a.input": "", "a.target": ""}, 0),
        (["a.png", "a.txt", "a.1.png", "a.1.txt"], {"a": "a.txt", "a.1": "a.1.txt"}, 0),
        (["a.1.png", "a.1.txt", "a.2.txt"], {"a.1": "a.1.txt"}, 1),
        (["a.png", "b.png", "a.txt", "b.txt"], {"a": "", "b": ""}, 2),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_what_stands_between_key_and_ending_is_understood_or_named(
    tmp_path, caplog, files, captions, bad
):
    content = {name: name.encode() if name.endswith("txt") else picture(1) for name in files}
    shard = write_tar(tmp_path / "x.tar", content)
    counter = BadSampleCounter(1.0)
    assert found(shard, counter) == captions and counter.bad == bad
    assert count_samples(shard) == len(captions)
    assert ("not read (mask.png 1)" in caplog.text) == ("a.mask.png" in files)
    assert ("lies apart" in caplog.text) == (files[:2] == ["a.png", "b.png"])


def test_links_hidden_files_and_files_of_other_endings_are_counted_and_named(tmp_path, caplog):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "._a.png", "a.npy", "b.npy", "README", "x/.git/b.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            tar.addfile(info, io.BytesIO(picture(1)))
        for name, kind in {"b.png": tarfile.LNKTYPE, "c.png": tarfile.SYMTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        info = tarfile.TarInfo("d.png")
        info.type = tarfile.FIFOTYPE
        tar.addfile(info)
    counter = BadSampleCounter(1.0)
    assert keys_of(str(path), counter) == ["a"] and counter.bad == 3
    for key, reason in {"b": "hard link to a.png", "c": "symbolic link", "d": "pipe"}.items():
        assert any(f"sample {key} of" in line and reason in line for line in caplog.messages), key
    unread = next(line for line in caplog.messages if "are not read" in line)
    assert all(part in unread for part in ("5 files", "npy 2", "hidden files 2", "ending 1"))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_tars_put_one_behind_the_other_are_all_read(tmp_path, pack):
    shards = write_shards(tmp_path, [5, 7])
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(pack(Path(shard).read_bytes()) for shard in shards))
    assert len(keys_of(str(both), BadSampleCounter(0))) == count_samples(str(both)) == 12
    if pack is gzip.compress:
        return
    cut = tmp_path / "cut.tar"
    cut.write_bytes(both.read_bytes()[: len(Path(shards[0]).read_bytes()) + 5 * 512])
    counter = BadSampleCounter(1.0)
    assert 5 <= len(keys_of(str(cut), counter)) < 12 and counter.bad == 1


def test_verify_counts_the_pictures_itself(tmp_path, monkeypatch):
    files = {f"{n}.png": picture(n) for n in range(9)} | {"9.png": b"", "a.mask.png": picture(1)}
    shard = write_tar(tmp_path / "a.tar", files | {"a.png": picture(2), "a.txt": b"a"})
    store = EmbeddingStore(tmp_path / "store")
    store.ensure([shard], FakeCLIP(), progress=False, counter=BadSampleCounter(1.0))
    notes = []
    assert len(images_in(shard)) == 12 and verify(store.folder, notes=notes) == []
    assert ["9 of" in notes[0], "1 pictures" in notes[1], "a.mask.png" in notes[1]] == [True] * 3
    forgetful = [
        sample for sample in raw_samples(shard, BadSampleCounter(1)) if sample["key"] < "3"
    ]
    rows = store.shard(shard)
    monkeypatch.setattr("unclip_pl.data.verify.read_shard", lambda *_, **__: iter(forgetful))
    monkeypatch.setattr("unclip_pl.data.verify.ShardRows.open", lambda path: rows)
    problems = verify(store.folder, notes=[])
    assert any("holds 9 pictures that no sample has the name of" in line for line in problems)
