"""unCLIP (DALL-E 2, arXiv 2204.06125) in PyTorch Lightning.

Importing the package imports no torch: the names below are loaded on first use.
"""

from importlib import import_module
from typing import Any

import unclip_pl.utils.torchvision  # noqa: F401  so that lightning and open_clip can import it

__version__ = "0.1.0"

_MODULES = {
    "UnCLIP": "pipeline.unclip",
    "Cascade": "pipeline.cascade",
    "FrozenCLIP": "clip.frozen",
    "CLIPConfig": "clip.config",
    "Decoder": "stages.decoder",
    "Noise": "diffusion.noise",
    "to_pil": "utils.images",
}
__all__ = [
    "CLIPConfig",
    "Cascade",
    "Decoder",
    "FrozenCLIP",
    "Noise",
    "UnCLIP",
    "__version__",
    "to_pil",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
