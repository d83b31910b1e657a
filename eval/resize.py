"""clean-fid's resizing (Parmar et al. 2022): Pillow's antialiased bicubic filter on floats, not rounded afterwards, for a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clean_resize(images: Tensor, side: int = 299) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side) in [0, 255], the aspect not kept.

    In float64, as Pillow's weights are: in float32 the result is 4 thousandths of a level off. On a CPU image by image, which stays in its cache.
    """
    if images.device.type == "mps":  # has no float64
        return clean_resize(images.cpu(), side).to(images.device)
    parts = images.split(1 if images.device.type == "cpu" else 64)
    return torch.cat(
        [
            F.interpolate(part.double(), (side, side), mode="bicubic", antialias=True)
            .clamp_(0, 255)
            .float()
            for part in parts
        ]
    )
