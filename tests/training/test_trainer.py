"""Options of the trainer mean what they say, or are refused in one sentence."""

import inspect
import json
from typing import Union

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ProgressBar

from tests.training.toy import command
from unclip_pl.cli.lightning import expand_resume, main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.training.progress import Progress

OFTEN = ["--trainer.val_check_interval", "2"]
DATA = ["--data", "tests.training.toy.ToyRowsAndMore"]


class Count(Callback):
    """Keys of the batches that were trained on, and how many were validated on."""

    def __init__(self):
        self.keys, self.validated = [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.keys.append(batch["key"])

    def on_validation_batch_start(self, *_, **__):
        self.validated += 1


WATCHED = [*DATA, "--trainer.callbacks+", "tests.training.test_trainer.Count"]


def count(cli) -> Count:
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, Count))


@pytest.fixture
def fractions_first(monkeypatch):
    """The types of Lightning's trainer as they are where `Optional[Union[float, int]]` was named
    before by another package: `typing` gives the first one for both."""
    annotations = inspect.unwrap(pl.Trainer.__init__).__annotations__
    for name in [name for name in annotations if name.startswith("limit_")]:
        monkeypatch.setitem(annotations, name, Union[float, int, None])  # noqa: UP007  # not what `|` makes


def test_one_batch_is_one_batch(tmp_path, fractions_first):
    flags = ["--trainer.limit_val_batches", "1", "--trainer.limit_train_batches", "1"]
    cli = build_cli(command(tmp_path, *WATCHED, *flags, steps=3))
    assert cli.trainer.current_epoch == 3 and count(cli).validated == 3


def test_a_fraction_is_a_fraction(tmp_path):
    flags = ["--trainer.limit_val_batches", "0.25", "--trainer.limit_train_batches", "2"]
    assert count(build_cli(command(tmp_path, *WATCHED, *flags, steps=2))).validated == 4


def test_overfitting_holds_the_first_batches(tmp_path):
    def keys(folder, *flags: str, steps: int) -> list:
        return count(build_cli(expand_resume(command(folder, *WATCHED, *flags, steps=steps)))).keys

    hold = ["--trainer.overfit_batches", "2"]
    first, second = keys(tmp_path / "all", steps=2)
    assert first != second
    assert keys(tmp_path, *hold, steps=5) == [first, second, first, second, first]
    goes_on = keys(tmp_path, *hold, "--resume", "auto", steps=8)  # in the middle of a pass
    assert goes_on == [second, first, second]


def callback(name: str, **options) -> list[str]:
    given = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": options}
    return ["--trainer.callbacks+", json.dumps(given)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trainer.gradient_clip_val", "0.5"], "model.optimizer.clip_norm"),
        (["--trainer.gradient_clip_algorithm", "value"], "model.optimizer.clip_norm"),
        (["--trainer.overfit_batches", "0.5"], "trainer.overfit_batches is 0.5"),
        (["--trainer.overfit_batches", "90"], "there are 50 batches"),
        (["--trainer.accelerator", "gpu"], "trainer.accelerator is gpu, and there is no GPU"),
        (["--trainer.devices", "0"], "trainer.devices is 0: on a CPU give"),
        (["--trainer.devices", "-1"], "trainer.devices is -1: on a CPU give"),
        (["--trainer.enable_checkpointing", "false"], "--trainer.fast_dev_run 2"),
        ([*DATA, "--trainer.val_check_interval", "900"], "`val_check_interval` (900) must be"),
        ([*DATA, "--trainer.val_check_interval", "banana"], "`val_check_interval`: 'banana'"),
        (["--trainer.limit_val_batches", "1.5"], "invalid value 1.5 for limit_val_batches"),
        (["--trainer.max_time", "banana"], "max_time='banana'"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches is 0: give 1 or"),
        (["--trainer.strategy", "ddp_spawn"], "trainer.strategy is ddp_spawn"),
        (["--seed_everything", "-5"], "seed_everything is -5: give a number from 0"),
        (["--seed_everything", "4294967296"], "seed_everything is 4294967296"),
        (["--best.mode", "least"], "can be min, max but got least"),
        (["--model.optimizer.lr", "-1"], "optimizer.lr is -1.0: give 0 or more"),
        (["--model.optimizer.betas", "[0.9, 1.5]"], "optimizer.betas is [0.9, 1.5]"),
        (["--model.optimizer.clip_norm", "0"], "optimizer.clip_norm is 0.0: give more than 0"),
        (callback("StochasticWeightAveraging", swa_lrs=0.1), "see ema.decay"),
        (callback("BatchSizeFinder"), "data.loader.batch_size"),
        (
            [*callback("EarlyStopping", monitor="val_loss"), *DATA, *OFTEN],
            "metric `val_loss` which is not available",
        ),
        ([*DATA, *OFTEN, "--best.monitor", "val/lss"], "monitor='val/lss'"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_one_sentence(
    flags, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert main(command(tmp_path, *flags)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning: ") and words in last


@pytest.mark.parametrize(
    ("subcommand", "words"),
    [
        ("test", "`lightning validate` measures its loss"),
        ("predict", "draw with `unclip generate`"),
        ("validate", "Without weights there is nothing to validate"),
    ],
)
def test_what_a_stage_cannot_be_asked_is_one_sentence(subcommand, words, tmp_path, capsys):
    assert main([subcommand, *command(tmp_path, *DATA)[1:]]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning: ") and words in last


def test_the_learning_rate_finder_sets_the_rate_of_the_optimizer(tmp_path):
    flags = [*callback("LearningRateFinder", num_training_steps=20, max_lr=0.5), *WATCHED]
    cli = build_cli(command(tmp_path, *flags, steps=4))
    (finder,) = [each for each in cli.trainer.callbacks if isinstance(each, LearningRateFinder)]
    assert cli.model.lr == finder.optimal_lr.suggestion() != 0.1
    saved = read_checkpoint(newest_checkpoint(tmp_path))
    assert saved["lr_schedulers"][0]["base_lrs"] == [cli.model.lr] * 2
    assert saved["hyper_parameters"]["optimizer"]["lr"] == cli.model.lr
    assert cli.trainer.global_step == 4 and not list(tmp_path.glob(".lr_find*"))


@pytest.mark.parametrize("given", [["--trainer.callbacks", "null"], callback("TQDMProgressBar")])
def test_callbacks_of_ones_own_take_the_place_of_ours(given, tmp_path):
    flags = [*given, "--trainer.enable_progress_bar", "true"]
    cli = build_cli(command(tmp_path, *flags, steps=1))
    bars = [each for each in cli.trainer.callbacks if isinstance(each, ProgressBar)]
    assert len(bars) == 1 and not isinstance(bars[0], Progress)
