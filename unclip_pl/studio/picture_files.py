"""Pictures that come from outside and go out again: read within limits, written with settings."""

import base64
import binascii
import json
import re
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unclip_pl.studio.requests import Create, Request, described
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import from_pil, open_image, png_bytes

MOST_BYTES = 8 * 2**20
MOST_PIXELS = 16 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
CHUNK = "studio"
"""The text of a PNG that holds the settings of its request, as JSON."""


def from_base64(text: str, name: str = "picture") -> bytes:
    """The file in a base64 string or a `data:` URL; a UserError where it is none, or too large."""
    if len(text) > 4 * MOST_BYTES // 3 + 200:
        raise UserError(f"The {name} has more than {MOST_BYTES // 2**20} MB: give a smaller one.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"The {name} is not in base64: encode the bytes of its file.") from None


def to_base64(data: bytes) -> str:
    """A file as requests hold it."""
    return base64.b64encode(data).decode()


def read_picture(data: bytes, name: str = "picture", size: int | None = None) -> Tensor:
    """A picture file as float32 (3, H, W) in [-1, 1]; with `size` its centre square of that side.

    Raises:
        UserError: it is no picture, damaged, or larger than `MOST_BYTES` or `MOST_PIXELS`.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"The {name} has more than {MOST_BYTES // 2**20} MB: give a smaller one.")
    if not data:
        raise UserError(f"The {name} is empty: choose a picture file.")

    def within_limits(image: Image.Image) -> Tensor:
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        return from_pil(image, size)

    try:
        return open_image(data, within_limits, FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"The {name} has more than {MOST_PIXELS // 2**20} megapixels: make it smaller."
        ) from None
    except UnidentifiedImageError:
        raise UserError(
            f"The {name} is no picture that can be read: give a PNG, JPEG, WebP, GIF, BMP or TIFF."
        ) from None
    except Exception:  # Pillow raises nearly anything on damaged files
        raise UserError(f"The {name} is damaged and cannot be read: give another.") from None


def settings_of(request: Request, label: str, seed: int) -> dict[str, Any]:
    """The settings of one picture of a request; of a `Create` those that draw only this one."""
    settings = described(request)
    if isinstance(request, Create):
        settings |= {"captions": [label], "num_images": 1, "seed": seed}
    return settings


def png_file(image: Tensor, request: Request, label: str, seed: int) -> bytes:
    """A drawn picture, uint8 (3, H, W), as a PNG with its settings."""
    texts = {"seed": str(seed), CHUNK: json.dumps(settings_of(request, label, seed))}
    if isinstance(request, Create):
        texts["prompt"] = label
    return png_bytes(as_pil(image), **texts)


def as_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) as a PIL picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def settings_in(data: bytes) -> dict[str, Any]:
    """The settings in a PNG of the studio; caption and seed of one that `unclip generate` wrote.

    Raises:
        UserError: it is no picture, or has no settings.
    """
    read_picture(data)
    texts = open_image(
        data, lambda image: (image.load(), dict(getattr(image, "text", {})))[1], FORMATS
    )
    try:
        if CHUNK in texts:
            return dict(json.loads(texts[CHUNK]))
        return settings_of_command(texts)
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(
            "This picture has no settings: drop a PNG that was made here, as it was downloaded."
        ) from None


def settings_of_command(texts: dict[str, str]) -> dict[str, Any]:
    """Caption, seed and condition in the texts of a PNG that `unclip generate` wrote.

    Raises:
        UserError: another command wrote it.
        KeyError, ValueError: no command wrote it.
    """
    command, _, rest = texts.get("unclip", "generate").partition(",")
    if command != "generate":
        raise UserError(
            f"This picture was made by `unclip {command[:20]}`, whose PNG files have no settings "
            f"for a tab; they say: {texts['unclip'][:200]}."
        )
    settings = {"kind": "create", "captions": [texts["prompt"]], "seed": int(texts["seed"])}
    found = re.search(r"condition (\w+)", rest)
    prior = {"caption": "none", "text": "text"}.get(found[1] if found else "")
    return settings | ({"prior": prior} if prior else {})
