"""Options of the trainer mean what they say, or are refused in one sentence."""

import inspect
from typing import Union

import lightning.pytorch as pl
import pytest
from lightning.pytorch import Callback

from tests.training.toy import command
from unclip_pl.cli import build_cli, main, resume

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
        return count(build_cli(resume(command(folder, *WATCHED, *flags, steps=steps)))).keys

    hold = ["--trainer.overfit_batches", "2"]
    first, second = keys(tmp_path / "all", steps=2)
    assert first != second
    assert keys(tmp_path, *hold, steps=5) == [first, second, first, second, first]
    goes_on = keys(tmp_path, *hold, "--resume", "auto", steps=8)  # in the middle of a pass
    assert goes_on == [second, first, second]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trainer.gradient_clip_val", "0.5"], "model.optimizer.clip_norm"),
        (["--trainer.gradient_clip_algorithm", "value"], "model.optimizer.clip_norm"),
        (["--trainer.overfit_batches", "0.5"], "trainer.overfit_batches is 0.5"),
        (["--trainer.overfit_batches", "90"], "there are 50 batches"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_one_sentence(flags, words, tmp_path, capsys):
    assert main(command(tmp_path, *flags)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning: ") and words in last
