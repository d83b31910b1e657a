"""Image-text retrieval of a CLIP on the validation set (R@k, CLIP section 3.1)."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip_pl.training.prior_monitor import ranks


def recall_at(similarity: Tensor, k: int) -> Tensor:
    """The share of rows whose right answer is among the k best; ties count against it.

    Args:
        similarity: (N, N), with the right answers on the diagonal.
        k: how many answers count.
    """
    return (ranks(similarity) <= k).float().mean()


class Retrieval(Callback):
    """Logs R@1 and R@5 over the validation set of each rank, averaged over ranks.

    The names are `val/image_to_text_r1`, `val/text_to_image_r1` and the same with `_r5`.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pairs = []

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
        self._pairs.append(pl_module.embed(batch["image"], batch["tokens"]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        image, text = (torch.cat(side).float() for side in zip(*self._pairs, strict=True))
        similarities = {"image_to_text": image @ text.T, "text_to_image": text @ image.T}
        for name, similarity in similarities.items():
            for k in (1, 5):
                recall = recall_at(similarity, k)
                pl_module.log(f"val/{name}_r{k}", recall, sync_dist=True, prog_bar=k == 1)

    def logged_names(self, stage: object) -> set[str]:
        """What this callback logs, for `training.monitored`."""
        directions = ("image_to_text", "text_to_image")
        return {f"val/{direction}_r{k}" for direction in directions for k in (1, 5)}
