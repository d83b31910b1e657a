"""A random permutation of any size without a table."""

import numpy as np

ROUNDS = 6


def permute(index: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Return where a permutation of 0 .. total - 1, drawn by (seed, epoch), sends each of `index`.

    A Feistel network over the next power of 4, walked until it is back below `total` (Black and
    Rogaway 2002).

    Args:
        index: int64 of any shape, each in 0 .. total - 1.
        total: size of the permutation.
        seed: with `epoch` it decides the permutation.
        epoch: another epoch has another permutation.

    Returns:
        int64, of the shape of `index`.
    """
    bits = np.uint64(max(1, (int(total - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << bits) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    x = index.astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> bits, x[outside] & low
        for key in keys:
            left, right = right, left ^ (_hash(right ^ key) & low)
        x[outside] = left << bits | right
        outside = x >= total
    return x.astype(np.int64)


def _hash(h: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers (the finaliser of MurmurHash3)."""
    h = (h ^ h >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ h >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ h >> np.uint64(33)
