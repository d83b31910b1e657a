"""Imported rows are compared with the CLIP at hand: other lengths, orders and CLIPs are refused."""

import logging

import numpy as np
import pytest
import torch

from tests.data.importkit import (
    COUNTS,
    WideCLIP,
    embedded,
    into,
    refused,
    unit,
    write_import_shards,
    write_retrieval,
)
from unclip_pl.data.import_sources import RetrievalFolder
from unclip_pl.data.verify import verify


@pytest.fixture
def shards(tmp_path):
    return write_import_shards(tmp_path)


def test_normalised_rows_are_refused_with_the_reason(tmp_path, shards):
    rows = embedded(shards, WideCLIP())
    folder = write_retrieval(
        tmp_path / "cr", {key: [unit(image), text] for key, (image, text) in rows.items()}
    )
    refused(
        tmp_path,
        shards,
        RetrievalFolder(folder),
        r"image embeddings of .*cr for .*00000\.tar are normalised .*lengths around \d",
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
    # the refusal claimed nothing
    assert verify(into(tmp_path, shards, RetrievalFolder(folder), WideCLIP(1)).folder) == []


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
