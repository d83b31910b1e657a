"""The features of all images of a source.

Those of a reference are kept in the cache, for later comparisons.
"""

import contextlib
import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from eval.commands import progress
from eval.features import Features
from eval.stored import ImageSource, StoredImages
from unclip_pl.utils.files import atomic_file, cache_dir


def extract_features(
    network: Features, source: ImageSource, batch_size: int, title: str = "features"
) -> Tensor:
    """(N, D) float32 on the CPU, of this rank's images; `title` is that of the progress bar."""
    batches = progress(source.batches(batch_size), len(source), title)
    rows = [network(batch["images"]).float().cpu() for batch in batches]
    return torch.cat(rows) if rows else torch.zeros(0, network.dim)


def reference_features(network: Features, images: StoredImages, batch_size: int) -> Tensor:
    """`extract_features` of a reference.

    They come from the cache if the same network (weights, resizing, precision) has seen the same
    files before.
    """
    states = images.file_states()
    if network.key is None or states is None:
        return extract_features(network, images, batch_size, "reference")
    place = [images.rank, images.world_size, images.max_bad_rate, images.size]
    digest = hashlib.sha256(json.dumps([network.key, *place, states]).encode()).hexdigest()[:32]
    file = cache_dir() / "features" / f"{digest}.npy"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: computed again
        rows = np.load(file, allow_pickle=False)
        if rows.ndim == 2 and rows.shape[1] == network.dim:
            return torch.from_numpy(rows)
    features = extract_features(network, images, batch_size, "reference")
    with atomic_file(file) as target:
        np.save(target, features.numpy())
    return features
