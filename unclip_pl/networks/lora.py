"""Low-rank adapters (LoRA, Hu et al. 2021) among the weights of a network, by peft's names.

They are merged into the layers that they adapt.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

BASE = ".base_layer."
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""(rank, in, ...) and (out, rank, ...) of an adapter."""


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors of the network without adapters: W + scale B A instead of W, B and A.

    Args:
        tensors: of linear layers and convolutions with adapters, and of any other.
        scale: alpha / rank.
    """
    found = {}
    for name, value in tensors.items():
        if name.endswith((DOWN, UP)):
            continue
        layer, base, kind = name.rpartition(BASE)
        if not base:
            found[name] = value
            continue
        found[f"{layer}.{kind}"] = value
        if kind == "weight":
            down, up = tensors[layer + DOWN].float(), tensors[layer + UP].float()
            delta = (up.flatten(1) @ down.flatten(1)).view_as(value)
            found[f"{layer}.weight"] = (value.float() + scale * delta).to(value.dtype)
    return found


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The `state_dict` of a checkpoint, with its adapters merged if it has some."""
    tensors = checkpoint["state_dict"]
    return merged(tensors, checkpoint["lora_scale"]) if "lora_scale" in checkpoint else tensors
