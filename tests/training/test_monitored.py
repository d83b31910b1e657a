"""A callback that watches what is never logged is refused before training."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from torch.utils.data import DataLoader

from tests.factories import STAGES, tiny_batch, tiny_stage
from tests.training.toy import trainer
from unclip_pl.training.checkpoints import BestCheckpoint
from unclip_pl.training.monitored import logged_names, require_logged
from unclip_pl.training.pictures import Pictures
from unclip_pl.training.prior_monitor import PriorMonitor
from unclip_pl.training.progress import LossByTimestep
from unclip_pl.utils.errors import SharedError


def test_the_loss_of_a_quarter_without_samples_is_left_out():
    logged, process = {}, SimpleNamespace(config=SimpleNamespace(timesteps=8))
    stage = SimpleNamespace(process=process, log_dict=logged.update)
    connector = SimpleNamespace(should_update_logs=True)
    run = SimpleNamespace(_logger_connector=connector, global_step=1)
    outputs = {"t": torch.tensor([0, 1, 7]), "per_sample": torch.tensor([1.0, 2.0, 5.0])}
    callback = LossByTimestep()
    callback.on_train_batch_end(run, stage, outputs, {}, 0)
    assert logged == {"train/loss_q0": 1.5, "train/loss_q3": 5.0}
    logged.clear()
    callback.on_train_batch_end(run, stage, outputs, {}, 1)  # gradients are being accumulated
    assert not logged


class Own(Callback):
    """A user's callback, which may log anything."""


@pytest.mark.parametrize("name", STAGES)
def test_all_that_is_logged_is_known_before(name, tmp_path):
    stage, batch = tiny_stage(name), tiny_batch(name)
    callbacks = [LossByTimestep(), Pictures(2)]
    if "prior" in name:
        callbacks.append(PriorMonitor(4, draws=2))
    data = DataLoader([batch], batch_size=None)
    run = trainer(tmp_path, *callbacks, steps=2, log_every_n_steps=1)
    run.fit(stage, data, data)
    logged = {key for key in run.callback_metrics if not key.endswith(("_step", "_epoch"))}
    # What is measured on captions of one image each, or of several, is not always there, nor is a
    # timestep of each quarter
    optional = {f"train/loss_q{i}" for i in range(4)}
    optional |= {f"val/prior/{kind}" for kind in ("spread", "spread_data", "cosine_text_other")}
    expected = logged_names(stage, run.callbacks)
    assert logged <= expected and expected - logged <= optional


def check(*callbacks, validates: bool = True, tmp_path="."):
    require_logged(trainer(tmp_path, *callbacks), tiny_stage("decoder"), validates)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (EarlyStopping("val_loss"), ["EarlyStopping", "val_loss", "did you mean val/loss?"]),
        (BestCheckpoint("val/lss"), ["BestCheckpoint", "did you mean val/loss?"]),
        (EarlyStopping("banana"), ["give one of", "train/loss, ", "val/loss"]),
        (EarlyStopping("val/prior/r1"), ["does not log"]),
    ],
)
def test_a_name_that_is_never_logged_is_refused_with_the_nearest(callback, words, tmp_path):
    with pytest.raises(SharedError) as error:
        check(callback, tmp_path=tmp_path)
    assert all(word in str(error.value) for word in words)


def test_stopping_on_a_validation_that_never_comes_is_refused(tmp_path):
    with pytest.raises(SharedError, match=r"data\.val"):
        check(EarlyStopping("val/loss"), validates=False, tmp_path=tmp_path)
    check(EarlyStopping("train/loss"), BestCheckpoint(), validates=False, tmp_path=tmp_path)


@pytest.mark.parametrize("other", [Own(), LearningRateMonitor()])
def test_what_others_may_log_is_not_refused(other, tmp_path):
    check(EarlyStopping("val/mine"), other, tmp_path=tmp_path)
    check(EarlyStopping("val/mine", strict=False), tmp_path=tmp_path)
    check(EarlyStopping("train/grad_norm"), tmp_path=tmp_path)
