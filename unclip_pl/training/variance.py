"""The statistic of the analytic variance (Analytic-DPM), estimated once when a diffusion prior's training ends, or later for a checkpoint."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip_pl.cluster.checkpoint_io import change_checkpoint, checkpoint_folder, read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import whole_tensors
from unclip_pl.training.checkpoints import BestCheckpoint, NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.training.protocols import Estimates
from unclip_pl.utils.signals import StopRequest, stop_state


class AnalyticVariance(Callback):
    """When training ends: `estimate_variance` of the stage with the EMA weights, on training data, for the newest checkpoint and for the best.

    Other checkpoints have none: see `add_variance`. The place in the data is not moved.

    Args:
        captions: how many samples to estimate from, on each rank.
        draws: how often each timestep is looked at.
    """

    def __init__(self, captions: int = 512, draws: int = 10) -> None:
        if captions < 1 or draws < 1:
            raise ValueError(
                f"AnalyticVariance was given captions {captions} and draws {draws}: give 1 or more of both."
            )
        self.captions, self.draws = captions, draws

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cast(Estimates, pl_module).x0_error.fill_(
            torch.nan
        )  # of the weights with which an earlier run ended

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning sets these outside of the class, so that its types do not know them.
        data, callbacks = trainer.datamodule, trainer.callbacks  # type: ignore[attr-defined]
        if data is None or trainer.fast_dev_run or stop_state.agreed > StopRequest.INTERRUPT:  # type: ignore[attr-defined]  # a batch system waits for us to end
            return
        batches, missing = [], self.captions
        for batch in data.train_dataloader():
            part = {key: value[:missing] for key, value in batch.items()}
            part = data.on_after_batch_transfer(
                data.transfer_batch_to_device(part, pl_module.device, 0), 0
            )
            batches.append(part)
            missing -= len(part["key"])
            if missing <= 0:
                break
        watched = cast(Estimates, pl_module)
        ema = next((callback for callback in callbacks if isinstance(callback, EMA)), None)
        with ema.applied(pl_module) if ema else nullcontext():
            watched.estimate_variance(batches, self.draws)
        watched.x0_error.copy_(trainer.strategy.reduce(watched.x0_error.clone(), reduce_op="mean"))
        for callback in callbacks if trainer.is_global_zero else []:
            newest = checkpoint_folder(trainer) / f"newest-step={trainer.global_step}.ckpt"
            if isinstance(callback, NewestCheckpoint) and newest.exists():
                _write(newest, watched.x0_error)  # was written before training ended
            elif isinstance(callback, BestCheckpoint) and callback.best_model_path:
                stage = type(pl_module)(**pl_module.hparams).to(pl_module.device)
                add_variance(callback.best_model_path, stage, batches, self.draws)


def add_variance(
    path: str | os.PathLike,
    stage: LightningModule,
    batches: Sequence[dict[str, Tensor]],
    draws: int = 10,
) -> None:
    """Estimate the statistic for a checkpoint that lacks it and write it in; the file is replaced atomically.

    Args:
        path: a checkpoint of `stage`'s class and sizes.
        stage: takes the checkpoint's (EMA) weights.
        batches: of training data, on the stage's device.
        draws: how often each timestep is looked at.
    """
    stage.load_state_dict(read_checkpoint(path, target=whole_tensors("state_dict"))["state_dict"])
    watched = cast(Estimates, stage)
    watched.estimate_variance(batches, draws)
    _write(path, watched.x0_error)


def _write(path: str | os.PathLike, x0_error: Tensor) -> None:
    def change(checkpoint: dict) -> None:
        for part in ("state_dict", "current_model_state"):
            if part in checkpoint:
                checkpoint[part]["x0_error"] = x0_error.cpu().clone()

    change_checkpoint(path, change)
