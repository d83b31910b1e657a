"""CLIP's text and vision towers as Hugging Face has them -> one open_clip folder, and back."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unclip_pl.clip.config import CONFIG_FILE, WEIGHTS_FILE
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import import_open_clip
from unclip_pl.pipeline.interop.files import read_json, read_network, sensible
from unclip_pl.pipeline.interop.keys import Names, fill
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder

LAYER = {
    "ln_1": ("layer_norm1",),
    "attn.in_proj_": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}
TEXT: Names = {
    "positional_embedding": ("text_model.embeddings.position_embedding.weight",),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight",),
    "ln_final.weight": ("text_model.final_layer_norm.weight",),
    "ln_final.bias": ("text_model.final_layer_norm.bias",),
    "text_projection": ("text_projection.weight",),
}
VISION: Names = {
    "visual.class_embedding": ("vision_model.embeddings.class_embedding",),
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight",),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight",),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight",),
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias",),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight",),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias",),
    "visual.proj": ("visual_projection.weight",),
}
TRANSPOSED = "text_projection", "visual.proj"
"""open_clip multiplies by them from the other side."""
LOGIT_SCALE = math.log(100.0)
"""Where OpenAI's CLIPs ended; the towers of Hugging Face do not have it, and no stage reads it."""
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
OPENAI = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
TOLERANCE = 0.01
"""Relative distance of two copies of one weight that float16 can explain."""


def tower_names(layers: int, tower: str) -> Names:
    """Of the "text" or the "vision" tower of an open_clip model."""
    found: Names = dict(TEXT if tower == "text" else VISION)
    ours = "" if tower == "text" else "visual."
    for i in range(layers):
        for name, theirs in LAYER.items():
            for kind in ("weight", "bias"):
                joint = "" if name.endswith("_") else "."
                found[f"{ours}transformer.resblocks.{i}.{name}{joint}{kind}"] = tuple(
                    f"{tower}_model.encoder.layers.{i}.{other}.{kind}" for other in theirs
                )
    return found


def read_tower(folder: Path, tower: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, open_clip's tensors) of Hugging Face's text_encoder or image_encoder.

    Raises:
        UserError: files are missing or damaged, or it is no tower of a CLIP.
    """
    config, source = read_network(folder)
    kind = f"clip_{tower}_model"
    if config.get("model_type") != kind:
        raise UserError(
            f"{folder} holds a {config.get('model_type')}, and CLIP's {tower} tower with its "
            f"projection ({kind}) is needed: give the folder as its authors published it."
        )
    if config.get("hidden_act") not in ACTIVATIONS or config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(
            f"{folder} has hidden_act {config.get('hidden_act')} and layer_norm_eps "
            f"{config.get('layer_norm_eps')}, which open_clip's CLIP does not have: use another."
        )
    source = source.without(".position_ids")  # 0, 1, 2, ..., which older versions saved
    with sensible(str(folder)), torch.device("meta"):
        names = tower_names(config["num_hidden_layers"], tower)
        model = import_open_clip().model.CLIP(**_model_config(config, config))
    ours = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    ours |= {name: ours[name].T for name in TRANSPOSED if name in ours}
    found = fill(ours, names, source)
    return config, found | {name: found[name].T for name in TRANSPOSED if name in found}


def _model_config(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """open_clip's `model_cfg` of two towers; given one of them twice, that tower is right."""
    return {
        "embed_dim": text["projection_dim"],
        "quick_gelu": ACTIVATIONS[text["hidden_act"]],
        "vision_cfg": {
            "image_size": vision.get("image_size", 224),
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "patch_size": vision.get("patch_size", 32),
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def _preprocessing(folder: Path, image_size: int) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` from Hugging Face's image processor of a tower."""
    places = (folder.parent / name for name in ("feature_extractor", "image_processor"))
    files = [place / "preprocessor_config.json" for place in places]
    given = next((read_json(file) for file in files if file.is_file()), {})
    bilinear = given.get("resample", 3) == 2  # PIL's numbers of its filters
    size = given.get("size")
    squash = isinstance(size, dict) and "height" in size
    return {
        "size": image_size,
        "mode": "RGB",
        "mean": given.get("image_mean", OPENAI["mean"]),
        "std": given.get("image_std", OPENAI["std"]),
        "interpolation": "bilinear" if bilinear else "bicubic",
        "resize_mode": "squash" if squash else "shortest",
        "fill_color": 0,
    }


def convert_towers(text_folder: Path, image_folder: Path, out: Path) -> None:
    """Write an open_clip folder, whole or not at all, from both towers; float16, as published.

    Raises:
        UserError: a tower is missing or damaged, or the two are of different CLIPs.
    """
    text, text_tensors = read_tower(text_folder, "text")
    vision, image_tensors = read_tower(image_folder, "vision")
    for key in ("projection_dim", "hidden_act"):
        if text[key] != vision[key]:
            raise UserError(
                f"{text_folder} has {key} {text[key]} and {image_folder} {vision[key]}: they are "
                "towers of different CLIPs, so give those of one."
            )
    tensors = text_tensors | image_tensors | {"logit_scale": torch.tensor(LOGIT_SCALE)}
    halved = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    config = {
        "model_cfg": _model_config(text, vision),
        "preprocess_cfg": _preprocessing(image_folder, vision.get("image_size", 224)),
    }
    with atomic_folder(out) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(halved, temporary / WEIGHTS_FILE)


def require_same_text_tower(folder: Path, model: nn.Module, name: str) -> None:
    """UserError unless a text_encoder folder holds the text tower of `model`, the CLIP `name`."""
    config, theirs = read_tower(folder, "text")
    quick_gelu = import_open_clip().transformer.QuickGELU
    quick = any(isinstance(module, quick_gelu) for module in model.modules())
    ours = model.state_dict()
    worst = max((_distance(tensor, ours.get(key)) for key, tensor in theirs.items()), default=0.0)
    if quick != ACTIVATIONS[config["hidden_act"]] or not worst <= TOLERANCE:
        raise UserError(
            f"The CLIP {name} is not the one whose text tower is in {folder}: give the CLIP that "
            "the weights were trained with (--clip)."
        )


def _distance(theirs: Tensor, ours: Tensor | None) -> float:
    """Relative distance; infinite where there is none or one of another shape."""
    if ours is None or ours.shape != theirs.shape:
        return math.inf
    a, b = theirs.float(), ours.float()
    return ((a - b).norm() / a.norm().clamp(min=1e-12)).item()


def write_towers(clip: FrozenCLIP, out: Path) -> None:
    """text_encoder, image_encoder, feature_extractor and tokenizer of Hugging Face's form.

    Raises:
        UserError: the CLIP has parts that those classes do not have.
    """
    ours = clip.model.state_dict()
    ours.pop("logit_scale", None)
    for name in TRANSPOSED:
        if name in ours:
            ours[name] = ours[name].T
    for tower, settings in (("text", _text_settings(clip)), ("vision", _vision_settings(clip))):
        names = tower_names(settings["num_hidden_layers"], tower)
        if missing := [name for name in names if name not in ours]:
            raise UserError(
                f"The CLIP {clip.config} has no {missing[0]}, which Hugging Face's CLIP has: only "
                "CLIPs of OpenAI's architecture can be exported."
            )
        tensors = {
            other: part.contiguous()
            for name, others in names.items()
            for other, part in zip(others, ours.pop(name).chunk(len(others)))
        }
        folder = out / ("text_encoder" if tower == "text" else "image_encoder")
        folder.mkdir()
        _write_json(folder / "config.json", settings)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if ours:
        raise UserError(
            f"The CLIP {clip.config} has {next(iter(ours))}, and Hugging Face's CLIP does "
            "not: only CLIPs of OpenAI's architecture can be exported."
        )
    (out / "feature_extractor").mkdir()
    _write_json(out / "feature_extractor" / "preprocessor_config.json", _processor(clip))
    write_tokenizer(clip.context_length, out / "tokenizer")


def _shared(clip: FrozenCLIP, transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    quick_gelu = import_open_clip().transformer.QuickGELU
    quick = any(isinstance(module, quick_gelu) for module in transformer.modules())
    return {
        "hidden_act": "quick_gelu" if quick else "gelu",
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(transformer.resblocks),
        "projection_dim": clip.embed_dim,
        "layer_norm_eps": 1e-5,
    }


def _text_settings(clip: FrozenCLIP) -> dict[str, Any]:
    model = clip.model
    if not hasattr(model, "transformer") or not hasattr(model, "token_embedding"):
        raise UserError(
            f"The CLIP {clip.config} has a text tower of its own, which Hugging Face's CLIP has "
            "not: only CLIPs of OpenAI's architecture can be exported."
        )
    return _shared(clip, model.transformer) | {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "max_position_embeddings": clip.context_length,
        "vocab_size": model.token_embedding.num_embeddings,
        "pad_token_id": 0,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def _vision_settings(clip: FrozenCLIP) -> dict[str, Any]:
    visual = clip.model.visual
    if not hasattr(visual, "transformer") or getattr(visual, "attn_pool", None) is not None:
        raise UserError(
            f"The CLIP {clip.config} sees with another network than a plain ViT, which Hugging "
            "Face's CLIP does not have: only CLIPs of OpenAI's architecture can be exported."
        )
    return _shared(clip, visual.transformer) | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": clip.image_size,
        "patch_size": visual.conv1.kernel_size[0],
        "num_channels": 3,
    }


def _processor(clip: FrozenCLIP) -> dict[str, Any]:
    given, side = clip.model.visual.preprocess_cfg, clip.image_size
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": square if given["resize_mode"] == "squash" else {"shortest_edge": side},
        "crop_size": square,
        "resample": 2 if given["interpolation"] == "bilinear" else 3,
        "image_mean": list(given["mean"]),
        "image_std": list(given["std"]),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
    }


def write_tokenizer(length: int, folder: Path) -> None:
    """CLIP's BPE as Hugging Face's CLIPTokenizer reads it, padded with 0 ("!") as Karlo's is."""
    bpe = import_open_clip().SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    folder.mkdir()
    _write_json(
        folder / "vocab.json", {special.get(word, word): i for word, i in bpe.encoder.items()}
    )
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.get)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": "!"}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
