"""Exponential moving average of the weights (Table 3: d = 0.9999).

After each optimiser step theta_ema <- d theta_ema + (1 - d) theta. After n steps d is at most
(1 + n) / (10 + n), so that the average of a short run is not dominated by its initial weights.
Buffers are not averaged. The update is one foreach operation and does not wait for the device.

In a checkpoint `state_dict` is the average and `current_model_state` the raw weights that the
optimiser works on. Lightning's WeightAveraging is not used: it cannot average FSDP2's shards, and
after an error during validation it leaves the average in place of the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from unclip_pl.cluster.sharded import reshard


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA(Callback):
    """Averages the weights during training.

    Validation, pictures, checkpoints and releases use the average; training goes on with the raw
    weights.

    Args:
        decay: d in [0, 1), the weight of the old average at each optimiser step. After n steps
            it is at most (1 + n) / (10 + n), so that the average forgets the start sooner.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"ema.decay is {decay}: give a number from 0 to below 1, such as 0.9999."
            )
        self.decay = decay
        self.updates = 0
        self._averages: dict[str, Tensor] = {}
        self._swapped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            average = self._averages.get(name, parameter.detach())
            self._averages[name] = average.to(parameter.device, copy=True)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_, **__) -> None:
        if trainer.global_step <= self.updates:  # gradients are still being accumulated
            return
        self.updates = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [_local(parameter.detach()) for _, parameter in pl_module.named_parameters()]
        averages = [_local(average) for average in self._averages.values()]
        torch._foreach_lerp_(averages, current, 1 - decay)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.updates and self._averages:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap(pl_module)

    @contextmanager
    def applied(self, pl_module: LightningModule) -> Iterator[None]:
        """A context in which the module has the average as its weights.

        Before the first update there is no average, and the weights stay as they are.
        """
        swap = bool(self.updates and self._averages) and not self._swapped
        if swap:
            self._swap(pl_module)
        try:
            yield
        finally:
            if swap:
                self._swap(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._swapped:  # an error during validation
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        reshard(pl_module)  # an error may have left a block with whole weights
        for name, parameter in pl_module.named_parameters():
            raw = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(raw)
        self._swapped = not self._swapped

    def state_dict(self) -> dict:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict) -> None:
        self.updates = state_dict["updates"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict
    ) -> None:
        if self._averages:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = checkpoint["state_dict"] | self._averages

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict
    ) -> None:
        if trainer.training and "current_model_state" in checkpoint:
            averages = checkpoint["state_dict"]
            self._averages = {name: averages[name] for name, _ in pl_module.named_parameters()}
            pl_module.load_state_dict(checkpoint["current_model_state"])
