"""The five stages at the sizes of `stages/paper/*.yaml`, or tiny ones, and random batches for them.

The decoder's text Transformer of 1.2 billion weights is left out, so that it can be trained on 80
GB: its captions are 256 token states of CLIP ViT-H, which give as many context tokens.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from unclip_pl.networks.checkpointing import apply_checkpointing
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024

STAGES = Path(__file__).resolve().parent.parent / "stages"


class Paper(NamedTuple):
    """How a stage is measured."""

    kind: type[Stage]
    batch: int
    """Where the search for the largest micro-batch begins; each further try halves it."""
    draws: int
    """Samples that are drawn together."""
    steps: int | None
    """Sampling steps: fewer than the paper's, for each takes the same time."""
    crop: int
    """Side of the images that an upsampler is trained on, or 0."""
    tiny: dict[str, Any]
    """What differs in the tiny stage."""


SMALL = {"width": 32, "depth": 1, "heads": 2}
TINY_NET = {"image_size": 32, "width": 32, "mults": [1], "depth": 1, "dropout": 0.0}
TINY_SIDE = 16
KINDS = {
    "diffusion_prior": Paper(DiffusionPrior, 128, 32, 64, 0, {
        "net": SMALL | {"embed_dim": 32, "depth": 2},
        "text": {"context_length": 8, "vocab_size": 64},
    }),
    "decoder": Paper(Decoder, 64, 16, 10, 0, {
        "net": TINY_NET | {
            "image_size": TINY_SIDE, "attention": [], "head_width": 32, "embed_dim": 32,
            "context_width": 32,
        },
        "text": {"states_width": 32, "context_length": 8},
    }),
    "upsampler_256": Paper(Upsampler256, 256, 8, 5, 64, {"net": TINY_NET}),
    "upsampler_1024": Paper(Upsampler1024, 16, 1, 5, 256, {"net": TINY_NET}),
    "ar_prior": Paper(ARPrior, 32, 16, None, 0, {
        "net": SMALL | {"embed_dim": 32, "max_codes": 8, "buckets": 16},
        "text": SMALL | {"context_length": 8, "vocab_size": 64},
    }),
}  # fmt: skip
TEXT_STATES = {"kind": "states", "states_width": 1024, "context_length": 256}
FITTED = 2048
"""Random embeddings that the AR prior's codes are fitted to."""


def settings_of(name: str, tiny: bool) -> dict[str, Any]:
    """The arguments of a stage: its YAML, the paper's overlay and, if asked for, the tiny sizes."""
    files = [STAGES / f"{name}.yaml", STAGES / "paper" / f"{name}.yaml"]
    texts = [path.read_text(encoding="utf-8") for path in files]
    parts = [yaml.safe_load(text)["model"]["init_args"] for text in texts]
    if name == "decoder":
        parts[1]["text"] = TEXT_STATES
    if name == "ar_prior":
        parts[1]["max_error"] = 0.0  # noise varies alike in all directions, and the codes keep few
    settings: dict[str, Any] = {}
    for part in [*parts, KINDS[name].tiny if tiny else {}]:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = settings[key] | value if both else value
    return settings


def build(name: str, device: str, checkpointing: str = "none", tiny: bool = False) -> Any:
    """A stage with random weights on a device; the AR prior's codes are fitted to noise."""
    settings = settings_of(name, tiny)
    for part in ("net", "text"):
        settings.get(part, {}).pop("checkpointing", None)
    with torch.device(device):
        stage = KINDS[name].kind(**settings)
    apply_checkpointing(stage, checkpointing)
    if isinstance(stage, ARPrior):
        images, texts = torch.randn(2, FITTED, stage.net_config.embed_dim)
        statistics = images.double().mean(0), images.double().T.cov()
        stage.quantizer.fit(*statistics, images, texts)
    return stage.to(device)


def side_of(name: str, tiny: bool = False) -> int | None:
    """Side of the images that an upsampler is trained on; None for other stages."""
    crop = KINDS[name].crop
    return (TINY_SIDE if tiny else crop) if crop else None


def batch_for(name: str, stage: Any, size: int, tiny: bool = False) -> dict[str, Any]:
    """A random batch to train on, with captions of full length."""
    net, device = stage.net_config, stage.device
    batch: dict[str, Any] = {"key": [str(i) for i in range(size)]}
    with torch.device(device):
        if hasattr(net, "image_size"):
            side = side_of(name, tiny) or net.image_size
            batch["image"] = torch.rand(size, 3, side, side) * 2 - 1
            if KINDS[name].crop:
                batch["low_res"] = torch.rand(size, 3, side // 4, side // 4) * 2 - 1
        if getattr(net, "embed_dim", 0):
            batch["image_embed"] = torch.randn(size, net.embed_dim)
            batch["text_embed"] = torch.randn(size, net.embed_dim)
        text = getattr(stage, "text_config", None)
        if text is not None:
            length = text.context_length
            batch["tokens"] = torch.randint(text.vocab_size, (size, length))
            batch["text_mask"] = torch.ones(size, length, dtype=torch.bool)
            if text.kind == "states":
                batch["text_states"] = torch.randn(size, length, text.states_width)
    return batch


def conditions_for(name: str, stage: Any, size: int) -> dict[str, torch.Tensor]:
    """What a stage draws from: a random caption and embedding, or a picture of a quarter side."""
    if KINDS[name].crop:
        side = stage.net_config.image_size // stage.factor
        return {"low_res": torch.rand(size, 3, side, side, device=stage.device) * 2 - 1}
    batch = batch_for(name, stage, size)
    for key in ("key", "image", *(["image_embed"] if name != "decoder" else [])):
        batch.pop(key, None)
    return batch
