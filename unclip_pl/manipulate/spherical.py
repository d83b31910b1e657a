"""Spherical interpolation between embeddings or noises."""

import torch
from torch import Tensor

from unclip_pl.utils.errors import UserError


def slerp(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """Interpolate from a (theta 0) to b (theta 1) along the great circle.

    The angle to a grows evenly; the norm goes linearly from |a| to |b|. For equal norms this is
    Shoemake's slerp. CLIP's embeddings keep their norms in this project (the paper normalises
    them), so a decoder that reads norms gets a fitting one. Each sample is one vector. Computed in
    float64.

    Args:
        a: (B, ...), where the path starts.
        b: (B, ...), where it ends.
        theta: (B,) in [0, 1].

    Returns:
        The shape, dtype and device of `a`.

    Raises:
        UserError: opposite vectors, between which every path is as short; a vector of zeros; theta
            outside [0, 1].
    """
    check_theta(theta)
    start, end = (x.detach().cpu().double().flatten(1) for x in (a, b))
    start_norm, end_norm = (x.norm(dim=1, keepdim=True) for x in (start, end))
    if not bool((start_norm > 0).all() & (end_norm > 0).all()):
        raise UserError(
            "One of the two vectors to go between is zero, which has no direction: use other "
            "pictures or captions."
        )
    u, v = start / start_norm, end / end_norm
    difference, total = (u - v).norm(dim=1), (u + v).norm(dim=1)
    if bool((total < 1e-6).any()):
        raise UserError(
            "The two embeddings or latents point in opposite directions, and every way between "
            "them is as short: use other pictures or captions."
        )
    # exact also near 0 and pi, unlike acos of the dot product
    omega = 2 * torch.atan2(difference, total)
    share = theta.cpu().double()
    direction = _weight(1 - share, omega)[:, None] * u + _weight(share, omega)[:, None] * v
    norm = torch.lerp(start_norm, end_norm, share[:, None])
    return (direction * norm).view(a.shape).to(a.device, a.dtype)


def _weight(share: Tensor, omega: Tensor) -> Tensor:
    """Weight of one end of the path: sin(share omega) / sin(omega), its limit for small angles."""
    return torch.where(omega < 1e-9, share, (share * omega).sin() / omega.sin())


def check_theta(theta: Tensor) -> None:
    """Raise a UserError if one of the angles is outside [0, 1]."""
    if outside := [round(value, 6) for value in theta.flatten().tolist() if not 0 <= value <= 1]:
        raise UserError(f"theta is {outside[0]}: give 0 (where it starts) to 1 (all the way).")
