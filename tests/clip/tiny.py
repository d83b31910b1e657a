"""Tiny random CLIPs in open_clip folders, for the tests of the room."""

import time
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.folder import save_clip
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.4, 0.3],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
CAPTIONS = ["a cat", "a red apple on a very blue table, by a window", ""]


def write_clip(
    folder: Path,
    seed: int = 0,
    model_cfg: dict = MODEL,
    kind: type = CLIP,
    preprocess: dict = PREPROCESS,
    gain: float = 1.0,
) -> str:
    torch.manual_seed(seed)
    model = kind(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(gain)
    save_clip(model, folder, model_cfg, preprocess)
    return f"local-dir:{folder}"


def refusal(config: CLIPConfig, *words: str) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        FrozenCLIP(config).model
    message = str(caught.value)
    assert time.monotonic() - start < 60  # no waiting for a network
    assert message.endswith(".") and "\n" not in message and len(message) < 700, message
    for word in words:
        assert word in message, message
    return message
