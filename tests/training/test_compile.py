"""`compile: true` in training: nothing in checkpoints tells of it, and a run may go on without."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from open_clip.transformer import ResidualAttentionBlock
from torch.utils.data import DataLoader

from tests.networks.test_compilation import batch, decoder
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.checkpoint_io import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.networks.layers import Block
from unclip_pl.stages import base
from unclip_pl.stages.clip import CLIP
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.utils.errors import UserError

CLIP_BLOCKS = 7
"""Of both towers of the embedded CLIP."""


def fit(folder, compiled: bool, steps: int, resume=None):
    torch.manual_seed(0)
    stage = decoder()
    stage.compile_networks = compiled
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(0.5), NewestCheckpoint(every_n_train_steps=1)],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(stage, DataLoader([batch()] * steps, batch_size=None), ckpt_path=resume)
    return stage, read_checkpoint(newest_checkpoint(folder))


@pytest.mark.slow
def test_a_compiled_run_is_checkpointed_and_resumed_as_a_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    stage, compiled = fit(tmp_path / "compiled", True, 2)
    assert all(m._compiled_call_impl for m in stage.modules() if isinstance(m, Block))
    _, plain = fit(tmp_path / "plain", False, 2)
    for part in ("state_dict", "current_model_state"):
        assert list(compiled[part]) == list(plain[part])
        for name, value in compiled[part].items():
            torch.testing.assert_close(value, plain[part][name], rtol=1e-3, atol=1e-4, msg=name)
    checkpoint = newest_checkpoint(tmp_path / "compiled")
    _, resumed = fit(tmp_path / "resumed", False, 3, resume=checkpoint)
    assert resumed["global_step"] == 3


def test_blocks_of_a_clip_are_compiled_as_well(monkeypatch, capsys):
    stage = CLIP("openmoji").eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = torch.arange(16).reshape(2, 8)
    given = {"image": images, "tokens": F.pad(tokens, (0, stage.net.context_length - 8))}
    plain, names = stage.loss(given)["loss"], list(stage.state_dict())
    monkeypatch.setattr(base, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    stage.compile_networks, stage.trainer = True, Trainer(accelerator="cpu", logger=False)
    stage.configure_model()
    blocks = [m for m in stage.modules() if isinstance(m, ResidualAttentionBlock)]
    assert len(blocks) == CLIP_BLOCKS and all(block._compiled_call_impl for block in blocks)
    assert "compiled at their first use" in capsys.readouterr().err
    torch.testing.assert_close(stage.loss(given)["loss"], plain)
    assert list(stage.state_dict()) == names


def test_a_network_without_blocks_is_refused(monkeypatch):
    stage = decoder()
    stage.compile_networks, stage.trainer = True, Trainer(accelerator="cpu", logger=False)
    monkeypatch.setattr(type(stage), "block_kind", torch.nn.Bilinear)
    with pytest.raises(UserError, match="no Bilinear.*leave compile out"):
        stage.configure_model()


def test_the_option_reaches_the_stage():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words, expected in (([], False), (["--compile", "true"], True)):
            arguments = ["-c", "stages/decoder.yaml", "--trainer.accelerator", "cpu", *words]
            cli = build_cli(arguments, run=False)
            assert cli.model.compile_networks is expected
