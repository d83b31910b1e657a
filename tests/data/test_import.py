"""Embeddings made elsewhere are taken over by key into a whole store."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.importkit import (
    COUNTS,
    WideCLIP,
    embedded,
    in_tars,
    into,
    unit,
    write_import_shards,
    write_retrieval,
)
from tests.data.shardkit import write_tar
from unclip_pl.cli import unclip as app
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.import_embeddings import import_embeddings
from unclip_pl.data.import_sources import RetrievalFolder, TarMembers
from unclip_pl.data.shards import raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_import_shards(tmp_path)


@pytest.mark.parametrize("text", [False, True])
def test_a_folder_of_clip_retrieval_gives_the_store_that_embedding_gives(tmp_path, shards, text):
    clip = WideCLIP()
    folder = write_retrieval(tmp_path / "cr", embedded(shards, clip), parts=3, text=text)
    clip.seen = 0
    store = into(tmp_path, shards, RetrievalFolder(folder), clip)
    assert clip.seen == 8 + 4 + 8  # only the samples to compare
    assert verify(store.folder, shards, WideCLIP()) == []
    fresh = EmbeddingStore(tmp_path / "fresh")
    fresh.ensure(shards, WideCLIP(), 5, progress=False)
    assert store.manifest == fresh.manifest
    for shard in shards:
        ours, theirs = store.shard(shard), fresh.shard(shard)
        assert ours.keys == theirs.keys and np.array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(
            np.float32(ours.image_embed), np.float32(theirs.image_embed), rtol=2e-3, atol=2e-3
        )
        np.testing.assert_allclose(
            np.float32(ours.text_embed), np.float32(theirs.text_embed), rtol=2e-3, atol=2e-3
        )
    np.testing.assert_allclose(
        store.statistics().mean, fresh.statistics().mean, rtol=1e-2, atol=1e-3
    )


def test_the_rows_are_taken_over_and_not_computed(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    moved = {
        key: [image * np.float16(1.01), text * np.float16(0.99)]
        for key, (image, text) in rows.items()
    }
    store = into(
        tmp_path, shards, RetrievalFolder(write_retrieval(tmp_path / "cr", moved, text=True))
    )
    for shard in shards:
        mine = store.shard(shard)
        for i, key in enumerate(mine.keys):
            assert np.array_equal(mine.image_embed[i], moved[key][0]) and np.array_equal(
                mine.text_embed[i], moved[key][1]
            )


@pytest.mark.parametrize(
    "image, text, source",
    [
        ("img_emb.npy", None, ()),
        ("npy", None, (".npy",)),
        ("clip_i.npy", "clip_t.npy", ("clip_i.npy", "clip_t.npy")),
    ],
)
def test_members_of_the_tars_are_taken_over(tmp_path, shards, image, text, source):
    # (1, D) float32 as well
    rows = {
        key: [one[None].astype(np.float32), two]
        for key, (one, two) in embedded(shards, WideCLIP()).items()
    }
    in_tars(tmp_path, shards, rows, image, text)
    store = into(tmp_path, shards, TarMembers(*source))
    assert verify(store.folder, shards, WideCLIP()) == [] and store.manifest["rows"] == sum(COUNTS)
    mine = store.shard(shards[2])
    assert all(
        np.array_equal(mine.image_embed[i], rows[key][0][0]) for i, key in enumerate(mine.keys)
    )
    np.testing.assert_allclose(
        np.float32(mine.text_embed),
        np.float32([rows[key][1] for key in mine.keys]),
        rtol=2e-3,
        atol=2e-3,
    )


def test_the_command_makes_a_store_that_verifies_and_trains(tmp_path, capsys):
    """With the CLIP in the package, whole: import, verify, one batch of the DataModule."""
    clip, files, rows = FrozenCLIP(), {}, {}
    for n in range(12):
        file = io.BytesIO()
        colours = np.random.default_rng(n).integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(colours).resize((80, 64)).save(file, "PNG")
        files |= {f"{n:03d}.png": file.getvalue(), f"{n:03d}.txt": b"a red cat"}
        rows[f"{n:03d}"] = [clip.embed_images(decode(file.getvalue(), 64)[None])[0].half().numpy()]
    shard = write_tar(tmp_path / "0.tar", files)
    folder, store = write_retrieval(tmp_path / "cr", rows), tmp_path / "store"
    options = ["--store", str(store), "--shards", shard, "--device", "cpu"]
    assert app.main(["data", "import", str(folder), *options]) == 0
    assert "has 12 rows" in capsys.readouterr().out
    assert app.main(["data", "verify", str(store)]) == 0
    data = ImageEmbeddingData(train=shard, val=None, store=str(store), image_size=64)
    before = EmbeddingStore(store).path(shard).stat().st_mtime_ns
    data.prepare_data()
    assert EmbeddingStore(store).path(shard).stat().st_mtime_ns == before
    assert np.array_equal(EmbeddingStore(store).shard(shard).image_embed[3], rows["003"][0])


def test_options_of_the_other_kind_of_source_are_refused(tmp_path, shards, capsys):
    folder = tmp_path / "cr"
    folder.mkdir()
    for more in (
        [str(folder), "--image-key", "npy"],
        [str(folder), "--text-key", "npy"],
        ["--key-column", "key"],
    ):
        where = ["--store", str(tmp_path / "store"), "--shards", *shards]
        assert app.main(["data", "import", *more, *where]) == 1
        assert more[-2] in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_pictures_that_do_not_decode_need_no_row(tmp_path, shards):
    rows = embedded(shards[:1], WideCLIP())
    bad = {"bad.png": b"no picture", "bad.txt": b"bad"}
    in_tars(tmp_path, shards[:1], rows, change=lambda files: files.update(bad))
    counter = BadSampleCounter()
    store = into(tmp_path, shards[:1], TarMembers(), counter=counter)
    assert store.manifest["rows"] == 9 and (counter.bad, counter.seen) == (1, 10)
    empty = write_tar(tmp_path / "empty.tar", bad)
    with pytest.raises(UserError, match=r"empty\.tar has no usable sample"):
        into(tmp_path, [empty], TarMembers())


def test_done_shards_stay_and_a_store_of_another_clip_is_refused_first(tmp_path, shards):
    folder = write_retrieval(tmp_path / "cr", embedded(shards, WideCLIP()))
    into(tmp_path, shards[:2], RetrievalFolder(folder))
    clip = WideCLIP()
    store = into(tmp_path, shards, RetrievalFolder(folder), clip)
    assert clip.seen == 8 and list(store.manifest["shards"]) == shards
    other = WideCLIP(1)
    with pytest.raises(ClipMismatch, match="The embedding store"):
        into(tmp_path, shards, RetrievalFolder(folder), other)
    assert other.seen == 0
    assert json.loads((tmp_path / "store/clip.json").read_text())["config"]["model"] == "fake-0"


def test_noto_is_imported_with_the_clip_in_the_package(noto, tmp_path):
    """Real drawings, through CLIP's own transform of PIL images as clip-retrieval uses it: raw rows
    pass, normalised ones do not."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    clip = FrozenCLIP()
    transform = image_transform_v2(
        PreprocessCfg(**clip.model.visual.preprocess_cfg), is_train=False
    )
    shard, rows = str(noto / "00002.tar"), {}
    for sample in raw_samples(shard, BadSampleCounter(0)):
        with torch.no_grad():
            rows[sample["key"]] = [
                clip.model.encode_image(transform(Image.open(io.BytesIO(sample["image"])))[None])[0]
                .half()
                .numpy()
            ]
    store = into(tmp_path, shard, RetrievalFolder(write_retrieval(tmp_path / "raw", rows)), clip)
    assert store.manifest["rows"] == 109 and verify(store.folder, shard, clip) == []
    with pytest.raises(UserError, match="normalised to length 1"):
        folder = write_retrieval(
            tmp_path / "unit", {key: [unit(row)] for key, (row,) in rows.items()}
        )
        import_embeddings(tmp_path / "second", shard, RetrievalFolder(folder), clip, progress=False)
