"""What can be wrong with a CLIP, each in one sentence.

Unknown names and tags, missing files, the wrong activation, no network.
"""

import contextlib
import difflib
import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from unclip_pl.clip.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CLIPConfig,
    folder_of,
    read_folder_config,
)
from unclip_pl.utils.errors import UserError


def weights_file(tag: str) -> Path:
    """The file that `pretrained` names where it is no tag."""
    return Path(tag).expanduser()


def check_model(config: CLIPConfig) -> str:
    """Check all that can be checked without reading weights; returns open_clip's name of the model.

    Raises:
        UserError: an unknown name or tag, a missing file, or the wrong activation for the weights.
    """
    import open_clip

    folder = folder_of(config.model)
    if folder:
        return _check_folder(config, folder)
    name = config.model.replace("/", "-")
    if name not in open_clip.list_models():
        raise UserError(f"open_clip has no model {config.model}: {_hint(config.model)}.")
    _check_tag(name, config.pretrained)
    _check_activation(name, config)
    return name


def _check_folder(config: CLIPConfig, folder: Path) -> str:
    read_folder_config(folder)
    if config.pretrained:
        raise UserError(
            f"The CLIP {config.model} brings its own weights, and pretrained is "
            f"{config.pretrained}: remove one of the two."
        )
    if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
        train = ""
        if config.model == "openmoji":
            train = " (or train it: `lightning fit -c stages/clip.yaml`, then `unclip export`)"
        raise UserError(f"{folder} holds no weights: put {WEIGHTS_FILE} there{train}.")
    return f"local-dir:{folder}"


def _hint(model: str) -> str:
    """What an unknown model's name may have been meant to be."""
    import open_clip

    names = {name.lower(): name for name in open_clip.list_models()}
    close = difflib.get_close_matches(model.replace("/", "-").lower(), names, 3, 0.5)
    hint = "`open_clip.list_models()` lists them"
    if close:
        hint = "did you mean " + " or ".join(names[name] for name in close)
    if Path(model).expanduser().is_dir():
        hint += f"; a folder is given as local-dir:{model}"
    return hint


def _check_tag(name: str, tag: str | None) -> None:
    from open_clip.pretrained import is_pretrained_cfg, list_pretrained_tags_by_model

    tags = ", ".join(list_pretrained_tags_by_model(name)) or "none is known"
    if not tag:
        raise UserError(
            f"The CLIP {name} needs weights: set pretrained to a weights file or a tag ({tags})."
        )
    if is_pretrained_cfg(name, tag) or weights_file(tag).is_file():
        return
    base = name.removesuffix("-quickgelu")
    if is_pretrained_cfg(base, tag):
        raise UserError(
            f"The weights {tag} were trained with GELU and would give wrong embeddings as {name}: "
            f"use {base}."
        )
    raise UserError(
        f"{tag} is neither a file nor a tag of {name}: set pretrained to a weights file or a tag "
        f"({tags})."
    )


def _check_activation(name: str, config: CLIPConfig) -> None:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tag = config.pretrained or ""
    pretrained = get_pretrained_cfg(name, tag)
    if pretrained:
        needs_quick_gelu = bool(pretrained.get("quick_gelu"))
    else:
        needs_quick_gelu = _is_known_quick_gelu(name, weights_file(tag))
    has_quick_gelu = open_clip.get_model_config(name).get("quick_gelu")
    if needs_quick_gelu and not (config.force_quick_gelu or has_quick_gelu):
        right = f"{name}-quickgelu"
        if right not in open_clip.list_models():
            right = f"{name} with force_quick_gelu"
        raise UserError(
            f"The weights {tag} were trained with QuickGELU and would give wrong embeddings as "
            f"{name}: use {right}."
        )
    if pretrained and not needs_quick_gelu and config.force_quick_gelu:
        raise UserError(
            f"The weights {tag} of {name} were trained with GELU and would give wrong embeddings: "
            "remove force_quick_gelu."
        )


def _is_known_quick_gelu(name: str, file: Path) -> bool:
    """Whether a file is OpenAI's, or lies in the hub's cache of a repository with QuickGELU."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    repositories = [
        "models--" + tag["hf_hub"].rpartition("/")[0].replace("/", "--")
        for tag in tags
        if tag.get("quick_gelu") and tag.get("hf_hub")
    ]
    return is_torchscript(file) or not set(repositories).isdisjoint(file.parts)


def is_torchscript(file: Path) -> bool:
    """OpenAI's own files are TorchScript archives, which hold code/ next to the weights."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        return any("/code/" in entry for entry in archive.namelist())
    return False


@contextlib.contextmanager
def explained_errors(config: CLIPConfig) -> Iterator[None]:
    """Turn whatever open_clip raises into one sentence that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why, cure = _explain(error, config)
        raise UserError(f"The CLIP {config} cannot be loaded, {why}: {cure}.") from error


def _explain(error: Exception, config: CLIPConfig) -> tuple[str, str]:
    """(why open_clip could not load the model, what to do)."""
    from open_clip.pretrained import get_pretrained_cfg

    message = str(error).strip()
    if "unsupported global" in message.lower() or "unsupported class" in message.lower():
        why = "it holds Python objects that could run code when loaded, not only weights"
        return why, f"get a {WEIGHTS_FILE} of it instead"
    pretrained: dict = {}
    if config.pretrained:
        pretrained = get_pretrained_cfg(config.model.replace("/", "-"), config.pretrained)
    if pretrained and "download" in message:
        why = "its weights could not be downloaded"
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            why += " as HF_HUB_OFFLINE is set"
        return why, _where_to_get(pretrained)
    if isinstance(error, pickle.UnpicklingError):
        why = "its file is not of a kind that holds weights"
    else:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        why = " ".join(lines[:2] or [type(error).__name__])[:200].rstrip(".:")
    return why, "the weights are damaged or belong to another model, so get the right file"


def _where_to_get(pretrained: dict) -> str:
    if not pretrained.get("hf_hub"):
        url = pretrained.get("url")
        return f"connect once, or get {url} elsewhere and set pretrained to that file"
    page = "huggingface.co/" + "/".join(pretrained["hf_hub"].split("/")[:2])
    return (
        f"connect once, or put {CONFIG_FILE} and {WEIGHTS_FILE} of {page} into a folder and set "
        "model to local-dir:/that/folder"
    )


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence open_clip, which logs and warns much while it builds a model.

    What matters is checked in this module.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(handler)  # without any, logging.warning would install one for good
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
