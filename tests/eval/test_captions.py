"""Captions from text files, MS-COCO's annotations and shards."""

import json

import pytest

from eval.captions import read_captions
from tests.eval import tiny
from unclip_pl.utils.errors import UserError


def test_captions_of_every_kind(tmp_path, caplog):
    text = tmp_path / "mine.txt"
    text.write_text("a dog\n\n  a cat \n \n", encoding="utf-8")
    captions = [(caption.key, caption.text) for caption in read_captions(str(text))]
    assert captions == [("line 1", "a dog"), ("line 3", "a cat")]
    assert "2 blank captions (line 2, line 4)" in caplog.text
    coco = tmp_path / "captions.json"
    annotations = [{"id": k, "image_id": k // 5, "caption": f" picture\n {k} "} for k in range(50)]
    coco.write_text(json.dumps({"annotations": annotations}))
    chosen = read_captions(str(coco), 10)
    assert chosen == read_captions(str(coco), 10)
    assert len({caption.picture for caption in chosen}) == 10
    assert all(caption.text == f"picture {caption.key}" for caption in chosen)
    assert [caption.key for caption in chosen] != [str(k) for k in range(10)]
    pictured = read_captions(str(tiny.shards(tmp_path / "drawings", 6)), 4)
    assert len(pictured) == 4 and all(caption.image for caption in pictured)


@pytest.mark.parametrize(
    ("name", "content", "keyword"),
    [
        ("blank.txt", b"\n \n", "no captions"),
        ("bytes.txt", b"\xff\xfe", "UTF-8"),
        ("wrong.json", b"[1]", "MS-COCO"),
        ("wrong.json", b"{", "MS-COCO"),
        ("one.txt", b"dog", "--num-captions"),
    ],
)
def test_captions_that_are_none_are_refused(tmp_path, name, content, keyword):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=keyword):
        read_captions(str(tmp_path / name), 2)
