"""Which CLIP to use, and the open_clip folders that a model's name can stand for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from unclip_pl.utils.errors import UserError

EMBEDDED = Path(__file__).parents[1] / "assets" / "clip-openmoji"
EMBEDDED_JUDGE = EMBEDDED.with_name("clip-openmoji-judge")  # for evaluation only
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
    """"openmoji" (the small one in the package), "openmoji-judge" (for evaluation only), an
    open_clip name such as "ViT-L-14-quickgelu", or "local-dir:/folder" in open_clip's layout."""
    pretrained: str | None = None
    """With an open_clip name: a tag such as "openai", or a weights file."""
    precision: str = "fp32"
    """fp32, bf16, fp16 (norms stay float32), pure_bf16 or pure_fp16."""
    force_quick_gelu: bool = False
    """Use the activation of OpenAI's weights, for a name without "-quickgelu"."""
    context_length: int | None = None
    """Number of tokens that a caption is cut or padded to; None: the model's own."""

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise UserError(
                f"clip.precision is {self.precision}, which CLIP does not know: set one of "
                f"{', '.join(DTYPES)}."
            )

    def __str__(self) -> str:
        return f"{self.model} / {self.pretrained}" if self.pretrained else self.model

    @classmethod
    def of_fingerprint(cls, fingerprint: dict) -> "CLIPConfig":
        """The configuration of the CLIP that a fingerprint was taken of."""
        return cls(**fingerprint["config"])


def folder_of(name: str) -> Path | None:
    """The open_clip folder that a model's name stands for; None where it is no folder."""
    if name == "openmoji":
        return EMBEDDED
    if name == "openmoji-judge":
        return EMBEDDED_JUDGE
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:")).expanduser()
    return None


def read_folder_config(folder: Path) -> dict:
    """`open_clip_config.json` of an open_clip folder: {model_cfg, preprocess_cfg}.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is no open_clip folder ({CONFIG_FILE}: {error.strerror}): put {CONFIG_FILE} "
            f"and {WEIGHTS_FILE} there."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{folder / CONFIG_FILE} is not JSON ({error}): put the right file there."
        ) from None
