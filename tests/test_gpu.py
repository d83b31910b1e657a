"""Training on a GPU (`CUDA_VISIBLE_DEVICES=0 pytest tests/test_gpu.py`): the gradients of the CPU, and whole steps under the trainer."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNet, UNetConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.decoder import Decoder
from unclip_pl.training.ema import EMA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def config(**more) -> UNetConfig:
    return UNetConfig(image_size=32, width=64, mults=(1, 2), depth=1, attention=(16,), embed_dim=16, context_width=32, **{"dropout": 0.0} | more)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_cpu(checkpointing):
    torch.manual_seed(0)
    net = UNet(config(checkpointing=checkpointing)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in net.parameters():  # the zeros of a new network would hide gradients
            parameter.add_(0.02 * torch.randn_like(parameter))
    there = copy.deepcopy(net).cuda()
    given = {"embed": torch.randn(3, 16), "context": torch.randn(3, 5, 32), "context_mask": torch.rand(3, 5) > 0.3}
    x, t, weigh = torch.randn(3, 3, 32, 32), torch.tensor([3, 400, 900]), torch.randn(3, 6, 32, 32)
    (net(x, t, **given) * weigh).sum().backward()
    (there(x.cuda(), t.cuda(), **{key: value.cuda() for key, value in given.items()}) * weigh.cuda()).sum().backward()
    for (name, mine), theirs in zip(net.named_parameters(), there.parameters(), strict=True):
        assert (mine.grad - theirs.grad.cpu()).norm() < 2e-4 * mine.grad.norm() + 1e-6, name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_decoder_learns_a_batch_by_heart(precision, tmp_path):
    torch.manual_seed(0)
    stage = Decoder(config(dropout=0.1), TextConfig(kind="states", states_width=32), optimizer=OptimizerConfig(lr=2e-3, warmup_steps=0))
    batch = {
        "key": ["0", "1"], "image": torch.rand(2, 3, 32, 32) * 2 - 1, "image_embed": torch.randn(2, 16), "text_embed": torch.randn(2, 16),
        "text_states": torch.randn(2, 7, 32), "text_mask": torch.ones(2, 7, dtype=torch.bool),
    }  # fmt: skip
    losses = []

    class Diary(EMA):
        def on_train_batch_end(self, trainer, pl_module, outputs, *rest):
            losses.append(outputs["loss"].detach())
            super().on_train_batch_end(trainer, pl_module, outputs, *rest)

    trainer = Trainer(
        max_steps=60, accelerator="gpu", devices=1, precision=precision, callbacks=[Diary(0.9)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(stage, DataLoader([batch] * 60, batch_size=None))
    found = torch.stack(losses)
    assert found.isfinite().all() and not stage.skipped_steps.item()
    assert found[-10:].mean() < 0.6 * found[:5].mean()
