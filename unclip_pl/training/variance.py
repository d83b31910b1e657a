"""Estimate the analytic variance (Analytic-DPM) at the end of training, or for a checkpoint."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor

from unclip_pl.cluster.checkpoint_io import change_checkpoint, checkpoint_folder, read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import whole_tensors
from unclip_pl.networks.lora import weights_of
from unclip_pl.training.checkpoints import BestCheckpoint, NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.utils.precision import autocast_of
from unclip_pl.utils.signals import StopRequest, stop_state


class AnalyticVariance(Callback):
    """Writes the statistic of the analytic variance into checkpoints when training ends.

    It is estimated on training data with the EMA weights, for the newest checkpoint and for the
    best. For other checkpoints there is `add_variance`. The position in the data does not move.

    Args:
        captions: samples per rank to estimate from.
        draws: how often each timestep is evaluated per sample.
    """

    def __init__(self, captions: int = 512, draws: int = 10) -> None:
        if captions < 1 or draws < 1:
            raise ValueError(
                f"AnalyticVariance has captions {captions} and draws {draws}: give 1 or more of "
                "both."
            )
        self.captions, self.draws = captions, draws

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # What an earlier run estimated belongs to the weights that it ended with.
        pl_module.x0_error.fill_(torch.nan)

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Lightning sets these outside of the class, so that its types do not know them.
        data, callbacks = trainer.datamodule, trainer.callbacks  # type: ignore[attr-defined]
        if data is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if stop_state.agreed > StopRequest.INTERRUPT:  # a batch system waits for this job to end
            return
        batches = self._first_batches(data, pl_module.device)
        ema = next((callback for callback in callbacks if isinstance(callback, EMA)), None)
        with autocast_of(trainer), ema.applied(pl_module) if ema else nullcontext():
            pl_module.estimate_variance(batches, self.draws)
        x0_error = pl_module.x0_error
        x0_error.copy_(trainer.strategy.reduce(x0_error.clone(), reduce_op="mean"))
        for callback in callbacks if trainer.is_global_zero else []:
            newest = checkpoint_folder(trainer) / f"newest-step={trainer.global_step}.ckpt"
            if isinstance(callback, NewestCheckpoint) and newest.exists():
                _write(newest, x0_error)  # was written before training ended
            elif isinstance(callback, BestCheckpoint) and callback.best_model_path:
                copy = type(pl_module)(**pl_module.hparams).to(pl_module.device)
                with autocast_of(trainer):
                    add_variance(callback.best_model_path, copy, batches, self.draws)

    def _first_batches(
        self, data: LightningDataModule, device: torch.device
    ) -> list[dict[str, Any]]:
        """Batches of the first `captions` training samples, on the device."""
        batches = []
        missing = self.captions
        for batch in data.train_dataloader():
            part = {key: value[:missing] for key, value in batch.items()}
            part = data.transfer_batch_to_device(part, device, 0)
            batches.append(data.on_after_batch_transfer(part, 0))
            missing -= len(part["key"])
            if missing <= 0:
                break
        return batches


def add_variance(
    path: str | os.PathLike,
    stage: Any,
    batches: Sequence[dict[str, Tensor]],
    draws: int = 10,
) -> None:
    """Estimate the statistic for a checkpoint and write it into the file, atomically.

    Args:
        path: a checkpoint of `stage`'s class and sizes.
        stage: receives the checkpoint's (EMA) weights, with adapters merged.
        batches: of training data, on the stage's device.
        draws: how often each timestep is evaluated per sample.
    """
    stage.load_state_dict(weights_of(read_checkpoint(path, target=whole_tensors("state_dict"))))
    stage.estimate_variance(batches, draws)
    _write(path, stage.x0_error)


def _write(path: str | os.PathLike, x0_error: Tensor) -> None:
    def change(checkpoint: dict) -> None:
        for part in ("state_dict", "current_model_state"):
            if part in checkpoint:
                checkpoint[part]["x0_error"] = x0_error.cpu().clone()

    change_checkpoint(path, change)
