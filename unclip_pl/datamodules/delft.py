"""OpenMoji in blue on white, as on Delft tiles, with the CLIP embeddings of the drawings in colour.

`make demo` trains on it. A decoder that learns from it draws another style, and the prior serves it
as it is. A DataModule of your own can change the samples in the same way.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.datamodules.image_embedding import EmbeddingTransform, ImageEmbeddingData

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
TILE, INK = (255, 255, 255), (8, 36, 120)  # RGB, of 255


def in_blue(images: Tensor) -> Tensor:
    """Shades of grey become shades of blue, from dark ink to the white of the tile.

    Args:
        images: (..., 3, H, W) in [-1, 1].

    Returns:
        The same shape and range.
    """

    def column(values: tuple[float, ...]) -> Tensor:
        return images.new_tensor(values)[:, None, None]

    light = (images * column(LUMA)).sum(-3, keepdim=True)
    tile, ink = column(TILE) / 127.5 - 1, column(INK) / 127.5 - 1
    return torch.lerp(ink, tile, (light + 1) / 2)


@dataclass(frozen=True)
class DelftTransform(EmbeddingTransform):
    """`EmbeddingTransform`, with the image in blue."""

    def __call__(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        return super().__call__(sample | {"image": in_blue(sample["image"])}, epoch)


class DelftData(ImageEmbeddingData):
    """OpenMoji's drawings in blue, with what CLIP makes of the drawings in colour.

    Batches are those of `ImageEmbeddingData`.

    Args:
        image_size, clip, loader, text_states: see `ImageEmbeddingData`.
    """

    def __init__(
        self,
        image_size: int = 64,
        clip: CLIPConfig = CLIPConfig(),
        loader: LoaderConfig = LoaderConfig(),
        text_states: bool = False,
    ) -> None:
        super().__init__(image_size=image_size, clip=clip, loader=loader, text_states=text_states)

    def sample_transform(self, train: bool) -> DelftTransform:
        return DelftTransform(self.store, self.text_length)
