"""At every validation: what the stage draws for held-out samples, below the originals, as a PNG and in TensorBoard."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from unclip_pl.diffusion.noise import Noise
from unclip_pl.images import grid, save_png
from unclip_pl.training.needs import Draws


class Pictures(Callback):
    """Draws with the weights that validation uses (the EMA), always the same samples from the same noise; not for data without images.

    Args:
        count: how many held-out samples; 0 draws none.
        seed: the noise of sample k comes from `seed + k`.
    """

    def __init__(self, count: int = 12, seed: int = 0) -> None:
        self.count = count
        self.seed = seed

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or not self.count or "image" not in batch or trainer.sanity_checking:
            return
        batch = {key: value[: self.count] for key, value in batch.items()}
        noise = Noise(range(self.seed, self.seed + len(batch["key"])))
        rows = {"held out": batch["image"], "drawn": cast(Draws, pl_module).sample(batch, noise)}  # on all ranks: where weights are sharded each is needed
        if not trainer.is_global_zero:
            return
        picture = grid(list(rows.values()), list(rows))
        save_png(picture, Path(trainer.default_root_dir) / "pictures" / f"step-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            experiment = logger.experiment  # type: ignore[attr-defined]  # all of Lightning's loggers have it, their base class does not say so
            if hasattr(experiment, "add_image"):
                experiment.add_image("held out / drawn", np.asarray(picture), trainer.global_step, dataformats="HWC")
