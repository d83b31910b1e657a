"""Images with captions, to train a CLIP."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSample
from unclip_pl.data.captions import augment_caption
from unclip_pl.data.names import is_streamed, is_url
from unclip_pl.datamodules.base import ShardData, count_missing_captions
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class CaptionTransform:
    """Adds `tokens`.

    In training the caption is varied, which follows only from (seed, epoch, key).
    """

    clip: FrozenCLIP
    seed: int
    train: bool

    def __call__(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        key, caption = sample["key"], sample["caption"]
        if not caption:
            raise BadSample(f"it has no caption (endings seen: {', '.join(sample['endings'])})")
        if self.train:
            caption = augment_caption(caption, random.Random(f"{self.seed} {epoch} {key}"))
        return {
            "key": key,
            "caption": caption,
            "tokens": self.clip.tokenize([caption])[0],
            "image": sample["image"],
        }


class ImageTextData(ShardData):
    """Images and captions, for a CLIP. Training captions are varied in each epoch.

    A batch has `key` and `caption` (lists of B strings), `tokens` (B, L) int64 and `image`
    (B, 3, S, S) float32 in [-1, 1].
    """

    def prepare_data(self) -> None:
        super().prepare_data()
        if self.train_shards and not is_streamed(self.train_shards[0]):
            count_missing_captions(self.train_shards[0]).require(self.config.max_bad_rate)

    def sample_transform(self, train: bool) -> CaptionTransform:
        return CaptionTransform(self.clip, self.config.seed, train)

    def count(self, shards: Sequence[str]) -> int:
        if any(map(is_url, shards)) and shards == self.train_shards:
            raise UserError(
                "How many samples data.train holds is not known without reading all of it: set "
                "data.loader.steps_per_epoch."
            )
        return super().count(shards)
