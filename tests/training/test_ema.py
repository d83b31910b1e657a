"""The average is the closed form, replaces the weights where it should, and survives a resume."""

import pytest
import torch
from lightning.pytorch import Callback

from tests.training.toy import Toy, loader, trainer
from unclip_pl.cluster.checkpoint_io import read_checkpoint
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.training.ema import EMA

VALIDATION = {"val_check_interval": 3, "check_val_every_n_epoch": None}


class Record(Callback):
    """Weights after each step, and those that validation saw."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(pl_module.net.weight.detach().double().clone())

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(pl_module.net.weight.detach().double().clone())


def closed_form(first, steps, decay):
    average = first.double().clone()
    for n, weight in enumerate(steps, start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
    return average


def test_average_is_the_sum_it_should_be_and_validation_uses_it(tmp_path):
    torch.manual_seed(0)
    module, record, ema = Toy(), Record(), EMA(decay=0.5)
    first = module.net.weight.detach().clone()
    trainer(tmp_path, ema, record, steps=9, **VALIDATION).fit(module, loader(), loader())
    assert len(record.steps) == 9
    average = ema._averages["net.weight"].double()
    expected = closed_form(first, record.steps, 0.5)
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    expected = closed_form(first, record.steps[:3], 0.5)
    torch.testing.assert_close(record.validated[0], expected, rtol=1e-5, atol=1e-6)
    # training goes on with the raw weights
    assert torch.equal(module.net.weight.detach().double(), record.steps[-1])


def test_gradient_accumulation_counts_optimiser_steps(tmp_path):
    ema = EMA(decay=0.9)
    trainer(tmp_path, ema, steps=3, accumulate_grad_batches=4).fit(Toy(), loader())
    assert ema.updates == 3


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    torch.manual_seed(0)
    whole, whole_ema = Toy(), EMA(0.9)
    start = {k: v.clone() for k, v in whole.state_dict().items()}
    # An epoch is 16 batches: 16 steps, then 8 more, so that a plain loader starts the second part
    # of both runs at its first batch.
    trainer(tmp_path / "a", whole_ema, NewestCheckpoint(16), steps=24).fit(whole, loader())
    half, half_ema = Toy(), EMA(0.9)
    half.load_state_dict(start)
    trainer(tmp_path / "b", half_ema, NewestCheckpoint(16), steps=16).fit(half, loader())
    again, again_ema = Toy(), EMA(0.9)
    path = next((tmp_path / "b").rglob("newest-step=16.ckpt"))
    resumed = trainer(tmp_path / "b", again_ema, NewestCheckpoint(16), steps=24)
    resumed.fit(again, loader(), ckpt_path=path)
    for name, value in whole.named_parameters():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(whole_ema._averages[name], again_ema._averages[name]), name
    assert again_ema.updates == 24


def test_checkpoint_holds_average_and_raw_weights_and_whole_buffers(tmp_path):
    module, ema = Toy(), EMA(0.9)
    trainer(tmp_path, ema, NewestCheckpoint(8), steps=8).fit(module, loader())
    checkpoint = read_checkpoint(next(tmp_path.rglob("*.ckpt")))
    average = checkpoint["state_dict"]["net.weight"]
    raw = checkpoint["current_model_state"]["net.weight"]
    assert torch.equal(average, ema._averages["net.weight"])
    assert torch.equal(raw, module.net.weight)
    assert not torch.equal(average, raw)
    assert checkpoint["state_dict"]["counter"] == 8  # a counter is not averaged


def test_error_inside_validation_leaves_the_weights(tmp_path):
    class Fail(Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("boom")

    module, ema, record = Toy(), EMA(0.9), Record()
    run = trainer(tmp_path, ema, record, Fail(), steps=9, **VALIDATION)
    with pytest.raises(RuntimeError, match="boom"):
        run.fit(module, loader(), loader())
    assert torch.equal(module.net.weight.detach().double(), record.steps[-1])


def test_impossible_decay_is_refused():
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=1.0)
