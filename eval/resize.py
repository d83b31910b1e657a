"""clean-fid's resizing (Parmar et al. 2022: Pillow's antialiased bicubic filter in float, not rounded), for a batch, as two matrix products."""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def filter_matrix(size: int, target: int) -> Tensor:
    """(target, size) float32: Pillow's bicubic (a = -0.5) from `size` to `target` samples; when it makes smaller, stretched by the ratio."""
    scale = size / target
    stretch = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    low = (centre - 2 * stretch + 0.5).floor().clamp(min=0)
    high = (centre + 2 * stretch + 0.5).floor().clamp(max=size)
    place = torch.arange(size, dtype=torch.float64)
    distance = ((place - centre[:, None] + 0.5) / stretch).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights.masked_fill((place < low[:, None]) | (place >= high[:, None]), 0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


def clean_resize(images: Tensor, side: int = 299) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side) in [0, 255], the aspect not kept; an image of that size already comes back as it is."""
    pixels = images.float()
    height, width = images.shape[-2:]
    if width != side:
        pixels = pixels @ filter_matrix(width, side).T.to(images.device)
    if height != side:
        pixels = filter_matrix(height, side).to(images.device) @ pixels
    return pixels.clamp(0, 255)
