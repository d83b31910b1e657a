"""Captions in all the ways that tars hold them, and data that have none."""

import json
import logging

import pytest

from tests.data.fitkit import data_of
from tests.data.shardkit import FakeCLIP, picture, write_tar
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.shards import raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.datamodules.image_text import ImageTextData
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import decode_text, repair_text

SAID = "ein schönes Café"


@pytest.mark.parametrize(
    "files",
    [
        {"caption": SAID.encode()},
        {"text": SAID.encode()},
        {"txt": b" \n", "json": json.dumps({"caption": SAID}).encode()},
        {"json": json.dumps({"text": SAID}).encode()},
        {"json": json.dumps({"URL": "x", "TEXT": SAID}).encode("utf-16")},
        {"json": json.dumps({"prompt": SAID}, ensure_ascii=False).encode("latin-1")},
        {"json": json.dumps({"caption": None, "captions": [SAID, "other"]}).encode()},
        {"json": json.dumps(SAID).encode()},
        *({"txt": SAID.encode(kind)} for kind in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")),
        {"txt": SAID.encode("utf-32")},
        {"txt": SAID.encode("latin-1")},
        {"txt": SAID.encode("cp1252"), "json": b"{"},
    ],
    ids=str,
)
def test_known_spellings_of_a_caption_are_read(tmp_path, files):
    content = {f"a.b.{ending}": data for ending, data in files.items()}
    shard = write_tar(tmp_path / "a.tar", {"a.b.png": picture(1)} | content)
    (sample,) = raw_samples(shard, BadSampleCounter(0))
    assert sample["caption"] == SAID


def test_what_is_cut_or_is_no_character_is_replaced():
    assert decode_text("naïve café".encode()[:-1]) == "naïve caf\ufffd"
    assert decode_text(b"caf\x81\xe9") == "caf\x81é"  # not even of Windows-1252
    assert repair_text("a\0b \ud83d\ude00 \ud83d!") == "a b 😀 \ufffd!"
    assert repair_text("caf\udce9") == "café" == repair_text("caf\udcc3\udca9")
    assert repair_text("two\nlines\t") == "two\nlines\t"


def shards(tmp_path, captions: int, count: int = 24) -> list[str]:
    files = {}
    for n in range(count):
        files |= {f"{n:03d}.jpg": picture(n, kind="JPEG"), f"{n:03d}.cls": b"7"}
        files |= {f"{n:03d}.txt": b"seven"} if n < captions else {}
    return [write_tar(tmp_path / "a.tar", files)]


@pytest.mark.parametrize("kind", [PriorData, ImageEmbeddingData, ImageTextData])
def test_a_set_without_captions_is_refused_before_training(tmp_path, kind):
    store = tmp_path / "store" if kind is not ImageTextData else None
    data = data_of(kind, shards(tmp_path, captions=0), store=store)
    data.text_states = True  # which the decoder's conditioning on text asks for
    said = r"24 of 24 samples have no caption \(endings seen: cls, jpg\): .*max_bad_rate \(0"
    with pytest.raises(UserError, match=said):
        data.prepare_data()


def test_a_caption_may_be_missing_here_and_there_and_where_none_is_read(tmp_path, caplog):
    data_of(PriorData, shards(tmp_path, captions=23), store=tmp_path / "few").prepare_data()
    with caplog.at_level(logging.WARNING):
        bare = shards(tmp_path, captions=0)
        data_of(ImageEmbeddingData, bare, store=tmp_path / "images").prepare_data()
    assert "24 of 24 samples have no caption (endings seen: cls, jpg)" in caplog.text
    (tmp_path / "a.tar").unlink()
    data = data_of(PriorData, bare, store=tmp_path / "images")
    with pytest.raises(UserError, match="24 of 24 samples have no caption: write"):
        data.prepare_data()


def test_rows_without_a_caption_are_counted_from_the_store(tmp_path):
    store = EmbeddingStore(tmp_path / "store")
    clip, names = FakeCLIP(), shards(tmp_path, captions=10)
    store.ensure(names, clip, progress=False)
    found = store.missing_captions(names, clip.tokenize([""])[0].numpy())
    assert (found.seen, found.missing) == (24, 14)
