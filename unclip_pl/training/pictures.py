"""Sample the stage at every validation: pictures of held-out samples next to the originals."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.utils.images import grid, psnr, save_png
from unclip_pl.utils.precision import autocast_of


class Pictures(Callback):
    """Draws held-out samples at every validation, as a PNG file and in TensorBoard.

    The weights are those of validation (the EMA), and samples and noise are always the same. For an
    upsampler the picture also has the bicubic enlargement, and the PSNR of both is logged as
    `val/psnr` and `val/psnr_bicubic`. Without images in the data nothing is drawn.

    Args:
        count: how many held-out samples; 0: none.
        seed: the noise of sample k comes from `seed + k`.
    """

    def __init__(self, count: int = 12, seed: int = 0) -> None:
        if count < 0:
            raise ValueError(f"pictures.count is {count}: give 0 (none) or more.")
        self.count = count
        self.seed = seed

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: object,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or not self.count or "image" not in batch or trainer.sanity_checking:
            return
        batch = {key: value[: self.count] for key, value in batch.items()}
        noise = Noise(range(self.seed, self.seed + len(batch["key"])))
        # Every rank samples, because all are needed where the weights are sharded.
        with autocast_of(trainer):
            drawn = pl_module.sample(batch, noise)
        if not trainer.is_global_zero:
            return
        if "low_res" in batch:
            rows = self._upsampler_rows(pl_module, drawn, batch)
        else:
            rows = {"held out": batch["image"], "drawn": drawn}
        picture = grid(list(rows.values()), list(rows))
        folder = Path(trainer.default_root_dir) / "pictures"
        save_png(picture, folder / f"step-{trainer.global_step:07d}.png")
        title = " / ".join(label.split(",")[0] for label in rows)
        self._log_picture(trainer, title, picture)

    def logged_names(self, stage: object) -> set[str]:
        """What this callback logs, for `training.monitored`."""
        draws = self.count and hasattr(stage, "enlarged")
        return {"val/psnr_bicubic", "val/psnr"} if draws else set()

    def _log_picture(self, trainer: Trainer, title: str, picture: Image.Image) -> None:
        """Send a picture to all loggers that take pictures."""
        for logger in trainer.loggers:
            # All of Lightning's loggers have it; their base class does not say so
            experiment = logger.experiment  # type: ignore[attr-defined]
            if hasattr(experiment, "add_image"):
                pixels = np.asarray(picture)
                experiment.add_image(title, pixels, trainer.global_step, dataformats="HWC")

    def _upsampler_rows(self, pl_module: Any, drawn: Tensor, batch: dict) -> dict[str, Tensor]:
        """The labelled rows of an upsampler's picture; logs the mean PSNR."""
        bicubic = pl_module.enlarged(batch["low_res"]).clamp(-1, 1)
        psnr_bicubic = psnr(bicubic, batch["image"]).mean()
        psnr_drawn = psnr(drawn, batch["image"]).mean()
        pl_module.log_dict(
            {"val/psnr_bicubic": psnr_bicubic, "val/psnr": psnr_drawn},
            batch_size=len(drawn),
            rank_zero_only=True,
        )
        return {
            f"bicubic, {psnr_bicubic:.2f} dB": bicubic,
            f"drawn, {psnr_drawn:.2f} dB": drawn,
            "held out": batch["image"],
        }
