"""Progress of a run: loss, images per second, time left, bad samples, loss by noise level."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

SECONDS_BETWEEN_RATES = 5.0
SECONDS_PER_DAY = 86400


class Progress(TQDMProgressBar):
    """Lightning's progress bar with more columns.

    `loss` is this rank's at the last logging and `val` the loss of the last validation, `images/s`
    the rate over all ranks, `left` the time to the last step, and `bad` the number of samples that
    this rank skipped so far. The rate and the number are logged as well. The device is waited for
    only where it is for the logs.

    Args:
        refresh_rate: steps between two updates of the bar.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._columns: dict[str, Any] = {}
        self._images = self._start_step = 0
        self._start_time = 0.0

    def _restart(self, trainer: Trainer) -> None:
        """Begin the measurement of the next rate."""
        self._start_time, self._start_step, self._images = time.monotonic(), trainer.global_step, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._restart(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
    ) -> None:
        self._images += len(batch["key"]) * trainer.world_size
        seconds = time.monotonic() - self._start_time
        steps = trainer.global_step - self._start_step
        if seconds > SECONDS_BETWEEN_RATES and steps > 0:
            rate = self._images / seconds
            self._columns["images/s"] = round(rate, 1)
            if trainer.max_steps > 0:
                left = (trainer.max_steps - trainer.global_step) * seconds / steps
                self._columns["left"] = _format_seconds(left)
            bad = float(_bad_samples(trainer))
            pl_module.log_dict({"train/images_per_second": rate, "train/bad_samples": bad})
            self._restart(trainer)
        if trainer._logger_connector.should_update_logs and outputs:
            # Lightning has divided it by the number of batches
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
            self._columns["loss"] = f"{loss:.4g}"
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (loss := trainer.callback_metrics.get("val/loss")) is not None:
            self._columns["val"] = f"{float(loss):.4g}"
        super().on_validation_end(trainer, pl_module)
        self._restart(trainer)  # validation does not count as training time

    def logged_names(self, stage: object) -> set[str]:
        """What this callback logs, for `training.monitored`."""
        return {"train/images_per_second", "train/bad_samples"}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        bad = _bad_samples(trainer)
        return self._columns | ({"bad": bad} if bad else {}) | metrics


def _format_seconds(seconds: float) -> str:
    if seconds < SECONDS_PER_DAY:
        return time.strftime("%H:%M:%S", time.gmtime(seconds))
    return f"{seconds / SECONDS_PER_DAY:.1f} days"


def _bad_samples(trainer: Trainer) -> int:
    return getattr(trainer.train_dataloader, "bad", 0)


class LossByTimestep(Callback):
    """Logs the mean loss in each quarter of the noise schedule since the last logging.

    `train/loss_q0` is the quarter with the least noise, `train/loss_q3` that with the most.
    A quarter of which there was no sample keeps the value that it had.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (2, 4): of the losses, and how many they are
        self._step = 0

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict,
        batch_idx: int,
    ) -> None:
        if "per_sample" not in outputs:
            return
        t, loss = outputs["t"], outputs["per_sample"].detach()
        if self._sums is None:
            self._sums = torch.zeros(2, 4, device=loss.device)
        quarter = t * 4 // pl_module.process.config.timesteps
        self._sums.index_add_(1, quarter, torch.stack([loss, torch.ones_like(loss)]))
        accumulating = trainer.global_step == self._step
        self._step = trainer.global_step
        if trainer._logger_connector.should_update_logs and not accumulating:
            sums, counts = self._sums.tolist()
            means = {f"train/loss_q{i}": sums[i] / counts[i] for i in range(4) if counts[i]}
            pl_module.log_dict(means)
            self._sums.zero_()

    def logged_names(self, stage: object) -> set[str]:
        """What this callback logs, for `training.monitored`."""
        return {f"train/loss_q{i}" for i in range(4)} if hasattr(stage, "process") else set()
