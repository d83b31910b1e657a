"""Whole captions for stages that read more tokens than CLIP: in batches of images and of rows, made
once, of the store's own samples."""

import shutil

import pytest
import torch

from tests.data.fitkit import data_of
from tests.data.shardkit import picture, write_tar
from unclip_pl.clip.loading import tokenize_bpe
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.data.text_tokens import ensure_text_tokens, read_text_tokens, text_tokens_file
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.utils.errors import UserError

LENGTH = 256


def long_caption(number: int, last: str = "end") -> str:
    """About 150 tokens."""
    words = ["red", "blue", "small", "wide", "old", "round", "soft", "dark"]
    said = " and ".join(f"{words[i % 8]} thing {(number + i) % 10}" for i in range(36))
    return f"{said} {last}"


def captions_path(store, shard):
    return store.files.place(text_tokens_file(store, shard, LENGTH))


def write_long(path, count: int = 6, last: str = "end") -> str:
    files = {}
    for n in range(count):
        files[f"{n:06d}.png"] = picture(n)
        files[f"{n:06d}.txt"] = long_caption(n, last).encode()
    return write_tar(path, files)


@pytest.fixture
def shard(tmp_path):
    return write_long(tmp_path / "00000.tar")


def prior_data(shard, store, text_length=LENGTH) -> PriorData:
    data = data_of(PriorData, [shard], None, store)
    data.config, data.text_length = EmbeddingLoaderConfig(batch_size=3), text_length
    return data


def test_the_tokenizer_is_open_clips_at_any_length():
    caption = long_caption(0)
    tokens = tokenize_bpe([caption, "a cat"], LENGTH)
    assert tokens.shape == (2, LENGTH) and tokens.dtype == torch.int64
    count = int(tokens[0].argmax()) + 1  # up to the end token, the largest id
    assert 140 < count < 180 and tokens[0].max() == 49407 and not tokens[0, count:].any()
    assert tokens[1, :4].tolist() == [49406, 320, 2368, 49407]  # as CLIP has them
    cut = tokenize_bpe([caption], 77)[0]
    assert torch.equal(cut[:76], tokens[0, :76]) and cut[76] == 49407


@pytest.mark.parametrize("kind", [ImageEmbeddingData, PriorData])
def test_a_batch_holds_whole_captions_of_its_own_samples(kind, shard, tmp_path):
    data = data_of(kind, [shard], [shard], tmp_path / "store", batch_size=3)
    data.text_length = LENGTH
    if kind is PriorData:
        data.config = EmbeddingLoaderConfig(batch_size=3)
    data.prepare_data()
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            wanted = tokenize_bpe([long_caption(int(key)) for key in batch["key"]], LENGTH)
            assert torch.equal(batch["text_tokens"], wanted)
            assert batch["tokens"].shape == (3, 12)  # CLIP's own stay as they are
    data.text_length = None
    assert "text_tokens" not in next(iter(data.val_dataloader()))


def test_captions_are_tokenised_once_and_again_where_the_tar_has_changed(shard, tmp_path):
    data = prior_data(shard, tmp_path / "store")
    data.prepare_data()
    path = captions_path(data.store, shard)
    before = path.stat().st_mtime_ns
    data.prepare_data()
    assert path.stat().st_mtime_ns == before
    assert ensure_text_tokens(data.store, [shard], LENGTH) == 0
    write_long(tmp_path / "00000.tar", count=5, last="another end")
    again = prior_data(shard, tmp_path / "store")
    again.prepare_data()
    wanted = tokenize_bpe([long_caption(n, "another end") for n in range(5)], LENGTH)
    found = torch.from_numpy(read_text_tokens(again.store, shard, LENGTH).copy()).long()
    assert torch.equal(found, wanted)


def test_captions_that_are_not_there_or_are_of_other_rows_are_sentences(shard, tmp_path):
    other = write_long(tmp_path / "00001.tar", count=4)
    data = prior_data(shard, tmp_path / "store", None)
    data.train = [shard, other]
    data.prepare_data()
    store, path = data.store, captions_path(data.store, shard)
    with pytest.raises(UserError, match=r"no captions of 256 tokens .*--data\.text_length 256"):
        read_text_tokens(store, shard, LENGTH)
    ensure_text_tokens(store, [shard, other], LENGTH)
    content = path.read_bytes()
    shutil.copy(captions_path(store, other), path)
    with pytest.raises(UserError, match="delete it"):
        read_text_tokens(store, shard, LENGTH)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut short"):
        read_text_tokens(store, shard, LENGTH)
    write_long(tmp_path / "00000.tar", count=4)  # the rows are of six samples
    with pytest.raises(UserError, match="has no sample 000004"):
        ensure_text_tokens(store, [shard], LENGTH)
