"""A release: a folder with what sampling needs and no code that would run on loading.

config.json           stage, hyperparameters, CLIP fingerprint, versions
model.safetensors     EMA weights in float16; statistics (`exact`) in float32
README.md             the card: what it is, how it was made

This file knows folders and tensors, not stages.
"""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip_pl import __version__
from unclip_pl.networks.renamed import rename
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder
from unclip_pl.utils.outputs import require_new

FORMAT = 2
"""Format 1 had other names of parameters, which are translated on reading."""


@dataclass(frozen=True)
class Release:
    """The contents of a release folder."""

    stage: str
    """Class name of the stage, such as "Decoder"."""
    hyper_parameters: dict
    """Plain values from which the stage builds itself."""
    clip_fingerprint: dict | None
    tensors: dict[str, Tensor] = field(repr=False)
    """Weights by name, float32 (integers as they were)."""
    steps: int = 0
    """Optimiser steps of training."""


def write(
    folder: str | os.PathLike, release: Release, card: str, exact: Collection[str] = ()
) -> Path:
    """Write a release atomically. An existing folder is not overwritten.

    Args:
        folder: the new folder.
        release: its contents.
        card: the text of its README.md.
        exact: names of tensors that keep their precision, such as a stage's buffers (scales,
            bucket edges). All others are written in float16.

    Returns:
        The folder.

    Raises:
        UserError: `folder` exists, or a weight is not finite in float16.
    """
    folder = Path(folder)
    require_new(folder)
    config = {
        "format": FORMAT,
        "unclip_pl": __version__,
        "torch": torch.__version__,
        "stage": release.stage,
        "steps": release.steps,
        "hyper_parameters": release.hyper_parameters,
        "clip_fingerprint": release.clip_fingerprint,
    }
    tensors = _half_precision(release, exact)
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        text = json.dumps(config, indent=1) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return folder


def _half_precision(release: Release, exact: Collection[str]) -> dict[str, Tensor]:
    """The weights in float16, on the CPU; integers and `exact` ones as they are."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in release.tensors.items()}
    overflown = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and name not in exact:
            tensors[name] = tensor.half()
            if not tensors[name].isfinite().all():
                overflown.append(name)
    if overflown:
        raise UserError(
            f"The {release.stage} has weights that are not finite in float16 "
            f"({', '.join(overflown[:3])}): train it again with a lower rate."
        )
    return tensors


def read(folder: str | os.PathLike) -> Release:
    """Read what `write` wrote, this version's or an older one's.

    Raises:
        UserError: the folder is not a release, is damaged, or was written by a newer version.
    """
    folder = Path(folder)
    require_files(folder, "a release", "config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "parts" in config:
            raise UserError(
                f"{folder} is a whole model, and a release is needed: give one of those in it, "
                f"such as {folder / 'decoder'}."
            )
        require_files(folder, "a release", "model.safetensors")
        if not isinstance(config["hyper_parameters"], dict):
            raise TypeError("its hyper_parameters have no names")
        tensors = load_file(folder / "model.safetensors")
        if config["format"] > FORMAT:
            raise UserError(
                f"The release {folder} has format {config['format']} and this version reads up to "
                f"{FORMAT}: update unclip_pl."
            )
        if config["format"] < FORMAT:
            tensors = rename(config["stage"], tensors)
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        return Release(
            config["stage"],
            config["hyper_parameters"],
            locate_clip(config["clip_fingerprint"], folder),
            tensors,
            config["steps"],
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"The release {folder} is damaged ({error}): fetch or export it again."
        ) from error


def require_files(folder: Path, kind: str, *names: str) -> None:
    """UserError where one of these files of a folder is missing."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} is not {kind} ({missing[0]} is missing): give a folder that `unclip export` "
            "wrote."
        )


def locate_clip(fingerprint: dict | None, folder: Path) -> dict | None:
    """Put the present folder of the CLIP into a fingerprint that names it relative to the release.

    Such a model is an open_clip folder ("local-dir:../clip"). Other fingerprints, and those whose
    folder is not there, are returned as they are.
    """
    model = (fingerprint or {}).get("config", {}).get("model", "")
    place = folder.resolve() / model.removeprefix("local-dir:")
    if not fingerprint or not model.startswith("local-dir:.") or not place.is_dir():
        return fingerprint
    config = fingerprint["config"] | {"model": f"local-dir:{place.resolve()}"}
    return fingerprint | {"config": config}
