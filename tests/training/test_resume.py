"""A run that goes on from a checkpoint uses its own settings, says so, and leaves other runs alone."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from tests.training.toy import Toy, loader, trainer
from unclip_pl.errors import UserError
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.training.checkpoint import NewestCheckpoint, newest_checkpoint, read_checkpoint


class Groups(Callback):
    """What the optimizer works with at each step."""

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
