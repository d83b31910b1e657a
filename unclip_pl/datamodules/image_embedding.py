"""Images with their CLIP embeddings from a store, to train decoders."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unclip_pl.clip.config import CLIPConfig, folder_of
from unclip_pl.clip.loading import tokenize_bpe
from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.shard_rows import describe_shard
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.datamodules.base import ShardData, Spec, count_missing_captions
from unclip_pl.utils.files import cache_dir

WEIGHTS_SUFFIXES = (".json", ".safetensors", ".bin", ".pth", ".pt")


@dataclass(frozen=True)
class EmbeddingTransform:
    """Adds the store's row of the sample, and its caption as `text_tokens` of `text_length`."""

    store: EmbeddingStore
    text_length: int | None = None

    def __call__(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        rows = self.store.shard(sample["shard"])
        row = rows.row_of_key.get(sample["key"])
        if row is None:
            raise BadSample(f"the store {self.store.folder} has no embedding of it")
        with_embeddings = {
            "key": sample["key"],
            "caption": sample["caption"],
            "image": sample["image"],
            "tokens": torch.from_numpy(rows.tokens[row].astype("int64")),
            "image_embed": torch.from_numpy(rows.image_embed[row].astype("float32")),
            "text_embed": torch.from_numpy(rows.text_embed[row].astype("float32")),
        }
        if self.text_length is not None:
            tokens = tokenize_bpe([sample["caption"]], self.text_length)
            with_embeddings["text_tokens"] = tokens[0]
        return with_embeddings


class ImageEmbeddingData(ShardData):
    """Images with the embeddings that the store holds of them.

    A batch has `key` and `caption` (lists of B strings), `tokens` (B, L) int64, `image`
    (B, 3, S, S) float32 in [-1, 1], `image_embed` and `text_embed` (B, D) float32. What the store
    lacks is embedded first, in one process; for much data run `lightning predict -c
    stages/embed.yaml` before.

    Args:
        train, val, image_size, clip, loader: see `ShardData`.
        store: folder of the embedding store; by default one in the cache for these shards and this
            CLIP.
        text_states: add CLIP's token states, computed on the batch's device: `text_states`
            (B, L, W), `text_mask` (B, L).
        text_length: add `text_tokens` (B, text_length), the captions tokenised once more for a
            stage whose text context is longer than CLIP's.
    """

    def __init__(
        self,
        train: Spec = "openmoji",
        val: Spec | None = "openmoji",
        image_size: int = 64,
        clip: CLIPConfig = CLIPConfig(),
        loader: LoaderConfig = LoaderConfig(),
        store: str | None = None,
        text_states: bool = False,
        text_length: int | None = None,
    ) -> None:
        super().__init__(train, val, image_size, clip, loader)
        self.store_folder, self.text_states, self.text_length = store, text_states, text_length
        # Set by `prepare_data` and `setup`
        self.store: EmbeddingStore = None  # type: ignore[assignment]

    def _resolve(self) -> None:
        super()._resolve()
        folder = self.store_folder or default_store(self._all_shards, self.clip.config)
        self.store = EmbeddingStore(folder)

    @property
    def _all_shards(self) -> list[str]:
        return [*self.train_shards, *self.val_shards]

    def prepare_data(self) -> None:
        super().prepare_data()
        self.clip.to("cuda" if torch.cuda.is_available() else "cpu")
        counter = BadSampleCounter(self.config.max_bad_rate)
        self.store.ensure(self._all_shards, self.clip, counter=counter)
        self.clip.to("cpu")
        if self.reads_captions:
            self.require_captions()

    @property
    def reads_captions(self) -> bool:
        """Whether batches are used with their captions whatever the stage.

        Then `prepare_data` calls `require_captions`.
        """
        return self.text_states or self.text_length is not None

    def require_captions(self) -> None:
        """UserError where more than `loader.max_bad_rate` of the training samples have no caption.

        A stage that reads captions calls this where `reads_captions` is False.
        """
        blank = self.clip.tokenize([""])[0].numpy()
        missing = self.store.missing_captions(self.train_shards, blank)
        first = self.train_shards[0]
        if missing.missing and Path(first).is_file():
            missing.endings = count_missing_captions(first).endings
        missing.require(self.config.max_bad_rate)

    def count(self, shards: Sequence[str]) -> int:
        return sum(self.store.row_counts(shards))

    def sample_transform(self, train: bool) -> EmbeddingTransform:
        return EmbeddingTransform(self.store, self.text_length)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if self.text_states:
            text = self.clip.to(batch["tokens"].device).embed_text(batch["tokens"])
            batch |= {"text_states": text.states, "text_mask": text.mask}
        return batch


def default_store(shards: Sequence[str], clip: CLIPConfig) -> Path:
    """The folder for the embeddings of these shards by this CLIP where the settings name none.

    It lies in the cache, next to OpenMoji's drawings. Other weights under the same name or path (a
    CLIP that was trained again) have another folder.
    """
    folder = folder_of(clip.model) or Path(clip.model)
    files = []
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    if clip.pretrained and (path := Path(clip.pretrained).expanduser()).is_file():
        files.append(path)
    weights = [str(describe_shard(str(file))) for file in files]
    content = "\n".join([*map(str, shards), repr(clip), *weights])
    digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:12]
    return cache_dir() / f"embeddings-{Path(clip.model).name}-{digest}"
