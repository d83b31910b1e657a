"""open_clip's models and tokenizers for a `CLIPConfig`.

Weights are read as tensors only (`weights_only`). open_clip is imported at the first use.
"""

import functools
import importlib
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unclip_pl.clip.checks import (
    check_model,
    explained_errors,
    is_torchscript,
    silenced,
    weights_file,
)
from unclip_pl.clip.config import CLIPConfig, folder_of, read_folder_config
from unclip_pl.clip.text_tower import text_pooling
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import repair_text

MARKS = re.compile("(start|end)_of_text", re.IGNORECASE)


def import_open_clip() -> ModuleType:
    """open_clip, which takes seconds to import, at the first use."""
    return importlib.import_module("open_clip")


def load_tokenizer(config: CLIPConfig) -> Any:
    """The model's own tokenizer: list of B strings -> (B, L).

    Of a folder only the configuration is read, not the weights.

    Raises:
        UserError: see `load_model`.
    """
    open_clip = import_open_clip()
    folder = folder_of(config.model)
    if folder:
        read_folder_config(folder)
    with explained_errors(config), silenced():
        name = f"local-dir:{folder}" if folder else check_model(config)
        return open_clip.get_tokenizer(name, context_length=config.context_length)


def plain_text(caption: str) -> str:
    """A caption as a tokenizer gets it: valid Unicode, without the names of open_clip's marks.

    A mark such as <end_of_text> in a caption would end it there, without a word.
    """
    return MARKS.sub(lambda mark: mark[0].replace("_", " "), repair_text(caption))


@functools.cache
def _bpe_tokenizer() -> Any:
    return import_open_clip().SimpleTokenizer()


def tokenize_bpe(captions: list[str], length: int) -> Tensor:
    """B captions -> (B, length) int64 by open_clip's BPE, whichever CLIP is used.

    The end token has the largest id of all; after it follow zeros.
    """
    return _bpe_tokenizer()([plain_text(caption) for caption in captions], context_length=length)


def load_model(config: CLIPConfig) -> nn.Module:
    """open_clip's model on the CPU with its weights, checked.

    Raises:
        UserError: unknown name or tag, no network, missing or damaged file, the wrong activation,
            or a text tower or preprocessing that cannot be used.
    """
    import_open_clip()
    name = check_model(config)
    with explained_errors(config), silenced():
        model = _create_model(name, config)
    text = getattr(model, "text", model)
    if (
        text_pooling(model)[0] not in ("argmax", "eos")
        or not hasattr(text, "ln_final")
        or getattr(text, "cls_emb", None) is not None
    ):
        raise UserError(
            f"The CLIP {config} does not take its text embedding from the state of the end token, "
            "which the stages need: use another."
        )
    if model.visual.preprocess_cfg["resize_mode"] not in ("shortest", "squash"):
        raise UserError(
            f"The CLIP {config} resizes by the longest side and pads, which is not supported: use "
            "another."
        )
    return model


def _create_model(name: str, config: CLIPConfig) -> Any:
    open_clip, tag = import_open_clip(), config.pretrained
    settings = {
        "precision": config.precision,
        "force_quick_gelu": config.force_quick_gelu,
        "force_context_length": config.context_length,
    }
    if tag and is_torchscript(weights_file(tag)):
        model = open_clip.create_model(name, **settings)
        constants = ("input_resolution", "context_length", "vocab_size", "attn_mask")
        weights = torch.jit.load(weights_file(tag), map_location="cpu").state_dict()
        model.load_state_dict(
            {key: value for key, value in weights.items() if key not in constants}
        )
        return model
    pretrained = tag
    if tag and not open_clip.pretrained.is_pretrained_cfg(name, tag):
        pretrained = str(weights_file(tag))
    return open_clip.create_model(
        name, pretrained=pretrained, require_pretrained=True, weights_only=True, **settings
    )


def clip_architecture(config: CLIPConfig) -> nn.Module:
    """open_clip's model on the meta device: its sizes, without reading its weights.

    Raises:
        UserError: unknown name, tag or folder.
    """
    open_clip, folder = import_open_clip(), folder_of(config.model)
    with torch.device("meta"), explained_errors(config), silenced():
        if folder:
            return open_clip.model.CLIP(**read_folder_config(folder)["model_cfg"])
        length = config.context_length
        return open_clip.create_model(
            check_model(config), device="meta", force_context_length=length
        )
