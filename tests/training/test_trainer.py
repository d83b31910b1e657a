"""Options of the trainer do what they say, or are refused in one sentence."""

import inspect
import json
import os
import signal
from typing import Union

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ProgressBar
from torch.utils.data import DataLoader, IterableDataset

from tests.training.toy import command
from unclip_pl.cli.lightning import expand_resume, main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.training.progress import Progress
from unclip_pl.training.trainer import explain_error

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
    """The types of Lightning's trainer after another package used `Optional[Union[float, int]]`.

    `typing` caches the first spelling and returns it for both.
    """
    annotations = inspect.unwrap(pl.Trainer.__init__).__annotations__
    for name in [name for name in annotations if name.startswith("limit_")]:
        # Not what `|` makes
        monkeypatch.setitem(annotations, name, Union[float, int, None])  # noqa: UP007


def test_one_batch_is_one_batch(tmp_path, fractions_first):
    flags = ["--trainer.limit_val_batches", "1", "--trainer.limit_train_batches", "1"]
    cli = build_cli(command(tmp_path, *WATCHED, *flags, steps=3))
    assert cli.trainer.current_epoch == 3 and count(cli).validated == 3


def test_validation_comes_every_so_many_steps_whatever_is_accumulated(tmp_path):
    flags = [*OFTEN, "--trainer.limit_val_batches", "1", "--trainer.accumulate_grad_batches", "3"]
    flags += ["--trainer.check_val_every_n_epoch", "null"]
    assert count(build_cli(command(tmp_path, *WATCHED, *flags, steps=4))).validated == 2


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
    config = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": options}
    return ["--trainer.callbacks+", json.dumps(config)]


@pytest.mark.parametrize(
    ("flags", "keyword"),
    [
        (["--trainer.gradient_clip_val", "0.5"], "model.optimizer.clip_norm"),
        (["--trainer.gradient_clip_algorithm", "value"], "model.optimizer.clip_norm"),
        (["--trainer.overfit_batches", "0.5"], "trainer.overfit_batches"),
        (["--trainer.overfit_batches", "90"], "50 batches"),
        (["--trainer.accelerator", "gpu"], "trainer.accelerator"),
        (["--trainer.devices", "0"], "trainer.devices is 0"),
        (["--trainer.devices", "-1"], "trainer.devices is -1"),
        (["--trainer.enable_checkpointing", "false"], "--trainer.fast_dev_run 2"),
        ([*DATA, "--trainer.val_check_interval", "900"], "`val_check_interval`"),
        ([*DATA, "--trainer.val_check_interval", "banana"], "banana"),
        (["--trainer.limit_val_batches", "1.5"], "limit_val_batches"),
        (["--trainer.max_time", "banana"], "max_time"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches"),
        (["--trainer.strategy", "ddp_spawn"], "ddp_spawn"),
        (["--trainer.precision", "fp8"], "trainer.precision is fp8: give one of int, 'transf"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval is 0"),
        (["--pictures.count", "-1"], "pictures.count is -1"),
        (["--trainer.default_root_dir", __file__], "test_trainer.py is a file"),
        (["--trainer.logger", "CometLogger"], "comet"),
        (["--seed_everything", "-5"], "seed_everything"),
        (["--seed_everything", "4294967296"], "seed_everything"),
        (["--best.mode", "least"], "least"),
        (["--model.optimizer.lr", "-1"], "optimizer.lr"),
        (["--model.optimizer.betas", "[0.9, 1.5]"], "optimizer.betas"),
        (["--model.optimizer.clip_norm", "0"], "optimizer.clip_norm"),
        (callback("StochasticWeightAveraging", swa_lrs=0.1), "ema.decay"),
        ([*callback("EarlyStopping", monitor="val_loss"), *DATA, *OFTEN], "val_loss"),
        ([*DATA, *OFTEN, "--best.monitor", "val/lss"], "val/lss"),
        (["-c", "lightning_config/lora.yaml"], "starts from scratch: give --init"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_one_sentence(
    flags, keyword, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert main(command(tmp_path, *flags)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning: ") and keyword in last


@pytest.mark.parametrize(
    ("subcommand", "keyword"),
    [("test", "lightning validate"), ("predict", "unclip generate"), ("validate", "weights")],
)
def test_a_subcommand_that_a_stage_lacks_is_one_sentence(subcommand, keyword, tmp_path, capsys):
    assert main([subcommand, *command(tmp_path, *DATA)[1:]]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning: ") and keyword in last


def test_the_learning_rate_finder_sets_the_rate_of_the_optimizer(tmp_path):
    flags = [*callback("LearningRateFinder", num_training_steps=20, max_lr=0.5), *WATCHED]
    cli = build_cli(command(tmp_path, *flags, steps=4))
    (finder,) = [each for each in cli.trainer.callbacks if isinstance(each, LearningRateFinder)]
    assert cli.model.lr == finder.optimal_lr.suggestion() != 0.1
    saved = read_checkpoint(newest_checkpoint(tmp_path))
    assert saved["lr_schedulers"][0]["base_lrs"] == [cli.model.lr] * 2
    assert saved["hyper_parameters"]["optimizer"]["lr"] == cli.model.lr
    assert cli.trainer.global_step == 4 and not list(tmp_path.glob(".lr_find*"))


def test_the_batch_size_finder_sets_the_batch_size(tmp_path):
    flags = callback("BatchSizeFinder", steps_per_trial=1, max_trials=3)
    cli = build_cli(command(tmp_path, *flags, *WATCHED, steps=4))
    assert cli.datamodule.batch_size == 8 and len(count(cli).keys[-1]) == 8
    keys = [key for batch in count(cli).keys for key in batch]
    assert len(set(keys)) == len(keys) and cli.trainer.global_step == 4
    assert not list(tmp_path.glob(".scale*"))


@pytest.mark.parametrize("length", [0, 5000])
def test_a_cut_checkpoint_is_one_sentence(length, tmp_path, capsys):
    build_cli(command(tmp_path / "a", steps=1))
    whole = newest_checkpoint(tmp_path / "a").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: min(length, len(whole) // 2)])
    assert main(command(tmp_path / "b", "--ckpt_path", str(tmp_path / "cut.ckpt"))) == 1
    assert "cut.ckpt is no whole checkpoint (" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags", [["--trainer.callbacks", "null"], callback("TQDMProgressBar")])
def test_the_users_callbacks_replace_the_default_ones(flags, tmp_path):
    flags = [*flags, "--trainer.enable_progress_bar", "true"]
    cli = build_cli(command(tmp_path, *flags, steps=1))
    bars = [each for each in cli.trainer.callbacks if isinstance(each, ProgressBar)]
    assert len(bars) == 1 and not isinstance(bars[0], Progress)


class Killed(IterableDataset):
    """Its reader is killed, as the kernel does where memory runs out."""

    def __iter__(self):
        yield 0
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_was_killed_is_one_sentence():
    with pytest.raises(RuntimeError) as raised:
        list(DataLoader(Killed(), num_workers=1))
    sentence = explain_error(raised.value)
    assert "is gone" in sentence and "--data.loader.num_workers" in sentence
