"""The job `lightning predict -c stages/embed.yaml`: CLIP embeddings of tar shards into a store.

Any number of ranks can share it.
"""

from typing import cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.text_tokens import ensure_text_tokens
from unclip_pl.datamodules.base import Spec, resolve_shards
from unclip_pl.datamodules.image_embedding import default_store


class EmbeddingJobData(LightningDataModule):
    """For the module `Embed`: one item per rank, the list of its shards.

    The arguments are those of `ImageEmbeddingData`, so one overlay serves both.

    Args:
        train, val: shards to embed.
        image_size: of OpenMoji's drawings, in pixels; CLIP resizes to its own.
        clip: the CLIP that embeds.
        store: the folder to fill; by default the one that `ImageEmbeddingData` reads.
        text_length: tokenise the captions to this length as well, for the priors; the tars are read
            once more for it.
    """

    def __init__(
        self,
        train: Spec = "openmoji",
        val: Spec | None = "openmoji",
        image_size: int = 64,
        clip: CLIPConfig = CLIPConfig(),
        store: str | None = None,
        text_length: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.image_size = train, val, image_size
        self.clip_config, self.folder, self.text_length = clip, store, text_length
        self.shards: list[str] = []
        self.store: EmbeddingStore | None = None

    def prepare_data(self) -> None:
        self._resolve()

    def _resolve(self) -> list[str]:
        train = resolve_shards(self.train, "train", self.image_size)
        return train + resolve_shards(self.val, "val", self.image_size)

    def setup(self, stage: str) -> None:
        self.shards = self._resolve()
        self.store = EmbeddingStore(self.folder or default_store(self.shards, self.clip_config))

    def predict_dataloader(self) -> DataLoader:
        trainer = cast(Trainer, self.trainer)
        shards = self.shards[trainer.global_rank :: trainer.world_size]
        return DataLoader(cast(Dataset, [shards]), batch_size=None)  # a list does for a Dataset


class Embed(LightningModule):
    """Has nothing to train: each rank embeds its shards, and then rank 0 writes the manifest.

    Args:
        batch_size: images that go through CLIP at a time.
        max_bad_rate: largest share of samples that may be unusable before the job stops.
    """

    def __init__(self, batch_size: int = 256, max_bad_rate: float = 0.01) -> None:
        super().__init__()
        self.batch_size, self.max_bad_rate = batch_size, max_bad_rate
        self._clip: list[FrozenCLIP] = []  # in a list, so that it is no part of the module

    @property
    def _data(self) -> EmbeddingJobData:
        # Lightning sets it outside of the class
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_predict_start(self) -> None:
        self._clip = [FrozenCLIP(self._data.clip_config, self.device)]

    def predict_step(self, shards: list[str], batch_idx: int) -> int:
        """Fill the store with this rank's shards; returns how many it embedded."""
        store = cast(EmbeddingStore, self._data.store)
        counter = BadSampleCounter(self.max_bad_rate, "model.max_bad_rate")
        count = store.embed(
            shards,
            self._clip[0],
            self.batch_size,
            progress=self.trainer.is_global_zero,
            counter=counter,
        )
        if self._data.text_length is not None:
            ensure_text_tokens(store, shards, self._data.text_length)
        print(
            f"rank {self.trainer.global_rank}: {count} of {len(shards)} shards embedded now, "
            f"{counter.bad} bad samples"
        )
        return count

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier()
        if not self.trainer.is_global_zero:
            return
        store, shards = cast(EmbeddingStore, self._data.store), self._data.shards
        store.finish(shards, self._clip[0])
        rows = sum(store.row_counts(shards))
        print(f"{store.folder}: {rows} rows of {len(shards)} shards")
