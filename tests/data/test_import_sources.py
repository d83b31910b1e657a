"""Files of embeddings that are missing, broken or ambiguous are named."""

import io
import sys
import tarfile

import numpy as np
import pytest
import torch

from tests.data.importkit import (
    WideCLIP,
    caption,
    embedded,
    in_tars,
    into,
    noise,
    npy,
    refused,
    write_import_shards,
    write_retrieval,
)
from tests.data.shardkit import write_tar
from unclip_pl.data.decoding import decode
from unclip_pl.data.import_sources import RetrievalFolder, TarMembers
from unclip_pl.data.verify import verify
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_import_shards(tmp_path)


def test_a_missing_row_is_named_or_embedded(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    gone = rows.pop("000011")
    folder = write_retrieval(tmp_path / "cr", rows, text=True)
    with pytest.raises(
        UserError, match=r"no image embedding of the sample 000011 of .*00001\.tar in .*cr: "
    ):
        into(tmp_path, shards, RetrievalFolder(folder))
    # the shard before it is whole and stays
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1
    store = into(tmp_path, shards, RetrievalFolder(folder), embed_missing=True)
    mine = store.shard(shards[1])
    assert verify(store.folder) == []
    assert all(
        np.array_equal(table[mine.row_of_key["000011"]], row)
        for table, row in zip((mine.image_embed, mine.text_embed), gone)
    )


def test_members_that_are_missing_or_broken_are_named(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    sources = TarMembers(text_key="text_emb.npy")
    some = shards[:1]
    refused(
        tmp_path,
        some,
        sources,
        r"no image embedding of the sample 000000 of .*00000\.tar .*\.img_emb\.npy",
    )
    for member, data, match in [
        ("000003.text_emb.npy", None, r"no text embedding of the sample 000003 of .*00000\.tar"),
        (
            "000003.img_emb.npy",
            b"\x93NUMPY",
            r"000003\.img_emb\.npy in .*00000\.tar cannot be read as \.npy",
        ),
        (
            "000003.img_emb.npy",
            npy(np.array([{}], object)),
            r"000003\.img_emb\.npy in .* cannot be read",
        ),
        (
            "000003.img_emb.npy",
            npy(np.zeros(5, np.float16)),
            r"image embedding of the sample 000003 in .*00000\.tar is float16 \(5,\), .*\(24,\)",
        ),
        (
            "000003.text_emb.npy",
            npy(np.zeros(24, np.int32)),
            "text embedding of the sample 000003 in .* is int32",
        ),
        (
            "000003.img_emb.npy",
            npy(np.full(24, np.nan)),
            "image embedding of the sample 000003 in .* is not finite",
        ),
        (
            "000003.text_emb.npy",
            npy(np.full(24, 1e6)),
            "text embedding of the sample 000003 in .* is not finite in float16",
        ),
    ]:
        in_tars(tmp_path, some, rows, change=lambda files, new={member: data}: files.update(new))
        refused(tmp_path, some, sources, match)


def test_a_broken_folder_is_refused_before_anything_is_read(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    from_folder = lambda name, change, **kwargs: (
        write_retrieval(tmp_path / name, rows, **kwargs),
        change(tmp_path / name),
    )[0]

    def rewrite(path, change):
        np.save(path, change(np.load(path)))

    def cut(path):
        path.write_bytes(path.read_bytes()[:300])

    cases = [
        (
            "short",
            lambda f: rewrite(f / "img_emb/img_emb_1.npy", lambda t: t[:-1]),
            r"img_emb_1\.npy has 20 rows and .*metadata_1\.parquet has 21",
        ),
        (
            "text",
            lambda f: rewrite(f / "text_emb/text_emb_0.npy", lambda t: t[:-2]),
            r"text_emb_0\.npy has 20 rows and .*metadata_0\.parquet has 22",
        ),
        (
            "width",
            lambda f: rewrite(f / "img_emb/img_emb_1.npy", lambda t: t[:, :-1]),
            r"img_emb_1\.npy has rows of 23 numbers where .* have 24",
        ),
        (
            "flat",
            lambda f: rewrite(f / "img_emb/img_emb_1.npy", lambda t: t[0]),
            r"img_emb_1\.npy holds float16 \(24,\)",
        ),
        (
            "npy",
            lambda f: cut(f / "img_emb/img_emb_0.npy"),
            r"img_emb_0\.npy cannot be read as \.npy",
        ),
        (
            "parquet",
            lambda f: cut(f / "metadata/metadata_0.parquet"),
            r"metadata_0\.parquet cannot be read",
        ),
        (
            "nometa",
            lambda f: (f / "metadata/metadata_0.parquet").unlink(),
            r"metadata_0\.parquet cannot be read",
        ),
        (
            "noimg",
            lambda f: (f / "img_emb/img_emb_0.npy").unlink(),
            r"metadata_0\.parquet has no .*img_emb_0\.npy next to it",
        ),
        (
            "nopart",
            lambda f: [path.unlink() for path in (f / "img_emb").iterdir()],
            r"has no img_emb/img_emb_\*\.npy",
        ),
        (
            "nan",
            lambda f: rewrite(f / "img_emb/img_emb_0.npy", lambda t: t * np.nan),
            r"of the sample 00000\d in .*img_emb_0\.npy is not finite",
        ),
    ]
    for name, change, match in cases:
        folder = from_folder(name, change, text=name == "text")
        refused(tmp_path, shards, lambda folder=folder: RetrievalFolder(folder), match)


def test_doubled_keys_are_refused_with_their_files(tmp_path, shards):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = write_retrieval(tmp_path / "cr", embedded(shards, WideCLIP()))
    table = [
        parquet.read_table(folder / f"metadata/metadata_{n}.parquet")["image_path"].to_pylist()
        for n in (0, 1)
    ]
    for keys, match in [
        (
            [table[1][3], *table[0][1:]],
            rf"key {table[1][3]} is in .*metadata_0\.parquet and in .*metadata_1\.parquet",
        ),
        ([table[0][1], *table[0][1:]], rf"key {table[0][1]} is twice in .*metadata_0\.parquet"),
        ([None, *table[0][1:]], r"Row 0 of .*metadata_0\.parquet has no image_path"),
        (list(range(len(table[0]))), r"column image_path of .*metadata_0\.parquet holds int64"),
    ]:
        parquet.write_table(
            pyarrow.table({"image_path": keys}), folder / "metadata/metadata_0.parquet"
        )
        refused(tmp_path, shards, lambda: RetrievalFolder(folder), match)


def test_a_key_in_two_shards_is_refused(tmp_path, shards):
    folder = write_retrieval(tmp_path / "cr", embedded(shards, WideCLIP()))
    again = write_tar(
        tmp_path / "again.tar", {"000003.png": noise(3), "000003.txt": caption(3).encode()}
    )
    with pytest.raises(UserError, match=r"key 000003 is in .*again\.tar and in a shard before it"):
        into(tmp_path, [shards[0], again], RetrievalFolder(folder))


def test_the_second_sample_of_a_key_is_skipped_with_its_embedding(tmp_path, caplog):
    rows = (
        WideCLIP()
        .embed_images(torch.stack([decode(noise(n), WideCLIP.image_size) for n in range(3)]))
        .half()
        .numpy()
    )
    twice = str(tmp_path / "twice.tar")
    with tarfile.open(twice, "w") as tar:
        for key, n in (("a", 0), ("b", 1), ("a", 2)):
            for name, data in (
                (f"{key}.png", noise(n)),
                (f"{key}.txt", caption(n).encode()),
                (f"{key}.img_emb.npy", npy(rows[n])),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows_of = into(tmp_path, [twice], TarMembers()).shard(twice)
    assert list(rows_of.keys) == ["a", "b"]
    assert np.array_equal(rows_of.image_embed, rows[:2])
    assert "sample a of" in caplog.text


def test_the_key_column_can_be_named(tmp_path, shards):
    folder = write_retrieval(tmp_path / "cr", embedded(shards, WideCLIP()), column="key")
    refused(
        tmp_path,
        shards,
        lambda: RetrievalFolder(folder),
        r"has no column image_path of keys, only key, caption",
    )
    assert verify(into(tmp_path, shards, RetrievalFolder(folder, "key")).folder) == []


def test_without_pyarrow_the_sentence_says_what_to_install(tmp_path, shards, monkeypatch):
    folder = write_retrieval(tmp_path / "cr", embedded(shards, WideCLIP()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(
        tmp_path, shards, lambda: RetrievalFolder(folder), "needs pyarrow, .*: pip install pyarrow"
    )
