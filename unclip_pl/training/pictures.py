"""At every validation: what the stage draws for held-out samples, below the originals, as a PNG and in TensorBoard.

Of an upsampler also what it was given, as its network sees it, with the PSNR of both: `val/psnr` and `val/psnr_bicubic`.
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.training.protocols import Draws, Upsamples
from unclip_pl.utils.images import grid, psnr, save_png


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
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or not self.count or "image" not in batch or trainer.sanity_checking:
            return
        batch = {key: value[: self.count] for key, value in batch.items()}
        noise = Noise(range(self.seed, self.seed + len(batch["key"])))
        drawn = cast(Draws, pl_module).sample(
            batch, noise
        )  # on all ranks: where weights are sharded, each is needed
        if not trainer.is_global_zero:
            return
        if "low_res" in batch:
            rows = self._upsampled(pl_module, drawn, batch)
        else:
            rows = {"held out": batch["image"], "drawn": drawn}
        picture = grid(list(rows.values()), list(rows))
        save_png(
            picture,
            Path(trainer.default_root_dir) / "pictures" / f"step-{trainer.global_step:07d}.png",
        )
        for logger in trainer.loggers:
            experiment = logger.experiment  # type: ignore[attr-defined]  # all of Lightning's loggers have it, their base class does not say so
            if hasattr(experiment, "add_image"):
                experiment.add_image(
                    " / ".join(name.split(",")[0] for name in rows),
                    np.asarray(picture),
                    trainer.global_step,
                    dataformats="HWC",
                )

    def _upsampled(
        self, pl_module: LightningModule, drawn: Tensor, batch: dict
    ) -> dict[str, Tensor]:
        """The rows for an upsampler; logs the mean PSNR of its bicubic condition and of what it has drawn."""
        bicubic = cast(Upsamples, pl_module).enlarged(batch["low_res"]).clamp(-1, 1)
        values = {
            "psnr_bicubic": psnr(bicubic, batch["image"]).mean(),
            "psnr": psnr(drawn, batch["image"]).mean(),
        }
        pl_module.log_dict(
            {f"val/{name}": value for name, value in values.items()},
            batch_size=len(drawn),
            rank_zero_only=True,
        )
        bicubic_label, drawn_label = (
            f"{name}, {value:.2f} dB"
            for name, value in zip(("bicubic", "drawn"), values.values(), strict=True)
        )
        return {bicubic_label: bicubic, drawn_label: drawn, "held out": batch["image"]}
