"""Adapters (LoRA) of a fine-tune without the weights that they adapt, as peft keeps them.

adapter_config.json          peft's settings; base_model_name_or_path: the release that they adapt
adapter_model.safetensors    the adapters by peft's names, of the stage's `net`
buffers.safetensors          buffers of the stage after the fine-tune, such as its statistics
config.json                  stage, hyperparameters, and a digest of the weights that are adapted
README.md                    the card

This file knows folders and tensors, not stages.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip_pl import __version__
from unclip_pl.networks.lora import BASE, DOWN, UP, merged
from unclip_pl.pipeline.release import Release, require_files
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder
from unclip_pl.utils.outputs import require_new
from unclip_pl.utils.remote import is_remote

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BUFFERS_FILE = "buffers.safetensors"
OURS, THEIRS = "net.", "base_model.model."
"""In front of the names of a network's layers, here and in peft's files."""
SLOTS = {DOWN: ".lora_A.weight", UP: ".lora_B.weight"}


@dataclass(frozen=True)
class Adapters:
    """The contents of a folder of adapters."""

    base: str
    """Path or URL of the release or checkpoint that they adapt."""
    digest: str
    """Of the weights that they adapt; see `digest_of`."""
    scale: float
    """alpha / rank."""
    stage: str
    hyper_parameters: dict
    steps: int
    tensors: dict[str, Tensor] = field(repr=False)
    """The adapters by their names in a checkpoint."""
    buffers: dict[str, Tensor] = field(repr=False)

    def onto(self, weights: Release) -> Release:
        """The fine-tuned stage: `weights` with these adapters merged.

        Raises:
            UserError: they were trained on other weights.
        """
        if digest_of(weights.tensors, but=self.buffers) != self.digest:
            raise UserError(
                f"The adapters were trained on other weights than those in {self.base}: set "
                f"base_model_name_or_path in their {CONFIG_FILE} to the release of that run's "
                "--init."
            )
        adapted = {name.removesuffix(DOWN) for name in self.tensors if name.endswith(DOWN)}
        tensors = dict(self.tensors)
        for name, value in weights.tensors.items():
            layer, _, kind = name.rpartition(".")
            tensors[f"{layer}{BASE}{kind}" if layer in adapted else name] = value
        plain = merged(tensors, self.scale) | self.buffers
        fingerprint = weights.clip_fingerprint
        return Release(self.stage, self.hyper_parameters, fingerprint, plain, self.steps)


def digest_of(tensors: Mapping[str, Tensor], but: Collection[str] = ()) -> str:
    """A digest of weights by name, the same for float32 weights and their copy in float16.

    Args:
        tensors: by name.
        but: names of tensors that do not count.
    """
    digest = hashlib.sha256()
    for name in sorted(set(tensors) - set(but)):
        value = tensors[name]
        value = value.half() if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters."""
    return (folder / CONFIG_FILE).is_file()


def write(folder: Path, adapters: Adapters, card: str) -> None:
    """Write adapters atomically. An existing folder is not overwritten.

    Raises:
        UserError: `folder` exists, or the adapters are not finite.
    """
    require_new(folder)
    if broken := [name for name, value in adapters.tensors.items() if not value.isfinite().all()]:
        raise UserError(
            f"The adapters are not finite ({broken[0]}): train them again with a lower rate."
        )
    rank = next(len(value) for name, value in adapters.tensors.items() if name.endswith(DOWN))
    layers = [name.removesuffix(DOWN) for name in adapters.tensors if name.endswith(DOWN)]
    peft = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapters.base,
        "r": rank,
        "lora_alpha": adapters.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(layer.removeprefix(OURS) for layer in layers),
        "bias": "none",
        "inference_mode": True,
    }
    config = {
        "format": FORMAT,
        "unclip_pl": __version__,
        "stage": adapters.stage,
        "steps": adapters.steps,
        "hyper_parameters": adapters.hyper_parameters,
        "base_sha256": adapters.digest,
    }
    tensors = {_their_name(name): value for name, value in adapters.tensors.items()}
    with atomic_folder(folder) as temporary:
        _save(tensors, temporary / WEIGHTS_FILE)
        _save(adapters.buffers, temporary / BUFFERS_FILE)
        for name, values in ((CONFIG_FILE, peft), ("config.json", config)):
            text = json.dumps(values, indent=1) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, file, {"format": "pt"})


def _their_name(name: str) -> str:
    for ours, theirs in SLOTS.items():
        name = name.replace(ours, theirs)
    return THEIRS + name.removeprefix(OURS)


def _our_name(name: str) -> str:
    for ours, theirs in SLOTS.items():
        if name.endswith(theirs):
            return OURS + name.removeprefix(THEIRS).removesuffix(theirs) + ours
    raise ValueError(f"{name} is no adapter of a layer")


def read(folder: Path) -> Adapters:
    """Read what `write` wrote.

    Raises:
        UserError: files are missing or damaged, or a newer version wrote them.
    """
    require_files(folder, "one of adapters", "config.json", WEIGHTS_FILE, BUFFERS_FILE)
    try:
        peft, config = (_read_json(folder / name) for name in (CONFIG_FILE, "config.json"))
        if config["format"] > FORMAT:
            raise UserError(
                f"The adapters {folder} have format {config['format']} and this version reads up "
                f"to {FORMAT}: update unclip_pl."
            )
        base = str(peft["base_model_name_or_path"])
        return Adapters(
            base if is_remote(base) else os.path.normpath(folder.absolute() / base),
            config["base_sha256"],
            peft["lora_alpha"] / peft["r"],
            config["stage"],
            config["hyper_parameters"],
            config["steps"],
            {_our_name(name): value for name, value in load_file(folder / WEIGHTS_FILE).items()},
            load_file(folder / BUFFERS_FILE),
        )
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, SafetensorError) as error:
        raise UserError(
            f"The adapters {folder} are damaged ({error}): fetch or export them again."
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
