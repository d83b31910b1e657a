"""Gradio's components for pictures, with this project's guarded reader instead of their own.

Their values, as functions of the page get them, are files in base64, as requests hold them.
They are classes, because Gradio makes new ones of them for each visit. Where it may, it writes a
stub (`inputs.pyi`) next to this file, which is not needed.
"""

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from unclip_pl.studio.picture_files import FORMATS, MOST_BYTES, MOST_PIXELS, as_pil, to_base64
from unclip_pl.studio.picture_files import read_picture as read
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import open_image, png_bytes, to_uint8


class Picture(gr.Image):
    """A picture to upload, drop, paste or be sent; "" where there is none."""

    is_template = True  # Gradio draws it as its parent, and reads its settings off `__init__`

    @classmethod
    def named(cls, label: str, **other: Any) -> "Picture":
        """A component with that label."""
        return cls(
            label=label,
            type="filepath",
            format="png",
            sources=["upload", "clipboard"],
            buttons=[],
            height=240,
            **other,
        )

    def preprocess(self, payload: Any) -> str:
        return "" if payload is None else to_base64(file_bytes(payload.path))


class Painted(NamedTuple):
    """A picture and a mask of the same size, white where the brush was."""

    image: str
    mask: str


class PaintedPicture(gr.ImageEditor):
    """A picture to paint a mask on."""

    is_template = True

    @classmethod
    def named(cls, label: str) -> "PaintedPicture":
        """A component with that label."""
        return cls(
            label=label,
            type="filepath",
            format="png",
            sources=["upload", "clipboard"],
            brush=gr.Brush(colors=["#ff00a8"], color_mode="fixed", default_size=12),
            layers=False,
            transforms=(),
            buttons=[],
            canvas_size=(512, 512),
            height=480,
        )

    def preprocess(self, payload: Any) -> Painted | None:
        if payload is None or payload.background is None:
            return None
        image = to_uint8(read(file_bytes(payload.background.path)))
        height, width = image.shape[1:]
        painted = np.zeros((height, width), dtype=bool)
        for layer in payload.layers or []:
            alpha = open_image(file_bytes(layer.path), alpha_of, FORMATS).resize((width, height))
            painted |= np.asarray(alpha) > 127
        mask = Image.fromarray(painted.astype(np.uint8) * 255)
        return Painted(to_base64(png_bytes(as_pil(image))), to_base64(png_bytes(mask)))


def alpha_of(image: Image.Image) -> Image.Image:
    """How much of a layer of the brush covers what is below it."""
    if image.width * image.height > MOST_PIXELS:
        raise UserError("The mask is too large: paint on a smaller picture.")
    return image.convert("RGBA").getchannel("A")


def file_bytes(path: str | None) -> bytes:
    """The bytes of an upload; no more than may be."""
    if path is None or Path(path).stat().st_size > MOST_BYTES:
        raise UserError(f"The picture has more than {MOST_BYTES // 2**20} MB: give a smaller one.")
    return Path(path).read_bytes()
