"""Embeddings made elsewhere: taken over by key into a whole store, or refused in a sentence that leaves no file behind."""

import io
import json
import logging
import random
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.shardkit import FakeCLIP, write_tar
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

COUNTS = [9, 4, 30]


class WideCLIP(FakeCLIP):
    """FakeCLIP with 24 numbers an embedding: few enough to be quick, too many for two pictures of noise to agree by chance."""

    embed_dim = 24

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(100 + seed)
        self.matrix = torch.randn(3 * 64, 24, generator=generator)
        self.letters = torch.randn(128, 24, generator=generator)

    def embed_text(self, tokens):
        return super().embed_text(tokens)._replace(embed=self.letters[tokens].sum(1))

    def fingerprint(self):
        return super().fingerprint() | {"embed_dim": 24}


def noise(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def caption(number: int) -> str:
    return "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=12))


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    numbers = iter(range(sum(COUNTS)))
    found = []
    for index, count in enumerate(COUNTS):
        files = {}
        for n in (next(numbers) for _ in range(count)):
            files |= {
                f"{n:06d}.png": noise(n),
                f"{n:06d}.txt": caption(n).encode(),
                f"{n:06d}.json": b"{}",
            }
        found.append(write_tar(tmp_path / f"{index:05d}.tar", files))
    return found


def embedded(shards, clip) -> dict[str, list[np.ndarray]]:
    """Image and text row of each key, computed one by one."""
    rows = {}
    for sample in (
        sample for shard in shards for sample in raw_samples(shard, BadSampleCounter(0))
    ):
        image = clip.embed_images(decode(sample["image"], clip.image_size)[None])[0]
        rows[sample["key"]] = [
            image.half().numpy(),
            clip.embed_text(clip.tokenize([sample["caption"]])).embed[0].half().numpy(),
        ]
    return rows


def write_retrieval(folder, rows, parts: int = 2, text: bool = False, column: str = "image_path"):
    """As clip-retrieval writes it: parts that follow no shard's border, their rows in an order of their own."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    keys = sorted(rows, key=lambda key: hash((int(key) * 7919) % 101))
    for kind in ["img_emb", "metadata", *(["text_emb"] if text else [])]:
        (folder / kind).mkdir(parents=True)
    for n in range(parts):
        mine = keys[n::parts]
        for slot, kind in enumerate(["img_emb", "text_emb"][: 1 + text]):
            np.save(folder / kind / f"{kind}_{n}.npy", np.stack([rows[key][slot] for key in mine]))
        parquet.write_table(
            pyarrow.table({column: mine, "caption": ["x"] * len(mine)}),
            folder / "metadata" / f"metadata_{n}.parquet",
        )
    return folder


def into(tmp_path, shards, source, clip=None, **kwargs):
    return import_embeddings(
        tmp_path / "store",
        shards,
        source,
        clip or WideCLIP(),
        batch_size=5,
        progress=False,
        **kwargs,
    )


def refused(tmp_path, shards, source, match, clip=None, **kwargs):
    """One sentence, and neither rows nor a claim are left."""
    with pytest.raises(UserError, match=match) as caught:
        into(tmp_path, shards, source() if callable(source) else source, clip, **kwargs)
    assert "\n" not in str(caught.value)
    assert not [path.name for path in (tmp_path / "store").glob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("text", [False, True])
def test_a_folder_of_clip_retrieval_gives_the_store_that_embedding_gives(tmp_path, shards, text):
    clip = WideCLIP()
    folder = write_retrieval(tmp_path / "cr", embedded(shards, clip), parts=3, text=text)
    clip.seen = 0
    store = into(tmp_path, shards, RetrievalFolder(folder), clip)
    assert clip.seen == 8 + 4 + 8  # spot checks alone
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


def in_tars(
    tmp_path, shards, rows, image="img_emb.npy", text="text_emb.npy", change=lambda files: None
):
    """The shards again, with the rows as members."""
    for shard in shards:
        files = {}
        for sample in raw_samples(shard, BadSampleCounter(0)):
            key = sample["key"]
            files |= {
                f"{key}.png": sample["image"],
                f"{key}.txt": sample["caption"].encode(),
                f"{key}.{image}": npy(rows[key][0]),
            }
            if text:
                files[f"{key}.{text}"] = npy(rows[key][1])
        change(files)
        write_tar(
            tmp_path / shard, {name: data for name, data in files.items() if data is not None}
        )
    return shards


@pytest.mark.parametrize(
    "image, text, source",
    [
        ("img_emb.npy", None, ()),
        ("npy", None, (".npy",)),
        ("clip_i.npy", "clip_t.npy", ("clip_i.npy", "clip_t.npy")),
    ],
)
def test_members_of_the_tars_are_taken_over(tmp_path, shards, image, text, source):
    rows = {
        key: [one[None].astype(np.float32), two]
        for key, (one, two) in embedded(shards, WideCLIP()).items()
    }  # (1, D) float32 as well
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
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (4, 5, 3), np.uint8)).resize(
            (80, 64)
        ).save(file, "PNG")
        files |= {f"{n:03d}.png": file.getvalue(), f"{n:03d}.txt": b"a red cat"}
        rows[f"{n:03d}"] = [clip.embed_images(decode(file.getvalue(), 64)[None])[0].half().numpy()]
    shard = write_tar(tmp_path / "0.tar", files)
    folder, store = write_retrieval(tmp_path / "cr", rows), tmp_path / "store"
    assert (
        app.main(
            [
                "data",
                "import",
                str(folder),
                "--store",
                str(store),
                "--shards",
                shard,
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert "has 12 rows" in capsys.readouterr().out
    assert app.main(["data", "verify", str(store)]) == 0
    data = ImageEmbeddingData(train=shard, val=None, store=str(store), image_size=64)
    before = EmbeddingStore(store).path(shard).stat().st_mtime_ns
    data.prepare_data()
    assert EmbeddingStore(store).path(shard).stat().st_mtime_ns == before
    assert np.array_equal(EmbeddingStore(store).shard(shard).image_embed[3], rows["003"][0])


def test_options_of_the_other_kind_of_source_are_refused(tmp_path, shards, capsys):
    folder = tmp_path / "cr"
    for more in (
        [str(folder), "--image-key", "npy"],
        [str(folder), "--text-key", "npy"],
        ["--key-column", "key"],
    ):
        assert (
            app.main(
                ["data", "import", *more, "--store", str(tmp_path / "store"), "--shards", *shards]
            )
            == 1
        )
        assert more[-2] in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def unit(row):
    return (np.float32(row) / np.linalg.norm(np.float32(row))).astype(np.float16)


def test_normalised_rows_are_refused_with_the_reason(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    folder = write_retrieval(
        tmp_path / "cr", {key: [unit(image), text] for key, (image, text) in rows.items()}
    )
    refused(
        tmp_path,
        shards,
        RetrievalFolder(folder),
        r"image embeddings of .*cr for .*00000\.tar are normalised to length 1 .* lengths around \d.* are lost",
    )
    folder = write_retrieval(
        tmp_path / "text",
        {key: [image, unit(text)] for key, (image, text) in rows.items()},
        text=True,
    )
    refused(
        tmp_path,
        shards,
        RetrievalFolder(folder),
        "text embeddings of .* are normalised .* from the captions",
    )
    (folder / "text_emb").rename(folder / "gone")  # what the sentence says to do
    assert verify(into(tmp_path, shards, RetrievalFolder(folder)).folder) == []


def test_normalised_rows_of_a_clip_that_normalises_are_taken(tmp_path, shards):
    clip = WideCLIP()
    raw = clip.embed_images
    clip.embed_images = lambda images: torch.nn.functional.normalize(raw(images))
    folder = write_retrieval(tmp_path / "cr", embedded(shards, clip))
    assert verify(into(tmp_path, shards, RetrievalFolder(folder), clip).folder) == []


def test_rescaled_rows_and_rows_of_another_clip_are_told_apart(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    folder = write_retrieval(
        tmp_path / "scaled",
        {key: [image * np.float16(0.5), text] for key, (image, text) in rows.items()},
    )
    refused(tmp_path, shards, RetrievalFolder(folder), "were rescaled")
    folder = write_retrieval(tmp_path / "other", embedded(shards, WideCLIP(1)))
    refused(
        tmp_path, shards, RetrievalFolder(folder), r"made with another CLIP .* only 0 of 8 samples"
    )
    assert (
        verify(into(tmp_path, shards, RetrievalFolder(folder), WideCLIP(1)).folder) == []
    )  # the refusal claimed nothing


def test_rows_in_another_order_than_the_keys_are_refused(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    keys = list(rows)
    shifted = dict(zip(keys, [*list(rows.values())[1:9], rows[keys[0]], *list(rows.values())[9:]]))
    folder = write_retrieval(tmp_path / "cr", shifted)
    refused(
        tmp_path,
        shards,
        RetrievalFolder(folder),
        r"another order than its keys: the image embedding of 00000\d is that of 00000\d",
    )
    texts = dict(
        zip(
            keys, [[rows[a][0], rows[b][1]] for a, b in zip(keys, [*keys[1:9], keys[0], *keys[9:]])]
        )
    )
    refused(
        tmp_path,
        shards,
        RetrievalFolder(write_retrieval(tmp_path / "t", texts, text=True)),
        "another order .* the text embedding",
    )


def test_a_single_picture_that_was_read_otherwise_is_named_and_kept(tmp_path, shards, caplog):
    rows = embedded(shards, WideCLIP())
    rows["000010"][0] = -rows["000010"][0]
    rows["000002"][0] = -rows["000002"][0]
    folder = write_retrieval(tmp_path / "cr", rows)
    with caplog.at_level(logging.WARNING):
        store = into(tmp_path, shards, RetrievalFolder(folder))
    assert any("000010" in line for line in caplog.messages) and store.manifest["rows"] == sum(
        COUNTS
    )


def test_a_missing_row_is_named_or_embedded(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    gone = rows.pop("000011")
    folder = write_retrieval(tmp_path / "cr", rows, text=True)
    with pytest.raises(
        UserError, match=r"no image embedding of the sample 000011 of .*00001\.tar in .*cr: "
    ):
        into(tmp_path, shards, RetrievalFolder(folder))
    assert (
        len(list((tmp_path / "store").glob("*.safetensors"))) == 1
    )  # the shard before it is whole and stays
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
        r"no image embedding of the sample 000000 of .*00000\.tar in the members \.img_emb\.npy and \.text_emb\.npy",
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
    assert (
        other.seen == 0
        and json.loads((tmp_path / "store/clip.json").read_text())["config"]["model"] == "fake-0"
    )


def test_noto_is_imported_with_the_clip_in_the_package(noto, tmp_path):
    """Real drawings, through CLIP's own transform of PIL images as clip-retrieval uses it; raw rows pass, normalised ones do not."""
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
