"""Helpers of the tests of manipulations."""

import numpy as np
import torch

SPREAD = 0.4
"""Standard deviation of the Gaussian pictures."""


def pictures(count=2, seed=0):
    """Pictures of independent Gaussian pixels, (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return SPREAD * torch.randn(count, 3, 16, 16, generator=generator)


def great_circle(a, b, theta):
    """Slerp of unit vectors in float64, by turning a towards b in their plane; and their angle."""
    a, b = (x.astype(np.float64) for x in (a, b))
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    across = v - (v @ u) * u
    length = np.linalg.norm(across)
    if length < 1e-12:
        return u, 0.0
    omega = np.arctan2(length, v @ u)
    return np.cos(theta * omega) * u + np.sin(theta * omega) * across / length, omega
