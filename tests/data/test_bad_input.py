"""What goes wrong with a user's data: damaged tars, keys that are there twice, old manifests."""

import gzip
import json
from pathlib import Path

import pytest

from tests.data.fitkit import data_of
from tests.data.loaderkit import keys_of
from tests.data.shardkit import FakeCLIP, picture, write_shards, write_tar
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.shards import count_samples, raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.utils.errors import UserError


@pytest.mark.parametrize("packed", [False, True])
def test_damage_anywhere_in_a_tar_is_named_and_counted(tmp_path, packed, caplog):
    pack = gzip.compress if packed else bytes
    (shard,) = write_shards(tmp_path, [20])
    whole = Path(shard).read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    # tarfile takes such a header for the end
    damaged = [whole[:at] + b"\x99" * 512 + whole[at + 512 :] for at in headers[3::9]]
    cut = [whole[:at] for at in (headers[5], headers[5] + 300, headers[-1], headers[-1] + 700)]
    for data, images in [
        *((data, 19) for data in damaged),
        *zip(cut, (1, 1, 20, 20), strict=True),
    ]:  # what ends is a .json that nobody needs
        Path(shard).write_bytes(pack(data))
        caplog.clear()
        counter = BadSampleCounter(1.0)
        assert len(keys_of(shard, counter)) <= images
        assert counter.bad >= 1
        assert any("is no whole tar" in line for line in caplog.messages)
        with pytest.raises(UserError, match="is no whole tar"):
            count_samples(shard)
    for length in (0, 1, 5, 11, 40) if packed else (0, 1, 100, 511):
        Path(shard).write_bytes(pack(whole)[:length])
        counter = BadSampleCounter(1.0)
        assert keys_of(shard, counter) == [] and counter.bad == 1


def test_of_doubled_keys_the_first_is_taken_and_the_rest_named(tmp_path, caplog):
    files = {"a.png": picture(1), "a.txt": b"first", "b.png": picture(2), "./a.png": picture(9)}
    files |= {"c.png": picture(3), "c.PNG": picture(8), "c.txt": b"c"}
    shard = write_tar(tmp_path / "a.tar", files)
    again = write_shards(tmp_path, [2])[0]
    data = Path(again).read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    # every sample twice: the tar is appended to itself
    Path(again).write_bytes(data + data + bytes(1024))
    counter = BadSampleCounter(1.0)
    found = {sample["key"]: sample for sample in raw_samples(shard, counter)}
    assert found["a"]["caption"] == "first"
    assert found["c"]["image"] == picture(3)
    assert counter.bad == len(caplog.messages)
    assert any("the second of the name c.PNG" in line for line in caplog.messages)
    caplog.clear()
    assert keys_of(again, counter) == ["000000", "000001"]
    assert [
        f"sample 00000{n} of {again}" in line and "has the same key" in line
        for n, line in enumerate(caplog.messages)
    ] == [True, True]
    store = EmbeddingStore(tmp_path / "store")
    store.ensure([again], FakeCLIP(), progress=False, counter=BadSampleCounter(1.0))
    assert store.row_counts([again]) == [2] and verify(store.folder) == []


def test_embeddings_without_their_images_are_left_over(tmp_path):
    shards = write_shards(tmp_path, [9, 8])
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(shards, FakeCLIP(), progress=False)
    write_tar(tmp_path / "00001.tar", {f"{n:06d}.png": picture(n) for n in (9, 12, 16)})
    assert sum("has no image" in line for line in verify(store.folder)) == 5
    data = data_of(ImageEmbeddingData, shards, shards[1:], tmp_path / "store", max_bad_rate=0.0)
    data.setup("fit")  # as on a rank that finds the store as it is
    seen = [key for _ in range(2) for batch in data.train_dataloader() for key in batch["key"]]
    assert set(seen) <= {f"{n:06d}" for n in (*range(9), 9, 12, 16)} and len(seen) == 2 * 4 * (
        17 // 4
    )
    assert [key for batch in data.val_dataloader() for key in batch["key"]] == [
        "000009",
        "000012",
        "000016",
    ]


def test_a_manifest_of_another_version_is_refused_before_any_work(tmp_path):
    shards = write_shards(tmp_path, [9, 4])
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(shards[:1], FakeCLIP(), progress=False)
    path = store.folder / "manifest.json"
    good = path.read_text()
    path.write_text(json.dumps({"format": 7, "tables": []}))
    clip = FakeCLIP()
    for use in (
        lambda: store.ensure(shards, clip, progress=False),
        lambda: store.finish(shards[:1], clip),
        lambda: verify(store.folder),
    ):
        with pytest.raises(UserError, match="has format 7, this version reads 1: fill a new one"):
            use()
    assert clip.seen == 0 and json.loads(path.read_text())["format"] == 7
    for damaged in ("", good[:50], "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="no whole embedding store"):
            verify(store.folder)
        store.ensure(shards[:1], clip, progress=False)
        assert path.read_text() == good and clip.seen == 0
    (store.folder / "clip.json").write_text("{")
    with pytest.raises(UserError, match=r"clip\.json cannot be read .* fill a new store"):
        store.ensure(shards, clip, progress=False)
