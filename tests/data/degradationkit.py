"""Pictures for the tests of degraded conditions."""

import numpy as np
import torch

KINDS = ["none", "blur", "bsr"]


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(*shape, seed=0):
    return torch.from_numpy(rng(seed).random(shape, dtype=np.float32))


def by_channel(reference, image, *args):
    return np.stack([reference(channel, *args) for channel in image.double().numpy()])


def smooth(height, width):
    """(3, H, W) in [0, 1]: a bright blob at a place that is no pixel's centre, on grey, and its
    place (y, x) in units of the sides."""
    at = np.array([0.47, 0.54])
    y, x = (
        (np.arange(height)[:, None] + 0.5) / height - at[0],
        (np.arange(width) + 0.5) / width - at[1],
    )
    blob = np.exp(-0.5 * ((y * height) ** 2 + (x * width) ** 2) / (min(height, width) / 8) ** 2)
    return torch.from_numpy(0.25 + 0.5 * blob).float().expand(3, -1, -1), at
