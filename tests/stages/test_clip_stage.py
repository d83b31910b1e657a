"""The CLIP stage: its loss is CLIP's, its scale is bounded, it learns, and what it exports is what
it was."""

import math

import pytest
import torch
import torch.nn.functional as F

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.folder import save_clip
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.clip import CLIP, random_affine
from unclip_pl.training.retrieval import recall_at


@pytest.fixture
def stage():
    torch.manual_seed(0)
    return CLIP(optimizer=OptimizerConfig(warmup_steps=1))


def batch(size=6):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(size, 32, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 49406, torch.arange(size) + 300, 49407
    return {
        "key": [str(i) for i in range(size)],
        "image": torch.rand(size, 3, 64, 64, generator=generator) * 2 - 1,
        "tokens": tokens,
    }


def test_loss_is_symmetric_cross_entropy_over_scaled_cosines(stage):
    given = batch()
    image, text = stage.eval().embed(given["image"], given["tokens"])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(6))
    # Temperature at the start: CLIP, section 2.5.
    logits = 1 / 0.07 * image.double() @ text.double().T
    right = torch.arange(6)
    expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(stage.loss(given)["loss"].double(), expected, rtol=1e-4, atol=1e-5)


def test_scale_never_exceeds_100(stage):
    stage.net.logit_scale.data.fill_(9.0)
    stage.log = lambda *_: None
    stage.on_train_batch_end(None, {}, 0)
    assert math.isclose(stage.net.logit_scale.exp().item(), 100, rel_tol=1e-5)


def test_it_learns_six_pairs(stage):
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    given = batch()
    stage.eval()  # no random shifts
    for _ in range(12):
        optimizer.zero_grad()
        stage.loss(given)["loss"].backward()
        optimizer.step()
    image, text = stage.embed(given["image"], given["tokens"])
    assert recall_at(image @ text.T, 1) == 1


def test_exported_folder_embeds_as_the_stage_does(stage, tmp_path):
    save_clip(stage.net, tmp_path / "clip", stage.model_config, stage.preprocess_config)
    clip, given = FrozenCLIP(CLIPConfig(model=f"local-dir:{tmp_path / 'clip'}")), batch()
    with torch.no_grad():
        image, text = stage.eval().embed(given["image"], given["tokens"])
    # Weights in float16.
    assert F.cosine_similarity(clip.embed_images(given["image"]), image).min() > 0.999
    assert F.cosine_similarity(clip.embed_text(given["tokens"]).embed, text).min() > 0.999


def test_shaking_moves_drawings_and_keeps_white():
    white = torch.ones(4, 3, 32, 32)
    torch.testing.assert_close(random_affine(white, 1.0), white)
    dot = white.clone()
    dot[:, :, 12:20, 12:20] = -1
    moved = random_affine(dot, 1.0)
    assert not torch.allclose(moved, dot) and (moved.min() < -0.9) and moved.max() <= 1 + 1e-5
    assert not torch.allclose(moved[0], moved[1])
    assert random_affine(dot, 0.0) is dot


def test_recall_counts_ties_against_the_model():
    table = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0], [1.0, 1.0, 1.0]])
    assert recall_at(table, 1).item() == pytest.approx(1 / 3)
    assert recall_at(table, 2).item() == pytest.approx(2 / 3)
    assert recall_at(table, 3) == 1
