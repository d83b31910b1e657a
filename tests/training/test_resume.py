"""A resumed run uses its own settings, says so, and leaves other runs as they are."""

import shutil

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.factories import tiny_stage
from tests.training.toy import Toy, command, loader, trainer
from unclip_pl.cli.lightning import main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint, step_of
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.settings import settings_of
from unclip_pl.stages.upsampler import Upsampler256
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.utils.errors import UserError

VALIDATED = ("--data", "tests.training.toy.ToyRowsAndMore", "--trainer.limit_val_batches", "2")


class Groups(Callback):
    """The optimizer's parameter groups at each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([dict(group, params=None) for group in optimizer.param_groups])


def first_part(folder, **optimizer):
    config = OptimizerConfig(**{"lr": 0.1, "warmup_steps": 2, "decay": "cosine"} | optimizer)
    trainer(folder, NewestCheckpoint(4), steps=4).fit(Toy(optimizer=config), loader())
    return newest_checkpoint(folder)


def test_optimizer_settings_of_the_command_line_win_over_the_checkpoints(tmp_path, caplog):
    path = first_part(tmp_path)
    config = {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}
    config = OptimizerConfig(lr=0.02, warmup_steps=2, decay="cosine", **config)
    groups = Groups()
    run = trainer(tmp_path, NewestCheckpoint(4), groups, steps=8)
    with caplog.at_level("INFO"):
        run.fit(module := Toy(optimizer=config), loader(), ckpt_path=path)
    for step, seen in enumerate(groups.seen, start=4):
        for group in seen:
            assert group["lr"] == pytest.approx(0.02 * module.lr_factor(step))
            assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-5
        assert [group["weight_decay"] for group in seen] == [0.3, 0.0]
    saved = read_checkpoint(newest_checkpoint(tmp_path))
    assert saved["lr_schedulers"][0]["base_lrs"] == [0.02, 0.02]
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.02
    (line,) = [text for text in caplog.messages if "other settings" in text]
    assert "model.optimizer.lr 0.02 (it was 0.1)" in line and "optimizer.eps 1e-05" in line
    assert "warmup_steps" not in line


def test_the_same_settings_go_on_without_a_word(tmp_path, caplog):
    path, groups = first_part(tmp_path), Groups()
    config = OptimizerConfig(lr=0.1, warmup_steps=2, decay="cosine")
    with caplog.at_level("INFO"):
        trainer(tmp_path, groups, steps=8).fit(Toy(optimizer=config), loader(), ckpt_path=path)
    assert not [text for text in caplog.messages if "other settings" in text]
    whole = Groups()
    trainer(tmp_path, whole, steps=8).fit(Toy(optimizer=config), loader())
    assert groups.seen == whole.seen[4:]


def test_another_optimizer_is_a_sentence(tmp_path):
    path = first_part(tmp_path)
    module = Toy(optimizer=OptimizerConfig(name="muon"))
    with pytest.raises(UserError, match=r"optimizer\.name adamw.*--init"):
        trainer(tmp_path, steps=8).fit(module, loader(), ckpt_path=path)


def test_patience_of_the_command_line_wins(tmp_path):
    flags = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    stop = EarlyStopping("val/loss", patience=50)
    trainer(tmp_path, NewestCheckpoint(4), stop, steps=4, **flags).fit(Toy(), loader(), loader())
    stop = EarlyStopping("val/loss", patience=7)
    run = trainer(tmp_path, stop, steps=6, **flags)
    run.fit(Toy(), loader(), loader(), ckpt_path=newest_checkpoint(tmp_path))
    assert stop.patience == 7 and stop.best_score < torch.inf


def test_another_model_than_the_checkpoints_is_one_sentence(tmp_path):
    path = first_part(tmp_path)
    config = OptimizerConfig(lr=0.1)
    for module, words in [
        (Toy(width=5, optimizer=config), r"model\.width 4"),
        (Toy(noise=0.5, optimizer=config), r"model\.noise 0\.01"),
    ]:
        with pytest.raises(UserError, match=words) as raised:
            trainer(tmp_path, steps=8).fit(module, loader(), ckpt_path=path)
        assert "\n" not in str(raised.value)
        with pytest.raises(UserError, match=words):
            trainer(tmp_path).validate(module, loader(), ckpt_path=path)


def test_the_parametrization_must_be_that_of_the_checkpoint():
    """Nothing in the shapes of the weights shows it."""
    saved: dict = {}
    tiny_stage("decoder", parametrization="x0").on_save_checkpoint(saved)
    saved["hyper_parameters"] = dict(tiny_stage("decoder", parametrization="x0").hparams)
    with pytest.raises(UserError, match=r"diffusion\.parametrization"):
        tiny_stage("decoder", parametrization="v").on_load_checkpoint(saved)
    tiny_stage("decoder", "full", parametrization="x0", dropout=0.3).on_load_checkpoint(saved)


def test_settings_of_an_older_version_are_at_their_defaults():
    settings = settings_of(Toy, {"width": 5, "optimizer": {"lr": 0.3}})
    assert settings["noise"] == 0.01 and settings["optimizer"]["betas"] == [0.9, 0.999]
    assert settings_of(Upsampler256, {})["clamp_condition"] is True
    with pytest.raises(UserError, match=r"model\.optimizer"):
        settings_of(Toy, {"optimizer": {"speed": 1}})


def test_validate_takes_the_checkpoints_own_model_unless_told_otherwise(tmp_path, capsys):
    assert main(command(tmp_path, *VALIDATED, "--model.noise", "0.5", steps=2)) == 0
    look = ["validate", *command(tmp_path, *VALIDATED)[1:], "--ckpt_path", "last"]
    assert build_cli(look).model.noise == 0.5
    assert main([*look, "--model.noise", "0.2"]) == 1
    assert "model.noise 0.5" in capsys.readouterr().err


def test_curves_of_a_run_that_was_killed_do_not_go_back(tmp_path):
    flags = ["--trainer.log_every_n_steps", "1", "--newest.every_n_train_steps", "3"]
    assert main(command(tmp_path, *flags, steps=4)) == 0
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "kept")
    resume = ["--resume", "auto", *flags]
    assert main(command(tmp_path, *resume, steps=9)) == 0
    shutil.rmtree(tmp_path / "checkpoints")  # as if it was killed before the next one
    (tmp_path / "kept").rename(tmp_path / "checkpoints")
    assert main(command(tmp_path, *resume, steps=7)) == 0
    curves = EventAccumulator(str(tmp_path)).Reload()
    steps = [event.step for event in curves.Scalars("train/loss")]
    assert steps in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 4, 5, 6])


def test_other_data_and_averages_than_the_runs_are_named(tmp_path, caplog, capsys):
    ended = [*VALIDATED, "--trainer.val_check_interval", "2"]
    assert main(command(tmp_path, *ended, steps=4)) == 0
    caplog.clear()
    other = ["--data.batch_size", "2", "--ema.decay", "0.5", "--resume", "auto"]
    assert main(command(tmp_path, *ended, *other, steps=4)) == 0
    assert (
        f"Other options than those of {tmp_path}: data.batch_size 2 (it was 4), ema.decay 0.5 "
        "(it was 0.9999)." in caplog.text
    )
    assert "newest-step=4.ckpt is at step 4 already: give --trainer.max_steps" in caplog.text
    caplog.clear()
    words = [*command(tmp_path, *VALIDATED)[1:], "--data.size", "40", "--ckpt_path", "last"]
    assert main(["validate", *words]) == 0
    assert "data.size 40 (it was 200)" in caplog.text


class TimeIsUp(Callback):
    """Asks to stop once, after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer, *_, **__) -> None:
        self.left -= 1
        trainer.should_stop |= self.left == 0


def test_a_run_whose_time_is_up_between_two_steps_ends_the_step_and_goes_on_exactly(tmp_path):
    accumulate = ["--trainer.accumulate_grad_batches", "4", "--newest.every_n_train_steps", "9"]

    def run(folder, *flags: str) -> dict:
        assert main(command(folder, *accumulate, *flags, steps=3)) == 0
        return read_checkpoint(newest_checkpoint(folder))

    callback = '{"class_path": "tests.training.test_resume.TimeIsUp", "init_args": {"batches": 6}}'
    stopped = run(tmp_path / "stopped", "--trainer.callbacks+", callback)
    assert stopped["global_step"] == 2
    resumed, whole = run(tmp_path / "stopped", "--resume", "auto"), run(tmp_path / "whole")
    assert resumed["global_step"] == whole["global_step"] == 3
    for name, weight in whole["current_model_state"].items():
        assert torch.equal(resumed["current_model_state"][name], weight), name


def test_max_time_is_that_of_one_start(tmp_path):
    flags = ["--trainer.max_time", "00:00:00:02", "--trainer.callbacks+=tests.training.toy.Slow"]
    assert main(command(tmp_path, *flags, steps=1000)) == 0
    first = step_of(newest_checkpoint(tmp_path))
    assert 0 < first < 100
    assert main(command(tmp_path, *flags, "--resume", "auto", steps=1000)) == 0
    assert step_of(newest_checkpoint(tmp_path)) > first + 5
