"""The features of a whole source of images, and those of a reference kept in the cache: made once,
they are there for every later comparison.
"""

import contextlib
import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from eval.common import progress
from eval.features import Features
from eval.folders import Pictures, Source
from unclip_pl.utils.files import atomic_file, cache_dir


def extract(network: Features, source: Source, batch_size: int, what: str = "features") -> Tensor:
    """(N, D) float32 on the CPU, of this rank's images."""
    found = [
        network(batch["images"]).float().cpu()
        for batch in progress(source.batches(batch_size), len(source), what)
    ]
    return torch.cat(found) if found else torch.zeros(0, network.dim)


def reference(network: Features, pictures: Pictures, batch_size: int) -> Tensor:
    """`extract` of a reference, from the cache where the same files were seen by the same network
    (weights, resizing, precision) before.
    """
    state = pictures.state()
    if network.key is None or state is None:
        return extract(network, pictures, batch_size, "reference")
    said = json.dumps(
        [
            network.key,
            pictures.rank,
            pictures.world_size,
            pictures.max_bad_rate,
            pictures.size,
            state,
        ]
    )
    file = cache_dir() / "features" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.npy"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: made anew
        rows = np.load(file, allow_pickle=False)
        if rows.ndim == 2 and rows.shape[1] == network.dim:
            return torch.from_numpy(rows)
    rows = extract(network, pictures, batch_size, "reference")
    with atomic_file(file) as target:
        np.save(target, rows.numpy())
    return rows
