"""Loaders and readers of shards for tests."""

import io

from PIL import Image

from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.loader import TrainLoader
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.reader import ShuffledShards
from unclip_pl.data.shards import raw_samples


def keep(sample: dict, epoch: int) -> dict:
    return {"key": sample["key"], "epoch": epoch, "image": sample["image"]}


def loader(shards, steps=7, rank=0, world=1, start_method=None, **config) -> TrainLoader:
    config = LoaderConfig(**{"batch_size": 4, "num_workers": 0, "window": 2, **config})
    return TrainLoader(
        ShuffledShards(shards, 8, config, keep, rank=rank, world=world), steps, start_method
    )


def take(batches: TrainLoader, count: int) -> list[list[str]]:
    """Keys of the next `count` batches, over as many epochs as that takes."""
    found = []
    while len(found) < count:
        for batch in batches:
            found.append(batch["key"])
            if len(found) == count:
                break
    return found


def saved(data: bytes | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    data.save(file, kind, **options)
    return file.getvalue()


def keys_of(shard: str, counter: BadSampleCounter) -> list[str]:
    return [sample["key"] for sample in raw_samples(shard, counter)]


class ReaderOf(ShuffledShards):
    """What one reader gives, here and now."""

    def reader(self) -> tuple[int, int]:
        return self.place
