"""Where weights are: those in the package by their names, all others by a path or URL. No torch."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote import is_remote

ASSETS = Path(__file__).parents[1] / "assets"
DEFAULT_DECODER = ASSETS / "decoder-openmoji"
DEFAULT_PRIORS = {
    "diffusion": ASSETS / "diffusion-prior-openmoji",
    "ar": ASSETS / "ar-prior-openmoji",
}
DEFAULT_UPSAMPLERS = {
    "256": ASSETS / "upsampler-256-openmoji",
    "1024": ASSETS / "upsampler-1024-openmoji",
}
Kind = Literal["decoder", "prior", "upsampler"]
Place = str | os.PathLike
NAMES: dict[Kind, dict[str, Path]] = {
    "decoder": {"openmoji": DEFAULT_DECODER},
    "prior": DEFAULT_PRIORS,
    "upsampler": DEFAULT_UPSAMPLERS,
}
"""The weights in the package, by the names that options and `UnCLIP.load` take."""
OF_STAGE: dict[str, Path] = {
    "Decoder": DEFAULT_DECODER,
    "DiffusionPrior": DEFAULT_PRIORS["diffusion"],
    "ARPrior": DEFAULT_PRIORS["ar"],
    "Upsampler256": DEFAULT_UPSAMPLERS["256"],
    "Upsampler1024": DEFAULT_UPSAMPLERS["1024"],
}
"""The weights in the package for each stage; `--init openmoji` names them in training."""


def locate(kind: Kind, given: Place) -> Place:
    """The path or URL of weights that are named as in the package, or are a path or URL.

    Raises:
        UserError: there is nothing of that name, and nothing at that path.
    """
    names = NAMES[kind]
    place = names.get(str(given), given)
    if is_remote(place):
        return place
    refuse_run(place)
    if Path(place).exists():
        return place
    if place is not given:
        raise UserError(
            f"The package here has no {kind} {given} ({Path(place).name} is missing): give a "
            "checkpoint or release of one."
        )
    raise UserError(
        f"There is no {kind} {given}: choose {' or '.join(names)}, which the package has, or "
        f"{what_else(Path(given))}."
    )


def refuse_run(place: Place) -> None:
    """Raise a UserError for the folder of a run, of which one checkpoint is meant."""
    if checkpoints := list((Path(place) / "checkpoints").glob("*.ckpt")):
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
        raise UserError(
            f"{place} is the folder of a run: give one of its checkpoints, such as {newest}."
        )


def require_weights(
    decoder: Place | None = None, prior: Place | None = None, upsamplers: Sequence[Place] = ()
) -> None:
    """Raise a UserError for the first of these weights that is not there, before any is read."""
    if decoder is not None:
        locate("decoder", decoder)
    if prior is not None:
        locate("prior", prior)
    for given in upsamplers:
        locate("upsampler", given)


def what_else(path: Path) -> str:
    """What to give in place of a path that is not there."""
    near = list(path.parent.glob("*.ckpt")) if path.suffix == ".ckpt" else []
    similar = get_close_matches(path.name, [file.name for file in near], 1, 0.6)
    hint = f", such as {path.parent / similar[0]}" if similar else ""
    return f"give the path or URL of a release or of a checkpoint{hint}"
