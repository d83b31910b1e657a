"""What a run tells while it goes: images per second, time left and bad samples in the progress bar, and the loss by quarter of the schedule."""

import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from unclip_pl.training.protocols import Diffuses


class Progress(TQDMProgressBar):
    """Lightning's bar with `images/s` over all ranks, `left`, the time to the last step, and `bad`, the samples that this rank passed over so far.

    The rate and the count are logged as well. The count is a number that the loader keeps, so that showing it waits for nothing.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._mark = (0.0, 0)
        self._images = 0
        self._shown: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._mark, self._images = (time.monotonic(), trainer.global_step), 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
    ) -> None:
        self._images += len(batch["key"]) * trainer.world_size
        now, (then, step) = time.monotonic(), self._mark
        if now - then > 5 and trainer.global_step > step:
            rate = self._images / (now - then)
            self._shown = {"images/s": round(rate, 1)}
            if trainer.max_steps > 0:
                left = (
                    (trainer.max_steps - trainer.global_step)
                    * (now - then)
                    / (trainer.global_step - step)
                )
                self._shown["left"] = (
                    time.strftime("%H:%M:%S", time.gmtime(left))
                    if left < 86400
                    else f"{left / 86400:.1f} days"
                )
            pl_module.log_dict(
                {"train/images_per_second": rate, "train/bad_samples": float(_bad(trainer))}
            )
            self._mark, self._images = (now, trainer.global_step), 0
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._mark, self._images = (
            (time.monotonic(), trainer.global_step),
            0,
        )  # validation is not counted as training time

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        bad = _bad(trainer)
        return self._shown | ({"bad": bad} if bad else {}) | metrics


def _bad(trainer: Trainer) -> int:
    return getattr(trainer.train_dataloader, "bad", 0)


class LossByTimestep(Callback):
    """Logs the mean loss in each quarter of the schedule (`train/loss_q0` is the least noise), of the steps since it last did."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
    ) -> None:
        if "per_sample" not in outputs:
            return
        t, loss = outputs["t"], outputs["per_sample"].detach()
        if self._sums is None:
            self._sums = torch.zeros(2, 4, device=loss.device)
        quarter = t * 4 // cast(Diffuses, pl_module).process.config.timesteps
        self._sums.index_add_(1, quarter, torch.stack([loss, torch.ones_like(loss)]))
        if trainer._logger_connector.should_update_logs:
            means = self._sums[0] / self._sums[1].clamp(min=1)
            pl_module.log_dict({f"train/loss_q{i}": means[i] for i in range(4)})
            self._sums.zero_()
