"""The demo's data: blue drawings with the embeddings of the drawings in colour."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from unclip_pl.data.store import EmbeddingStore
from unclip_pl.datamodules.delft import INK, TILE, DelftData, DelftTransform, in_blue
from unclip_pl.datamodules.image_embedding import EmbeddingTransform


def test_white_stays_black_becomes_ink_and_darker_is_nearer_to_it():
    grey = torch.linspace(-1, 1, 5).expand(3, 1, 5)
    drawn = (in_blue(grey) + 1) * 127.5
    assert torch.allclose(drawn[:, 0, 4], torch.tensor(TILE, dtype=torch.float32), atol=1e-3)
    assert torch.allclose(drawn[:, 0, 0], torch.tensor(INK, dtype=torch.float32), atol=1e-3)
    assert (drawn.diff(dim=-1) > 0).all()
    assert torch.equal(in_blue(grey.expand(2, 3, 1, 5))[1], in_blue(grey))


def test_samples_have_other_pixels_and_the_embeddings_of_the_drawings_in_colour():
    rows = SimpleNamespace(row_of_key={"fox": 1})
    for name in ("tokens", "image_embed", "text_embed"):
        setattr(rows, name, np.random.default_rng(0).integers(9, size=(2, 4)))
    store: Any = SimpleNamespace(shard=lambda shard: rows)
    sample = {
        "shard": "a.tar",
        "key": "fox",
        "caption": "fox",
        "image": torch.rand(3, 8, 8) * 2 - 1,
    }
    plain, blue = EmbeddingTransform(store)(sample, 0), DelftTransform(store)(sample, 0)
    assert torch.equal(blue.pop("image"), in_blue(plain.pop("image")))
    assert blue["image_embed"].tolist() == rows.image_embed[1].tolist()
    assert [*map(str, blue.values())] == [*map(str, plain.values())]


def test_the_data_of_the_demo_gives_such_samples():
    data = DelftData(text_states=True)
    data.store, data.text_length = EmbeddingStore("nowhere"), None
    assert isinstance(data.sample_transform(train=True), DelftTransform) and data.text_states
