"""Write an open_clip folder, and build the CLIP that one describes."""

import json
import os
from pathlib import Path

from torch import nn

from unclip_pl.clip.config import CONFIG_FILE, WEIGHTS_FILE, folder_of, read_folder_config
from unclip_pl.clip.loading import import_open_clip
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder
from unclip_pl.utils.outputs import require_new


def build_clip(architecture: str) -> tuple[nn.Module, dict, dict]:
    """A CLIP with fresh weights: (model, model_cfg, preprocess_cfg).

    Args:
        architecture: "openmoji" or "local-dir:/folder", whose open_clip_config.json describes it.

    Raises:
        UserError: there is no such folder, or it does not describe a CLIP.
    """
    network = import_open_clip().model.CLIP
    folder = folder_of(architecture) or Path(architecture)
    config = read_folder_config(folder)
    try:
        return network(**config["model_cfg"]), config["model_cfg"], config["preprocess_cfg"]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder / CONFIG_FILE} does not describe a CLIP that can be built ({error}): correct "
            "it."
        ) from error


def save_clip(
    model: nn.Module,
    folder: str | os.PathLike,
    model_cfg: dict,
    preprocess_cfg: dict,
    card: str = "",
) -> None:
    """Write an open_clip folder, whole or not at all. Stock open_clip loads it as `local-dir:`.

    It holds open_clip_config.json, open_clip_model.safetensors in float16, and README.md if there
    is a `card`.

    Raises:
        UserError: `folder` exists, or a weight is not finite in float16.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    require_new(folder)
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not_finite:
        raise UserError(
            "The CLIP has weights that are not finite in float16 "
            f"({', '.join(not_finite[:3])}): train it again with a lower rate."
        )
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS_FILE)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
