"""Rows of the embedding store without images, to train priors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.data.embedding_loader import (
    EmbeddingLoader,
    EmbeddingTable,
    SequentialEmbeddingLoader,
)
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.data.names import is_url
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.store_statistics import Statistics
from unclip_pl.data.text_tokens import ensure_text_tokens
from unclip_pl.datamodules.base import Spec
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData


class PriorData(ImageEmbeddingData):
    """What the store holds, without the images, for the priors.

    A batch has `key` (list of B strings), `tokens` (B, L) int64, `text_mask` (B, L) bool,
    `text_embed` and `image_embed` (B, D) float32, and `text_tokens` if asked for. Training takes a
    new permutation of all rows in each epoch.

    The arguments are those of `ImageEmbeddingData`, so one overlay serves both. `image_size` is
    that of OpenMoji's drawings, which are embedded if the store lacks them.
    """

    # In place of LoaderConfig: whatever reads more than the two share is overridden here
    config: EmbeddingLoaderConfig  # type: ignore[assignment]

    def __init__(
        self,
        train: Spec = "openmoji",
        val: Spec | None = "openmoji",
        image_size: int = 64,
        clip: CLIPConfig = CLIPConfig(),
        loader: EmbeddingLoaderConfig = EmbeddingLoaderConfig(),
        store: str | None = None,
        text_states: bool = False,
        text_length: int | None = None,
    ) -> None:
        super().__init__(
            train,
            val,
            image_size,
            clip,
            loader,  # type: ignore[arg-type]  # see `config`
            store,
            text_states,
            text_length,
        )

    @property
    def reads_captions(self) -> bool:
        return True

    def prepare_data(self) -> None:
        if self._resolve_from_store():
            self.require_captions()
            return
        super().prepare_data()
        if self.text_length is not None:
            ensure_text_tokens(self.store, self._all_shards, self.text_length)

    def _resolve(self) -> None:
        if not self._resolve_from_store():
            super()._resolve()

    def _resolve_from_store(self) -> bool:
        """Take the shards' names from the store, and return whether this was possible.

        It is possible where the tars are gone and the store has their rows.
        """
        if not self.store_folder:
            return False
        store = EmbeddingStore(self.store_folder)
        if not store.files.exists("manifest.json"):
            return False
        manifest = store.manifest
        train, val = _names_in(self.train, manifest), _names_in(self.val, manifest)
        shards = train + val
        if not train or not set(shards) <= manifest["shards"].keys():
            return False
        if all(is_url(shard) or Path(shard).is_file() for shard in shards):
            return False
        where = f"The embedding store {store.folder}"
        require_same(manifest["clip"], self.clip.fingerprint(), where)
        self.train_shards, self.val_shards, self.store = train, val, store
        return True

    def statistics(self) -> Statistics:
        """Mean and covariance of the image embeddings to train on."""
        return self.store.statistics(self.train_shards)

    def _table(self, shards: Sequence[str]) -> EmbeddingTable:
        return EmbeddingTable(self.store, shards, self.clip.caption_mask, self.text_length)

    def _new_loader(self) -> EmbeddingLoader:
        table = self._table(self.train_shards)
        return EmbeddingLoader(table, self.config, **self._rank_and_world())

    def val_dataloader(self) -> SequentialEmbeddingLoader | list:
        if not self.val_shards:
            return []
        table = self._table(self.val_shards)
        return SequentialEmbeddingLoader(table, self.config.batch_size, **self._rank_and_world())


def _names_in(spec: Spec | None, manifest: dict[str, Any]) -> list[str]:
    """The names of shards that may be gone: patterns, or names as they stand in the manifest."""
    patterns = [spec] if isinstance(spec, str) else spec or []
    names: list[str] = []
    for pattern in patterns:
        names += [pattern] if pattern in manifest["shards"] else braceexpand(pattern)
    return names
