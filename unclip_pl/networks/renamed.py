"""Older names of parameters and settings, so that older weights can be loaded."""

import re
from collections.abc import Mapping
from typing import Any

UNET = {
    r"^net\.time\.": "net.time_embed.",
    r"^net\.embed_time\.": "net.clip_to_time.",
    r"^net\.embed_context\.": "net.clip_to_tokens.",
    r"^net\.enter\.": "net.conv_in.",
    r"^net\.exit\.": "net.conv_out.",
    r"^net\.norm\.": "net.norm_out.",
    r"^net\.(down|up)\.": r"net.\1_blocks.",
    r"^net\.middle\.": "net.middle_block.",
    r"\.block\.": ".res1.",
    r"\.last\.": ".res2.",
    r"\.(res1|res2)\.time\.": r".\1.emb_proj.",
    r"\.attention\.context\.": ".attention.context_kv.",
}
TEXT = {
    r"text\.encoder\.project\.": "text.encoder.proj.",
    r"text\.encoder\.pool\.": "text.encoder.pooled_proj.",
    r"text\.encoder\.null_embed$": "text.encoder.null_text_embed",
}
PRIOR = {
    r"^net\.encode\.": "net.text_proj.",
    r"^net\.embed\.": "net.text_embed_proj.",
    r"^net\.time\.": "net.time_embed.",
    r"^net\.enter\.": "net.proj_in.",
    r"^net\.exit\.": "net.proj_out.",
    r"^net\.position$": "net.position_embedding",
    r"^net\.null_embed$": "net.null_text_embed",
}
AR_PRIOR = {
    r"^net\.padding$": "net.padding_embedding",
    r"^net\.embed\.": "net.text_embed_proj.",
    r"^net\.positions$": "net.position_embedding",
    r"^net\.null_embed$": "net.null_text_embed",
}
RENAMED = {
    "Decoder": UNET | TEXT,
    "Upsampler256": UNET,
    "Upsampler1024": UNET,
    "DiffusionPrior": PRIOR,
    "ARPrior": AR_PRIOR | TEXT,
}
"""Patterns and replacements by the class name of the stage, applied in order."""


SETTINGS = {
    "dropout": "cond_dropout",  # decoder
    "text_dropout": "cond_dropout",  # diffusion prior
    "drop_text": "cond_dropout",  # autoregressive prior
    "residual": "residual_std",  # upsamplers
}
"""Settings of a stage, `model.OLD` in a YAML, and their names of today."""


def rename_settings(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's hyperparameters with the names of today; new names are left as they are."""
    return {SETTINGS.get(name, name): value for name, value in hyper_parameters.items()}


def rename(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """Rename what older versions saved to the names of today; new names are left as they are.

    Args:
        stage: class name of the stage.
        values: by parameter name.
    """
    renamed = {}
    for old_name, value in values.items():
        name = old_name
        for pattern, replacement in RENAMED.get(stage, {}).items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
