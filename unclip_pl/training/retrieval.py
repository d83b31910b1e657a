"""How well a CLIP finds the caption of a held-out image among all of them, and the image of a caption (R@k, CLIP section 3.1)."""

from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip_pl.training.protocols import Embeds


def recall_at(similarity: Tensor, k: int) -> Tensor:
    """(N, N) with the right answers on the diagonal -> share of rows whose right answer is among the k best; ties count against it."""
    right = similarity.diagonal()[:, None]
    better = (similarity >= right).sum(1) - 1
    return (better < k).float().mean()


class Retrieval(Callback):
    """Logs `val/image_to_text_r1`, `_r5`, `val/text_to_image_r1`, `_r5` over the whole validation set (of each rank, averaged)."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pairs = []

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
        self._pairs.append(cast(Embeds, pl_module).embed(batch["image"], batch["tokens"]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        image, text = (torch.cat(side).float() for side in zip(*self._pairs, strict=True))
        for name, similarity in {
            "image_to_text": image @ text.T,
            "text_to_image": text @ image.T,
        }.items():
            for k in (1, 5):
                pl_module.log(
                    f"val/{name}_r{k}", recall_at(similarity, k), sync_dist=True, prog_bar=k == 1
                )
