"""Which CLIP, and open_clip made to give it or to say in one sentence why not: unknown names, files, folders, activations, no network.

Weights are read as tensors alone (`weights_only`); open_clip is imported at the first use.
"""

import contextlib
import difflib
import functools
import importlib
import json
import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import repair_text

EMBEDDED = Path(__file__).parents[1] / "assets" / "clip-openmoji"
EMBEDDED_JUDGE = EMBEDDED.with_name("clip-openmoji-judge")  # judges pictures, conditions none
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "pure_fp16": torch.float16,
    "pure_bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class CLIPConfig:
    """Which CLIP."""

    model: str = "openmoji"
    """"openmoji" (the small one in the package), "openmoji-judge" (the one that only judges), an
    open_clip name such as "ViT-L-14-quickgelu", or "local-dir:/folder" of open_clip's form."""
    pretrained: str | None = None
    """With an open_clip name: a tag such as "openai", or a weights file."""
    precision: str = "fp32"
    """fp32, bf16, fp16 (norms stay float32), pure_bf16 or pure_fp16."""
    force_quick_gelu: bool = False
    """The activation of OpenAI's weights, for a name without "-quickgelu"."""
    context_length: int | None = None
    """Tokens a caption is cut or padded to; None: the model's own."""

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise UserError(
                f"clip.precision is {self.precision}, which CLIP does not know: set one of {', '.join(DTYPES)}."
            )

    def __str__(self) -> str:
        return f"{self.model} / {self.pretrained}" if self.pretrained else self.model

    @classmethod
    def of_fingerprint(cls, fingerprint: dict) -> "CLIPConfig":
        """The CLIP that a fingerprint was taken of, by name."""
        return cls(**fingerprint["config"])


def import_open_clip() -> ModuleType:
    """open_clip, imported at the first use, after torchvision was made to import."""
    importlib.import_module("unclip_pl.utils.torchvision")
    return importlib.import_module("open_clip")


def load_tokenizer(config: CLIPConfig) -> Any:
    """The model's own tokenizer: list of B strings -> (B, L). Of a folder it needs the configuration alone, not the weights."""
    open_clip = import_open_clip()
    folder = folder_of(config.model)
    if folder:
        folder_config(folder)
    with _explained(config), _quiet():
        return open_clip.get_tokenizer(
            f"local-dir:{folder}" if folder else _checked(config),
            context_length=config.context_length,
        )


@functools.cache
def _bpe() -> Any:
    return import_open_clip().SimpleTokenizer()


def tokenize_bpe(captions: list[str], length: int) -> Tensor:
    """B captions -> (B, length) int64 by open_clip's BPE, whatever the CLIP: 0 after the end token,
    which has the largest id of all."""
    return _bpe()([repair_text(caption) for caption in captions], context_length=length)


def load_model(config: CLIPConfig) -> nn.Module:
    """open_clip's model on the CPU with its weights, checked.

    Raises:
        UserError: unknown name or tag, no network, missing or damaged file, the wrong activation, or a text tower that cannot be used.
    """
    open_clip = import_open_clip()
    name, tag = _checked(config), config.pretrained
    settings = {
        "precision": config.precision,
        "force_quick_gelu": config.force_quick_gelu,
        "force_context_length": config.context_length,
    }
    with _explained(config), _quiet():
        if tag and _is_torchscript(_file(tag)):
            model = open_clip.create_model(name, **settings)
            constants = ("input_resolution", "context_length", "vocab_size", "attn_mask")
            weights = torch.jit.load(_file(tag), map_location="cpu").state_dict()
            model.load_state_dict(
                {key: value for key, value in weights.items() if key not in constants}
            )
        else:
            pretrained = (
                tag
                if not tag or open_clip.pretrained.is_pretrained_cfg(name, tag)
                else str(_file(tag))
            )
            model = open_clip.create_model(
                name, pretrained=pretrained, require_pretrained=True, weights_only=True, **settings
            )
    text = getattr(model, "text", model)
    if (
        pooling(model)[0] not in ("argmax", "eos")
        or not hasattr(text, "ln_final")
        or getattr(text, "cls_emb", None) is not None
    ):
        raise UserError(
            f"The CLIP {config} does not take its text embedding from the state of the end token, which the stages need: use another."
        )
    if model.visual.preprocess_cfg["resize_mode"] not in ("shortest", "squash"):
        raise UserError(
            f"The CLIP {config} resizes by the longest side and pads, which is not supported: use another."
        )
    return model


def clip_architecture(config: CLIPConfig) -> nn.Module:
    """open_clip's model on the meta device: its sizes without its weights, which are not read.

    Raises:
        UserError: unknown name, tag or folder.
    """
    open_clip, folder = import_open_clip(), folder_of(config.model)
    with torch.device("meta"), _explained(config), _quiet():
        if folder:
            return open_clip.model.CLIP(**folder_config(folder)["model_cfg"])
        length = config.context_length
        return open_clip.create_model(_checked(config), device="meta", force_context_length=length)


def pooling(model: Any) -> tuple[str, int]:
    """How the text tower finds its embedding among the states ("argmax", "eos", ...), and the end token's number for "eos"."""
    if hasattr(model, "text"):
        return getattr(model.text, "pool_type", "none"), getattr(model.text, "eos_id", -1)
    return model.text_pool_type, model.text_eos_id


def text_features(model: Any, tokens: Tensor, end_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A model's text embeddings (B, D) and token states after the final norm (B, n, W).

    Args:
        model: open_clip's, with a text tower that `load_model` accepts.
        tokens: (B, L), L being the context length.
        end_B: the end token's place in each caption.
        length: of the longest caption. What follows is left out (n = `length`) unless tokens see
            those after them (then n = L).
    """
    text = getattr(model, "text", model)
    if length == text.context_length or text.attn_mask is None:
        output = model.forward_intermediates(
            text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
        )
        return output["text_features"], output["text_intermediates"][-1]
    return _short_text_features(text, tokens[:, :length], end_B)


def _short_text_features(text: Any, tokens: Tensor, end_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same by hand, because open_clip runs captions of the full context length only.

    A caption of 8 tokens would take as long as one of 77.
    """
    length, dtype = tokens.shape[1], text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
    states_BLW = text.ln_final(x)
    embed = states_BLW[torch.arange(len(tokens), device=tokens.device), end_B]
    project = text.text_projection
    if project is not None:
        embed = project(embed) if isinstance(project, nn.Linear) else embed @ project
    return embed, states_BLW


def folder_of(name: str) -> Path | None:
    """The open_clip folder that a model's name stands for, if it does."""
    if name == "openmoji":
        return EMBEDDED
    if name == "openmoji-judge":
        return EMBEDDED_JUDGE
    return (
        Path(name.removeprefix("local-dir:")).expanduser()
        if name.startswith("local-dir:")
        else None
    )


def _file(tag: str) -> Path:
    return Path(tag).expanduser()


def folder_config(folder: Path) -> dict:
    """`open_clip_config.json` of an open_clip folder: {model_cfg, preprocess_cfg}."""
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is no open_clip folder ({CONFIG_FILE}: {error.strerror}): put {CONFIG_FILE} and {WEIGHTS_FILE} there."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{folder / CONFIG_FILE} is not JSON ({error}): put the right file there."
        ) from None


def _checked(config: CLIPConfig) -> str:
    """open_clip's name of the model, after everything that can be said without reading weights."""
    import open_clip
    from open_clip.pretrained import (
        get_pretrained_cfg,
        is_pretrained_cfg,
        list_pretrained_tags_by_model,
    )

    name, tag, folder = config.model.replace("/", "-"), config.pretrained, folder_of(config.model)
    if folder:
        folder_config(folder)
        if tag:
            raise UserError(
                f"The CLIP {config.model} brings its own weights, and pretrained is {tag}: remove one of the two."
            )
        if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
            own = (
                " (or train it: `lightning fit -c stages/clip.yaml`, then `unclip export`)"
                if config.model == "openmoji"
                else ""
            )
            raise UserError(f"{folder} holds no weights: put {WEIGHTS_FILE} there{own}.")
        return f"local-dir:{folder}"
    if name not in open_clip.list_models():
        known = {model.lower(): model for model in open_clip.list_models()}
        near = [known[model] for model in difflib.get_close_matches(name.lower(), known, 3, 0.5)]
        hint = (
            f"did you mean {' or '.join(near)}" if near else "`open_clip.list_models()` lists them"
        )
        also = (
            f"; a folder is given as local-dir:{config.model}"
            if Path(config.model).expanduser().is_dir()
            else ""
        )
        raise UserError(f"open_clip has no model {config.model}: {hint}{also}.")
    tags = ", ".join(list_pretrained_tags_by_model(name)) or "none is known"
    if not tag:
        raise UserError(
            f"The CLIP {name} needs weights: set pretrained to a weights file or a tag ({tags})."
        )
    if not is_pretrained_cfg(name, tag) and not _file(tag).is_file():
        base = name.removesuffix("-quickgelu")
        if is_pretrained_cfg(base, tag):
            raise UserError(
                f"The weights {tag} were trained with GELU and would give wrong embeddings as {name}: use {base}."
            )
        raise UserError(
            f"{tag} is neither a file nor a tag of {name}: set pretrained to a weights file or a tag ({tags})."
        )
    known = get_pretrained_cfg(name, tag)
    wants = bool(known.get("quick_gelu")) if known else _known_quick_gelu(name, _file(tag))
    if wants and not (
        config.force_quick_gelu or open_clip.get_model_config(name).get("quick_gelu")
    ):
        right = (
            f"{name}-quickgelu"
            if f"{name}-quickgelu" in open_clip.list_models()
            else f"{name} with force_quick_gelu"
        )
        raise UserError(
            f"The weights {tag} were trained with QuickGELU and would give wrong embeddings as {name}: use {right}."
        )
    if known and not wants and config.force_quick_gelu:
        raise UserError(
            f"The weights {tag} of {name} were trained with GELU and would give wrong embeddings: remove force_quick_gelu."
        )
    return name


def _known_quick_gelu(name: str, file: Path) -> bool:
    """A file of OpenAI's, or one in the hub's cache of a repository whose tag says so."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    repositories = [
        "models--" + tag["hf_hub"].rpartition("/")[0].replace("/", "--")
        for tag in tags
        if tag.get("quick_gelu") and tag.get("hf_hub")
    ]
    return _is_torchscript(file) or not set(repositories).isdisjoint(file.parts)


def _is_torchscript(file: Path) -> bool:
    """OpenAI's own files are TorchScript archives, which hold code/ beside the weights."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        return any("/code/" in entry for entry in archive.namelist())
    return False


@contextlib.contextmanager
def _explained(config: CLIPConfig) -> Iterator[None]:
    """Whatever open_clip raises becomes one sentence that says where to put the files by hand."""
    from open_clip.pretrained import get_pretrained_cfg

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = (
            get_pretrained_cfg(config.model.replace("/", "-"), config.pretrained)
            if config.pretrained
            else {}
        )
        said = str(error).strip()
        if "unsupported global" in said.lower() or "unsupported class" in said.lower():
            why, do = (
                "it holds Python objects that could run code when loaded, not weights alone",
                f"get a {WEIGHTS_FILE} of it instead",
            )
        elif known and "download" in said:
            why = "its weights could not be downloaded" + (
                " as HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
            )
            do = (
                f"connect once, or get {known.get('url')} elsewhere and set pretrained to that file"
            )
            if known.get("hf_hub"):
                page = "huggingface.co/" + "/".join(known["hf_hub"].split("/")[:2])
                do = f"connect once, or put {CONFIG_FILE} and {WEIGHTS_FILE} of {page} into a folder and set model to local-dir:/that/folder"
        else:
            lines = [line.strip() for line in said.splitlines() if line.strip()] or [
                type(error).__name__
            ]
            why = (
                "its file is not of a kind that holds weights"
                if isinstance(error, pickle.UnpicklingError)
                else " ".join(lines[:2])[:200].rstrip(".:")
            )
            do = "the weights are damaged or belong to another model, so get the right file"
        raise UserError(f"The CLIP {config} cannot be loaded, {why}: {do}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs and warns much while it builds a model; what matters is checked here."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(silent)  # without any, logging.warning would install one for good
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(silent)
