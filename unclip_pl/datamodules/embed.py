"""The data job `lightning predict -c stages/embed.yaml`: CLIP embeddings of tar shards into a store, over any number of ranks."""

from lightning.pytorch import LightningModule

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.shards import ErrorBudget
from unclip_pl.data.text_tokens import ensure_text_tokens


class Embed(LightningModule):
    """Has nothing to train: each rank embeds its share of the shards; when all have, rank 0 writes the manifest.

    Args:
        batch_size: images that go through CLIP at a time.
        max_bad_rate: largest share of samples that may be unusable before the job stops.
    """

    def __init__(self, batch_size: int = 256, max_bad_rate: float = 0.01) -> None:
        super().__init__()
        self.batch_size, self.max_bad_rate = batch_size, max_bad_rate
        self._clip: list[FrozenCLIP] = []  # in a list, so that it is no part of the module

    def on_predict_start(self) -> None:
        self._clip = [FrozenCLIP(self.trainer.datamodule.clip_config, self.device)]  # type: ignore[attr-defined]  # Lightning sets it outside of the class

    def predict_step(self, shards: list[str], batch_idx: int) -> int:
        """Fill the store with this rank's shards; returns how many it embedded."""
        budget = ErrorBudget(self.max_bad_rate, "model.max_bad_rate")
        store, rank_zero = self.trainer.datamodule.store, self.trainer.is_global_zero  # type: ignore[attr-defined]
        count = store.embed(
            shards, self._clip[0], self.batch_size, progress=rank_zero, budget=budget
        )
        length = self.trainer.datamodule.text_length  # type: ignore[attr-defined]
        if length is not None:
            ensure_text_tokens(store, shards, length)
        print(
            f"rank {self.trainer.global_rank}: {count} of {len(shards)} shards embedded now, {budget.bad} bad samples"
        )
        return count

    def on_predict_end(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            data.store.finish(data.shards, self._clip[0])
            print(
                f"{data.store.folder}: {sum(data.store.rows(data.shards))} rows of {len(data.shards)} shards"
            )
