"""Gradio's components for pictures, with this project's guarded reader instead of their own.

Their values, as functions of the page get them, are files in base64, as requests hold them.
They are classes, because Gradio makes new ones of them for each visit. Where it may, it writes a
stub (`inputs.pyi`) next to this file, which is not needed.
"""

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from gradio.blocks import Block
from gradio_client.utils import is_http_url_like
from PIL import Image

from unclip_pl.studio.picture_files import FORMATS, MOST_BYTES, MOST_PIXELS, as_pil, to_base64
from unclip_pl.studio.picture_files import read_picture as read
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import open_image, png_bytes, to_uint8


async def uploads_only(component: Block, path: Any) -> str | None:
    """Gradio's step for each file that comes in, which would fetch an address for whoever asks."""
    if is_http_url_like(str(path)):
        raise UserError("A picture must be uploaded: addresses are not fetched.")
    moved: str | None = await Block.async_move_resource_to_block_cache(component, path)
    return moved


class DroppedFile(gr.File):
    """A file, as bytes."""

    is_template = True
    async_move_resource_to_block_cache = uploads_only  # type: ignore[assignment]


class Picture(gr.Image):
    """A picture to upload, drop, paste or be sent; "" where there is none.

    What is wrong with it is a value, too, so that the page can say it in a sentence.
    """

    is_template = True  # Gradio draws it as its parent, and reads its settings off `__init__`
    async_move_resource_to_block_cache = uploads_only  # type: ignore[assignment]

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

    def preprocess(self, payload: Any) -> str | UserError:  # type: ignore[override]
        try:
            return "" if payload is None else to_base64(file_bytes(payload.path))
        except UserError as error:
            return error


class Painted(NamedTuple):
    """A picture and a mask of the same size, white where the brush was."""

    image: str
    mask: str


class PaintedPicture(gr.ImageEditor):
    """A picture with a mask; None where there is none, and what is wrong as `Picture` has it."""

    is_template = True
    async_move_resource_to_block_cache = uploads_only  # type: ignore[assignment]

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

    def preprocess(self, payload: Any) -> Painted | UserError | None:  # type: ignore[override]
        if payload is None or payload.background is None:
            return None
        try:
            return painted(payload.background, (payload.layers or [])[:1])  # there is one brush
        except UserError as error:
            return error


def painted(background: Any, layers: list[Any]) -> Painted:
    """Files of Gradio's editor as a picture and a mask.

    Raises:
        UserError: one cannot be read, or is too large.
    """
    image = to_uint8(read(file_bytes(background.path)))
    height, width = image.shape[1:]
    covered = np.zeros((height, width), dtype=bool)
    for layer in layers:
        try:
            alpha = open_image(file_bytes(layer.path), alpha_of, FORMATS)
        except (OSError, ValueError, SyntaxError):
            raise UserError("The mask cannot be read: paint it again.") from None
        covered |= np.asarray(alpha.resize((width, height))) > 127
    mask = Image.fromarray(covered.astype(np.uint8) * 255)
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
