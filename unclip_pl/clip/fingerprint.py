"""The fingerprint of a CLIP: what it computes, not what it is called.

It holds the sizes, the activation, the preprocessing, and the embeddings of one fixed picture and
one fixed caption. Whatever was made with a CLIP keeps its fingerprint, and is refused by another.
"""

import base64
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.loading import import_open_clip
from unclip_pl.utils.errors import UserError

FIXED_CAPTION = "a red apple on a blue table"
TOLERANCE = 0.04
"""Relative distance of two fingerprints' embeddings that rounding can explain (cosine 0.999).
bfloat16 moves them by about 0.01."""
SIZES = ("embed_dim", "states_width", "context_length", "image_size", "activation")

Fingerprint = dict[str, Any]
"""Plain JSON values: `config`, the sizes, `activation`, `preprocessing`, and `image` and `text`,
two embeddings as base64 of float16."""


class ClipMismatch(UserError):
    """Something was made with another CLIP than the one at hand."""


def compute_fingerprint(clip: Any) -> Fingerprint:
    """Names and sizes of a `FrozenCLIP`, and its embeddings of the fixed picture and caption."""
    quick_gelu = import_open_clip().transformer.QuickGELU
    cfg = clip.model.visual.preprocess_cfg
    has_quick_gelu = any(isinstance(module, quick_gelu) for module in clip.model.modules())
    return {
        "config": asdict(clip.config),
        "embed_dim": clip.embed_dim,
        "states_width": clip.states_width,
        "context_length": clip.context_length,
        "image_size": clip.image_size,
        "activation": "QuickGELU" if has_quick_gelu else "GELU",
        "preprocessing": {
            "mean": [round(value, 6) for value in cfg["mean"]],
            "std": [round(value, 6) for value in cfg["std"]],
            "resize_mode": cfg["resize_mode"],
            "interpolation": cfg["interpolation"],
        },
        "image": _pack(clip.embed_images(fixed_picture())),
        "text": _pack(clip.embed_text(clip.tokenize([FIXED_CAPTION])).embed),
    }


def fixed_picture() -> Tensor:
    """(1, 3, 160, 192) float32 in [-1, 1], the same on every machine.

    Waves of several lengths in every channel. It is not square, so that the resize shows as well.
    """
    y = torch.arange(160, dtype=torch.float64) / 160
    x = torch.arange(192, dtype=torch.float64) / 160
    frequencies = ((9.0, 4.0), (3.0, 31.0), (60.0, 50.0))
    waves = [torch.sin(a * y)[:, None] * torch.cos(b * x)[None] for a, b in frequencies]
    return torch.stack(waves)[None].float()


def require_same(theirs: Fingerprint, ours: Fingerprint, where: str) -> None:
    """Compare two fingerprints by the outputs of the CLIPs.

    The rounding of another device or precision is allowed. Activation and preprocessing are
    compared by value: on a small CLIP, QuickGELU for GELU moves embeddings no further than
    bfloat16 does.

    Args:
        theirs: of the CLIP that something was made with.
        ours: of the CLIP at hand.
        where: what was made, as the beginning of a sentence: "The store /data/embeddings".

    Raises:
        ClipMismatch: one sentence that says with which CLIP `where` was made, which one this run
            has, what differs and what to do.
    """
    missing = sorted(ours.keys() - theirs.keys())
    if missing:
        raise ClipMismatch(
            f"{where} has an incomplete CLIP fingerprint ({', '.join(missing)} missing): make it "
            "again."
        )
    differences = _differences(theirs, ours)
    if not differences:
        return
    their_name, our_name = (str(CLIPConfig.of_fingerprint(one)) for one in (theirs, ours))
    raise ClipMismatch(
        f"{where} was made with the CLIP {their_name}, and this run has the CLIP {our_name}, which "
        f"differs in {' and '.join(differences)}: set the same CLIP, or make it again with this "
        "one."
    )


def _differences(theirs: Fingerprint, ours: Fingerprint) -> list[str]:
    """What two CLIPs differ in, in words; the weights only where all else agrees."""
    differences = [
        f"{key.replace('_', ' ')} ({theirs[key]} there, {ours[key]} here)"
        for key in SIZES
        if theirs[key] != ours[key]
    ]
    before, now = theirs["preprocessing"], ours["preprocessing"]
    if before != now:
        changed = [key for key, value in now.items() if before.get(key) != value]
        differences.append(f"preprocessing ({', '.join(changed)})")
    if differences:
        return differences
    distances = {key: _relative_distance(theirs[key], ours[key]) for key in ("image", "text")}
    moved = [
        f"{key} embedding {distance:.0%} off"
        for key, distance in distances.items()
        if not distance <= TOLERANCE  # also where it is not a number
    ]
    return [f"weights ({', '.join(moved)})"] if moved else []


def _pack(embedding: Tensor) -> str:
    return base64.b64encode(embedding.flatten().cpu().numpy().astype("<f2").tobytes()).decode()


def _unpack(packed: str) -> Tensor:
    """(D,) float64."""
    return torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.float16).double()


def _relative_distance(theirs: str, ours: str) -> float:
    before, now = _unpack(theirs), _unpack(ours)
    return ((before - now).norm() / before.norm()).item()
