"""The DataModules: images with their embeddings, images with captions, and the shards of an embedding job.

`train` and `val` are "openmoji" or "openmoji-line" (drawn on demand) or shards as `data.shards.expand` takes them; `val: null` is no validation.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import unclip_pl.utils.torchvision  # noqa: F401  before the first import of lightning

import torch
from braceexpand import braceexpand
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset

from unclip_pl.clip.config import CLIPConfig, folder_of
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import tokenize_bpe
from unclip_pl.data.captions import Captionless, augment_caption
from unclip_pl.data.embeddings import EmbeddingStore, Statistics, describe
from unclip_pl.data.loader import (
    LoaderConfig,
    Prepare,
    Samples,
    SamplesInOrder,
    TrainLoader,
    ValidationLoader,
    steps_of_epoch,
)
from unclip_pl.data.openmoji import STYLES, openmoji_shards
from unclip_pl.data.rows import RowLoader, Rows, RowsConfig, RowsInOrder
from unclip_pl.data.shards import BadSample, ErrorBudget, count_samples, expand, is_url, raw_samples
from unclip_pl.data.text_tokens import ensure_text_tokens
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import cache_dir

Spec = str | Sequence[str]


def resolve(spec: Spec | None, side: str, image_size: int) -> list[str]:
    """The shards of "openmoji" or "openmoji-line" (`side` is "train" or "val"), drawn now if the cache lacks them, or of any other spec; [] for None."""
    if spec is None:
        return []
    if isinstance(spec, str) and spec in STYLES:
        folder = openmoji_shards(image_size, name=spec)
        return sorted(str(path) for path in folder.glob(f"{side}-*.tar"))
    return expand(spec)


def looked_at(shard: str) -> Captionless:
    """Of the captions of a shard's first samples."""
    return Captionless().add(islice(raw_samples(shard, ErrorBudget(1.0)), 1000))


class ShardData(LightningDataModule):
    """What the modules over image shards share. Subclasses give `preparation` and may know better how to `count`.

    Args:
        train: shards to train on.
        val: shards to validate on; null: no validation.
        image_size: side of the images in a batch, in pixels.
        clip: the CLIP that tokenises and embeds.
        loader: batch size, workers, seed.
    """

    def __init__(
        self,
        train: Spec = "openmoji",
        val: Spec | None = "openmoji",
        image_size: int = 64,
        clip: CLIPConfig = CLIPConfig(),
        loader: LoaderConfig = LoaderConfig(),
    ) -> None:
        super().__init__()
        self.train, self.val, self.image_size, self.config = train, val, image_size, loader
        self.clip = FrozenCLIP(clip)
        self.train_shards: list[str] = []
        self.val_shards: list[str] = []
        self._training: TrainLoader | RowLoader | None = None

    @property
    def decoded_size(self) -> int | None:
        """To which side the loader decodes images; None: `preparation` is given their bytes."""
        return self.image_size

    def fingerprint(self) -> dict[str, Any]:
        """That of the CLIP which tokenises and embeds."""
        return self.clip.fingerprint()

    def prepare_data(self) -> None:
        self._resolve()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._training = None  # a new run
        self._resolve()

    def teardown(self, stage: str) -> None:
        if isinstance(self._training, TrainLoader):
            self._training.close()

    def _resolve(self) -> None:
        self.train_shards = resolve(self.train, "train", self.image_size)
        self.val_shards = resolve(self.val, "val", self.image_size)

    def preparation(self, train: bool) -> Prepare:
        """What a decoded sample goes through on its way into a batch; is sent to the workers."""
        raise NotImplementedError

    def count(self, shards: Sequence[str]) -> int:
        """How many samples the shards hold."""
        return sum(count_samples(shard) for shard in shards)

    @property
    def batch_size(self) -> int:
        """Samples a batch and rank; Lightning's BatchSizeFinder sets it between two loaders."""
        return self.config.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.config = replace(self.config, batch_size=size)

    def _place(self) -> dict[str, int]:
        return (
            {"rank": self.trainer.global_rank, "world": self.trainer.world_size}
            if self.trainer
            else {}
        )

    def train_dataloader(self) -> TrainLoader | RowLoader:
        """A loader that begins where the one before it has come to: Lightning may ask for several in a run."""
        loader = self._new_loader()
        if self._training is not None:
            loader.go_on_from(self._training)  # type: ignore[arg-type]  # of the same class
        self._training = loader
        return loader

    def _new_loader(self) -> TrainLoader | RowLoader:
        samples = Samples(
            self.train_shards,
            self.decoded_size,
            self.config,
            self.preparation(train=True),
            **self._place(),
        )
        steps = self.config.steps_per_epoch or steps_of_epoch(
            self.config, self.count(self.train_shards), samples.world
        )
        return TrainLoader(samples, steps)

    def val_dataloader(self) -> DataLoader | RowsInOrder | list:
        if not self.val_shards:
            return []
        total = self.count(self.val_shards)
        prepare = self.preparation(train=False)
        return ValidationLoader(
            SamplesInOrder(
                self.val_shards,
                self.decoded_size,
                self.config,
                prepare,
                total=total,
                **self._place(),
            )
        )


@dataclass(frozen=True)
class Captioned:
    """Adds `tokens`; in training the caption is varied, by (seed, epoch, key) alone."""

    clip: FrozenCLIP
    seed: int
    train: bool

    def __call__(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        caption = sample["caption"]
        if not caption:
            raise BadSample(f"it has no caption (endings seen: {', '.join(sample['endings'])})")
        if self.train:
            caption = augment_caption(
                caption, random.Random(f"{self.seed} {epoch} {sample['key']}")
            )
        return {
            "key": sample["key"],
            "caption": caption,
            "tokens": self.clip.tokenize([caption])[0],
            "image": sample["image"],
        }


class ImageTextData(ShardData):
    """Images and captions, for a CLIP: `key`, `caption`, `tokens`, `image`. Training captions are varied, anew in each epoch."""

    def prepare_data(self) -> None:
        super().prepare_data()
        if self.train_shards and not is_url(self.train_shards[0]):
            looked_at(self.train_shards[0]).require(self.config.max_bad_rate)

    def preparation(self, train: bool) -> Captioned:
        return Captioned(self.clip, self.config.seed, train)

    def count(self, shards: Sequence[str]) -> int:
        if any(map(is_url, shards)) and shards == self.train_shards:
            raise UserError(
                "How many samples data.train holds is not known without reading all of it: set data.loader.steps_per_epoch."
            )
        return super().count(shards)


@dataclass(frozen=True)
class Embedded:
    """Adds the store's row of the sample, and its caption as `text_tokens` of `text_length`."""

    store: EmbeddingStore
    text_length: int | None = None

    def __call__(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        rows = self.store.shard(sample["shard"])
        i = rows.row.get(sample["key"])
        if i is None:
            raise BadSample(f"the store {self.store.folder} has no embedding of it")
        ready = {
            "key": sample["key"],
            "caption": sample["caption"],
            "image": sample["image"],
            "tokens": torch.from_numpy(rows.tokens[i].astype("int64")),
            "image_embed": torch.from_numpy(rows.image_embed[i].astype("float32")),
            "text_embed": torch.from_numpy(rows.text_embed[i].astype("float32")),
        }
        if self.text_length is not None:
            ready["text_tokens"] = tokenize_bpe([sample["caption"]], self.text_length)[0]
        return ready


class ImageEmbeddingData(ShardData):
    """Images with the embeddings that the store holds of them: `key`, `caption`, `tokens`, `image`, `image_embed`, `text_embed`.

    What the store lacks is embedded first, in one process; for much data run `lightning predict -c stages/embed.yaml` before.

    Args:
        store: folder of the embedding store; by default one in the cache for these shards and this CLIP.
        text_states: add CLIP's token states, computed on the batch's device: `text_states` (B, L, W), `text_mask` (B, L).
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
        self.store: EmbeddingStore = None  # type: ignore[assignment]  # until `prepare_data` or `setup`

    def _resolve(self) -> None:
        super()._resolve()
        shards = [*self.train_shards, *self.val_shards]
        self.store = EmbeddingStore(self.store_folder or default_store(shards, self.clip.config))

    def prepare_data(self) -> None:
        super().prepare_data()
        self.clip.to("cuda" if torch.cuda.is_available() else "cpu")
        self.store.ensure(
            [*self.train_shards, *self.val_shards],
            self.clip,
            budget=ErrorBudget(self.config.max_bad_rate),
        )
        self.clip.to("cpu")
        if self.reads_captions:
            self._require_captions()

    @property
    def reads_captions(self) -> bool:
        """Whether batches are used with their captions."""
        return self.text_states or self.text_length is not None

    def _require_captions(self) -> None:
        blank = self.clip.tokenize([""])[0].numpy()
        found, first = self.store.captionless(self.train_shards, blank), self.train_shards[0]
        if found.missing and Path(first).is_file():
            found.endings = looked_at(first).endings
        found.require(self.config.max_bad_rate)

    def count(self, shards: Sequence[str]) -> int:
        return sum(self.store.rows(shards))

    def preparation(self, train: bool) -> Embedded:
        return Embedded(self.store, self.text_length)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if self.text_states:
            text = self.clip.to(batch["tokens"].device).embed_text(batch["tokens"])
            batch |= {"text_states": text.states, "text_mask": text.mask}
        return batch


class PriorData(ImageEmbeddingData):
    """What the store holds, without the images: `key`, `tokens`, `text_mask`, `text_embed`, `image_embed`, for the priors.

    Training takes a new permutation of all rows each epoch. The arguments are those of `ImageEmbeddingData`, so one overlay serves both; `image_size`
    is that of OpenMoji's drawings, which are embedded if the store lacks them.
    """

    config: RowsConfig  # type: ignore[assignment]  # in the place of LoaderConfig: what reads more than the two share is overridden here

    def __init__(
        self,
        train: Spec = "openmoji",
        val: Spec | None = "openmoji",
        image_size: int = 64,
        clip: CLIPConfig = CLIPConfig(),
        loader: RowsConfig = RowsConfig(),
        store: str | None = None,
        text_states: bool = False,
        text_length: int | None = None,
    ) -> None:
        super().__init__(train, val, image_size, clip, loader, store, text_states, text_length)  # type: ignore[arg-type]  # see `config`

    @property
    def reads_captions(self) -> bool:
        return True

    def prepare_data(self) -> None:
        if self._from_store():
            self._require_captions()
            return
        super().prepare_data()
        if self.text_length is not None:
            shards = [*self.train_shards, *self.val_shards]
            ensure_text_tokens(self.store, shards, self.text_length)

    def _resolve(self) -> None:
        if not self._from_store():
            super()._resolve()

    def _from_store(self) -> bool:
        """Take the shards' names from the store where it has their rows and the tars themselves are gone."""
        if not self.store_folder or not (Path(self.store_folder) / "manifest.json").is_file():
            return False
        store = EmbeddingStore(self.store_folder)
        manifest = store.manifest
        train, val = (
            [
                name
                for one in ([spec] if isinstance(spec, str) else spec or [])
                for name in _in_store(one, manifest)
            ]
            for spec in (self.train, self.val)
        )
        if (
            not train
            or not set(train + val) <= manifest["shards"].keys()
            or all(is_url(name) or Path(name).is_file() for name in train + val)
        ):
            return False
        require_same(
            manifest["clip"], self.clip.fingerprint(), f"The embedding store {store.folder}"
        )
        self.train_shards, self.val_shards, self.store = train, val, store
        return True

    def statistics(self) -> Statistics:
        """Of the image embeddings to train on."""
        return self.store.statistics(self.train_shards)

    def _rows(self, shards: Sequence[str]) -> Rows:
        return Rows(self.store, shards, self.clip.caption_mask, self.text_length)

    def _new_loader(self) -> RowLoader:
        return RowLoader(self._rows(self.train_shards), self.config, **self._place())

    def val_dataloader(self) -> RowsInOrder | list:
        if not self.val_shards:
            return []
        rows = self._rows(self.val_shards)
        return RowsInOrder(rows, self.config.batch_size, **self._place())


def _in_store(spec: str, manifest: dict[str, Any]) -> list[str]:
    """The names of shards that are gone: a pattern, or a name as it stands in a store's manifest."""
    return [spec] if spec in manifest["shards"] else list(braceexpand(spec))


class EmbeddingJobData(LightningDataModule):
    """For the stage `Embed`: one item a rank, the list of its shards. The arguments are those of `ImageEmbeddingData`, so one overlay serves both.

    Args:
        train, val: shards to embed.
        image_size: of OpenMoji's drawings, in pixels; CLIP resizes to its own.
        clip: the CLIP that embeds.
        store: the folder to fill; by default the one where `ImageEmbeddingData` looks.
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
        self.text_length = text_length
        self.train, self.val, self.image_size, self.clip_config, self.folder = (
            train,
            val,
            image_size,
            clip,
            store,
        )
        self.shards: list[str] = []
        self.store: EmbeddingStore | None = None

    def prepare_data(self) -> None:
        self._resolved()

    def _resolved(self) -> list[str]:
        return [
            *resolve(self.train, "train", self.image_size),
            *resolve(self.val, "val", self.image_size),
        ]

    def setup(self, stage: str) -> None:
        self.shards = self._resolved()
        self.store = EmbeddingStore(self.folder or default_store(self.shards, self.clip_config))

    def predict_dataloader(self) -> DataLoader:
        trainer = cast(Trainer, self.trainer)
        return DataLoader(
            cast(Dataset, [self.shards[trainer.global_rank :: trainer.world_size]]), batch_size=None
        )  # a list does for a Dataset


def default_store(shards: Sequence[str], clip: CLIPConfig) -> Path:
    """Where the embeddings of these shards by this CLIP lie when nobody says: in the cache, beside OpenMoji's drawings.

    Other weights under the same name or path (a CLIP trained again) have another folder.
    """
    folder = folder_of(clip.model) or Path(clip.model)
    files = (
        sorted(
            file
            for file in folder.iterdir()
            if file.suffix in (".json", ".safetensors", ".bin", ".pth", ".pt")
        )
        if folder.is_dir()
        else []
    )
    files += (
        [path] if clip.pretrained and (path := Path(clip.pretrained).expanduser()).is_file() else []
    )
    weights = [str(describe(str(file))) for file in files]
    name = hashlib.sha256(
        "\n".join([*map(str, shards), repr(clip), *weights]).encode(errors="surrogateescape")
    ).hexdigest()[:12]
    return cache_dir() / f"embeddings-{Path(clip.model).name}-{name}"
