"""What the DataModules over image shards share.

`train` and `val` are "openmoji" (drawn on demand), or shards as `data.names.expand`
takes them. `val: null` is no validation.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.captions import MissingCaptions
from unclip_pl.data.embedding_loader import EmbeddingLoader, SequentialEmbeddingLoader
from unclip_pl.data.loader import TrainLoader, ValidationLoader, count_steps_per_epoch
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import expand, is_url
from unclip_pl.data.openmoji import openmoji_shards
from unclip_pl.data.reader import SequentialShards, ShuffledShards, Transform
from unclip_pl.data.shards import count_samples, raw_samples

Spec = str | Sequence[str]
CAPTIONS_CHECKED = 1000  # samples of a shard


def resolve_shards(spec: Spec | None, split: str, image_size: int) -> list[str]:
    """The names of shards.

    Args:
        spec: "openmoji", which is drawn now if the cache lacks it; any other spec of
            `data.names.expand`; None: no shards.
        split: "train" or "val", of OpenMoji.
        image_size: side of OpenMoji's drawings in pixels.
    """
    if spec is None:
        return []
    if spec == "openmoji":
        folder = openmoji_shards(image_size)
        return sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    return expand(spec)


def warn_of_repeats(train: Sequence[str], val: Sequence[str]) -> None:
    """Warn of shards that are named twice, or held out and trained on at the same time."""
    seen = Counter(map(_place, train))
    twice = [shard for shard in dict.fromkeys(train) if seen[_place(shard)] > 1]
    if twice:
        rank_zero_warn(
            f"data.train names {len(twice)} of its {len(seen)} shards more than once, such as "
            f"{twice[0]}: their samples come that much more often."
        )
    if shared := [shard for shard in val if _place(shard) in seen]:
        rank_zero_warn(
            f"{len(shared)} of the {len(val)} shards of data.val are in data.train, too, such as "
            f"{shared[0]}: there val/loss says nothing of what the model has not seen."
        )


def _place(shard: str) -> str:
    """One name for all names of a local file."""
    return shard if is_url(shard) else os.path.realpath(shard)


def count_missing_captions(shard: str) -> MissingCaptions:
    """How many of a shard's first samples have no caption."""
    samples = raw_samples(shard, BadSampleCounter(1.0))
    return MissingCaptions().add(islice(samples, CAPTIONS_CHECKED))


class ShardData(LightningDataModule):
    """What the modules over image shards share.

    Subclasses give `sample_transform`, and may override `count`.

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
        self._train_loader: TrainLoader | EmbeddingLoader | None = None

    @property
    def decoded_size(self) -> int | None:
        """Side to which the loader decodes images; None: `sample_transform` gets their bytes."""
        return self.image_size

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the CLIP that tokenises and embeds."""
        return self.clip.fingerprint()

    def prepare_data(self) -> None:
        self._resolve()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._train_loader = None  # a new run
        self._resolve()
        if stage == "fit":
            warn_of_repeats(self.train_shards, self.val_shards)

    def teardown(self, stage: str) -> None:
        if isinstance(self._train_loader, TrainLoader):
            self._train_loader.close()

    def _resolve(self) -> None:
        self.train_shards = resolve_shards(self.train, "train", self.image_size)
        self.val_shards = resolve_shards(self.val, "val", self.image_size)

    def sample_transform(self, train: bool) -> Transform:
        """What turns a decoded sample into a part of a batch; it is sent to the workers."""
        raise NotImplementedError

    def count(self, shards: Sequence[str]) -> int:
        """How many samples the shards hold."""
        return sum(count_samples(shard) for shard in shards)

    @property
    def batch_size(self) -> int:
        """Samples per batch and rank; Lightning's BatchSizeFinder sets it between two loaders."""
        return self.config.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.config = replace(self.config, batch_size=size)

    def _rank_and_world(self) -> dict[str, int]:
        if not self.trainer:
            return {}
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size}

    def train_dataloader(self) -> TrainLoader | EmbeddingLoader:
        """Make a loader that begins where the one before it stopped.

        Lightning may ask for several in a run.
        """
        loader = self._new_loader()
        if self._train_loader is not None:
            loader.continue_from(self._train_loader)  # type: ignore[arg-type]  # of the same class
        self._train_loader = loader
        return loader

    def _new_loader(self) -> TrainLoader | EmbeddingLoader:
        samples = ShuffledShards(
            self.train_shards,
            self.decoded_size,
            self.config,
            self.sample_transform(train=True),
            **self._rank_and_world(),
        )
        steps = self.config.steps_per_epoch
        if steps is None:
            total = self.count(self.train_shards)
            steps = count_steps_per_epoch(self.config, total, samples.world)
        return TrainLoader(samples, steps)

    def val_dataloader(self) -> DataLoader | SequentialEmbeddingLoader | list:
        if not self.val_shards:
            return []
        samples = SequentialShards(
            self.val_shards,
            self.decoded_size,
            self.config,
            self.sample_transform(train=False),
            total=self.count(self.val_shards),
            **self._rank_and_world(),
        )
        return ValidationLoader(samples)
