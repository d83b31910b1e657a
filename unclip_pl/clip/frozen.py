"""A frozen CLIP behind a few methods (open_clip's models), and a fingerprint of what it does, not of what it is called.

Images come as floats in [-1, 1] of any size; embeddings leave as float32, as CLIP gives them: not normalised. It is no nn.Module, so that EMA,
checkpoints and optimisers cannot swallow it.
"""

import base64
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.clip.loading import (
    CONFIG_FILE,
    DTYPES,
    EMBEDDED,  # noqa: F401
    WEIGHTS_FILE,
    CLIPConfig,
    clip_architecture,  # noqa: F401
    folder_config,
    folder_of,
    import_open_clip,
    load_model,
    load_tokenizer,
    pooling,
    text_features,
    tokenize_bpe,  # noqa: F401
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder
from unclip_pl.utils.precision import supports_dtype
from unclip_pl.utils.text import repair_text

FIXED_CAPTION = "a red apple on a blue table"
TOLERANCE = 0.04
"""Relative distance of two fingerprints' embeddings that rounding can explain (cosine 0.999); bfloat16 alone moves them by about 0.01."""

CPU_BATCH = 32
"""Images that go through CLIP at a time on a CPU: about 8 % less time than with 64."""

Fingerprint = dict[str, Any]
"""Plain JSON values: `config`, the sizes, `activation`, `preprocessing`, and `image` and `text`, two embeddings as base64 of float16."""


class ClipMismatch(UserError):
    """Something was made with another CLIP than the one at hand."""


class TextFeatures(NamedTuple):
    """`embed` (B, D); `states` (B, L, W) of the last layer after the final norm, 0 beyond `mask`; `mask` (B, L), True up to and
    including the end token."""

    embed: Tensor
    states: Tensor
    mask: Tensor


class FrozenCLIP:
    """A CLIP in eval mode without gradients. Weights and tokenizer are read at their first use and stay behind when it is pickled.

    Raises:
        UserError: at the first use, where the model cannot be had or is of a kind that the stages cannot use.
    """

    def __init__(
        self, config: CLIPConfig = CLIPConfig(), device: str | torch.device = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._model: nn.Module | None = None
        self._tokenizer: Any = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_model": None, "_tokenizer": None}

    @property
    def model(self) -> Any:
        """open_clip's model."""
        if self._model is None:
            model, wanted = (
                load_model(self.config).eval().requires_grad_(False),
                DTYPES[self.config.precision],
            )
            self.dtype = (
                wanted if supports_dtype(wanted, self.device) else torch.float32
            )  # the weights stay rounded
            self._model = (model if self.dtype == wanted else model.float()).to(self.device)
        return self._model

    @property
    def embed_dim(self) -> int:
        """D, the width of the joint embedding."""
        projection = self._text.text_projection
        if projection is None:
            return self.states_width
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @property
    def states_width(self) -> int:
        """W, the width of the text tower's token states."""
        return self._text.ln_final.normalized_shape[0]

    @property
    def context_length(self) -> int:
        """L, the number of tokens of a caption."""
        return self._text.context_length

    @property
    def image_size(self) -> int:
        """Side of the images that the model sees, in pixels; others are resized."""
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def to(self, device: str | torch.device) -> "FrozenCLIP":
        """Move to a device, in place."""
        wanted, self.device = DTYPES[self.config.precision], torch.device(device)
        if self._model is not None and self.dtype != wanted and supports_dtype(wanted, self.device):
            self._model = (
                None  # this device computes in the type that the last one had no instructions for
            )
        elif self._model is not None:
            self._model.to(self.device)
        return self

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, D) float32, not normalised.

        Resized (antialiased), cut and scaled as the model's configuration says.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"CLIP was given images {tuple(images.shape)} of {images.dtype}: give floats (B, 3, H, W) in [-1, 1]."
            )
        if self.device.type == "cpu" and len(images) > CPU_BATCH:
            return torch.cat([self.embed_images(part) for part in images.split(CPU_BATCH)])
        cfg = self.model.visual.preprocess_cfg
        with torch.autocast(self.device.type, enabled=False):
            images = images.to(self.device, torch.float32)
            images = fitted(images, self.image_size, cfg["resize_mode"], cfg["interpolation"])
            mean = torch.tensor(cfg["mean"], device=self.device).view(3, 1, 1)
            std = torch.tensor(cfg["std"], device=self.device).view(3, 1, 1)
            # ((images + 1) / 2 - mean) / std at one go
            pixels = torch.addcmul((0.5 - mean) / std, images, 0.5 / std)
            return self.model.encode_image(pixels.to(self.dtype)).float()

    @torch.no_grad()
    def embed_text(self, tokens: Tensor) -> TextFeatures:
        """(B, L) int64 of `tokenize` -> embeddings and token states, in one pass.

        The embedding is `encode_text`'s, not normalised. Tokens that lie on the CPU are cut after
        the longest caption of the batch, which changes nothing in a causal text tower.
        """
        mask = self.caption_mask(tokens)
        if (
            self.device.type == "cpu" and len(tokens) > CPU_BATCH
        ):  # captions of like length together
            order = mask.sum(1).argsort()
            parts = [self.embed_text(tokens[part]) for part in order.split(CPU_BATCH)]
            place = order.argsort()
            return TextFeatures(*(torch.cat(part)[place] for part in zip(*parts)))
        length = tokens.shape[1]
        if tokens.device.type == "cpu":  # elsewhere the host would have to wait for the number
            length = int(mask.sum(1).max())
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            embed, states_BLW = text_features(self.model, tokens, mask.sum(1) - 1, length)
        states_BLW = F.pad(states_BLW.float(), (0, 0, 0, tokens.shape[1] - states_BLW.shape[1]))
        return TextFeatures(embed.float(), states_BLW.masked_fill(~mask[..., None], 0.0), mask)

    def caption_mask(self, tokens: Tensor) -> Tensor:
        """(B, L) of `tokenize` -> (B, L) bool, True up to and including the token at which the text tower is read."""
        kind, eos = pooling(self.model)
        end_B = (tokens if kind == "argmax" else (tokens == eos).int()).argmax(dim=-1)
        return torch.arange(tokens.shape[1], device=tokens.device) <= end_B[:, None]

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> (B, L) int64 on the CPU, by the model's own tokenizer; reads no weights."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config)
        return self._tokenizer([repair_text(caption) for caption in captions]).long()

    def cut(self, caption: str) -> str:
        """The end of a caption that the tokenizer cuts off because it is too long; "" where all of it is read."""
        tokens = self.tokenize([caption])
        if not bool((self.tokenize([caption + " a"]) == tokens).all()):
            return ""
        few, kept = (
            0,
            len(caption),
        )  # a prefix of `few` characters reads otherwise, one of `kept` as the whole
        while kept - few > 1:
            middle = (few + kept) // 2
            few, kept = (
                (few, middle)
                if bool((self.tokenize([caption[:middle]]) == tokens).all())
                else (middle, kept)
            )
        return caption[kept:]

    def similarity(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """(N, D), (M, D) -> cosines (N, M)."""
        return F.normalize(image_embed.float(), dim=-1) @ F.normalize(text_embed.float(), dim=-1).T

    def fingerprint(self) -> Fingerprint:
        """What tells this CLIP from another: names, sizes, and its embeddings of one fixed picture and one fixed caption."""
        quick_gelu = import_open_clip().transformer.QuickGELU
        cfg = self.model.visual.preprocess_cfg
        quick = any(isinstance(module, quick_gelu) for module in self.model.modules())
        return {
            "config": asdict(self.config),
            "embed_dim": self.embed_dim,
            "states_width": self.states_width,
            "context_length": self.context_length,
            "image_size": self.image_size,
            "activation": "QuickGELU" if quick else "GELU",
            "preprocessing": {
                "mean": [round(v, 6) for v in cfg["mean"]],
                "std": [round(v, 6) for v in cfg["std"]],
                "resize_mode": cfg["resize_mode"],
                "interpolation": cfg["interpolation"],
            },
            "image": _packed(self.embed_images(fixed_picture())),
            "text": _packed(self.embed_text(self.tokenize([FIXED_CAPTION])).embed),
        }

    @property
    def _text(self) -> Any:
        return getattr(self.model, "text", self.model)


def fitted(
    images: Tensor, size: int, resize_mode: str = "shortest", interpolation: str = "bicubic"
) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size) in [-1, 1], as open_clip's transform of PIL images: short side to `size` and the centre cut out, or squashed."""
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        short = min(height, width)
        shape = (
            (size, size)
            if resize_mode == "squash"
            else (size * height // short, size * width // short)
        )
        mode = "bilinear" if interpolation == "bilinear" else "bicubic"
        images = F.interpolate(images, shape, mode=mode, antialias=True, align_corners=False)
        top, left = (round((side - size) / 2) for side in shape)
        images = images[..., top : top + size, left : left + size]
    return images.clamp(-1, 1)


def fixed_picture() -> Tensor:
    """(1, 3, 160, 192) in [-1, 1], the same on every machine: waves of several lengths in every channel. Not square: the resize shows as well."""
    x, y = (
        torch.arange(160, dtype=torch.float64) / 160,
        torch.arange(192, dtype=torch.float64) / 160,
    )
    waves = [
        torch.sin(a * x)[:, None] * torch.cos(b * y)[None]
        for a, b in ((9.0, 4.0), (3.0, 31.0), (60.0, 50.0))
    ]
    return torch.stack(waves)[None].float()


def require_same(theirs: Fingerprint, ours: Fingerprint, where: str) -> None:
    """Compare two fingerprints by what the CLIPs do; the rounding of another device or precision is let through.

    Activation and preprocessing are compared by value: on a small CLIP, QuickGELU for GELU moves embeddings no further than bfloat16 does.

    Args:
        theirs: of the CLIP that something was made with.
        ours: of the CLIP at hand.
        where: what was made, as the beginning of a sentence: "The store /data/embeddings".

    Raises:
        ClipMismatch: one sentence: `where` was made with which CLIP, which one this run has, what differs and what to do.
    """
    missing = sorted(ours.keys() - theirs.keys())
    if missing:
        raise ClipMismatch(
            f"{where} has an incomplete CLIP fingerprint ({', '.join(missing)} missing): make it anew."
        )
    differs = []
    for key in ("embed_dim", "states_width", "context_length", "image_size", "activation"):
        if theirs[key] != ours[key]:
            differs.append(f"{key.replace('_', ' ')} ({theirs[key]} there, {ours[key]} here)")
    if theirs["preprocessing"] != ours["preprocessing"]:
        changed = [
            key
            for key, value in ours["preprocessing"].items()
            if theirs["preprocessing"].get(key) != value
        ]
        differs.append(f"preprocessing ({', '.join(changed)})")
    if not differs:
        far = {key: _distance(theirs[key], ours[key]) for key in ("image", "text")}
        moved = [
            f"{key} embedding {off:.0%} off" for key, off in far.items() if not off <= TOLERANCE
        ]
        if moved:
            differs.append(f"weights ({', '.join(moved)})")
    if differs:
        names = [str(CLIPConfig.of_fingerprint(fingerprint)) for fingerprint in (theirs, ours)]
        raise ClipMismatch(
            f"{where} was made with the CLIP {names[0]}, and this run has the CLIP {names[1]}, which differs in {' and '.join(differs)}: "
            "set the same CLIP, or make it anew with this one."
        )


def _packed(embedding: Tensor) -> str:
    return base64.b64encode(embedding.flatten().cpu().numpy().astype("<f2").tobytes()).decode()


def _distance(a: str, b: str) -> float:
    left, right = (
        torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.float16).double()
        for packed in (a, b)
    )
    return ((left - right).norm() / left.norm()).item()


def build_clip(architecture: str) -> tuple[nn.Module, dict, dict]:
    """A CLIP with fresh weights from "openmoji" or "local-dir:/folder": (model, model_cfg, preprocess_cfg) of the folder's open_clip_config.json."""
    network = import_open_clip().model.CLIP
    folder = folder_of(architecture) or Path(architecture)
    config = folder_config(folder)
    try:
        return network(**config["model_cfg"]), config["model_cfg"], config["preprocess_cfg"]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder / CONFIG_FILE} does not describe a CLIP that can be built ({error}): correct it."
        ) from error


def save_clip(
    model: nn.Module,
    folder: str | os.PathLike,
    model_cfg: dict,
    preprocess_cfg: dict,
    card: str = "",
) -> None:
    """Write an open_clip folder, whole or not at all: open_clip_config.json, open_clip_model.safetensors in float16, README.md if there is a `card`.

    Stock open_clip loads it as `local-dir:`.

    Raises:
        UserError: `folder` exists, or a weight is not finite in float16.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another folder, or remove it first.")
    tensors = {
        name: (t.half() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in model.state_dict().items()
    }
    broken = [name for name, t in tensors.items() if not t.isfinite().all()]
    if broken:
        raise UserError(
            f"The CLIP has weights that are not finite in float16 ({', '.join(broken[:3])}): train it again with a lower rate."
        )
    with atomic_folder(folder) as temporary:
        config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS_FILE)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
