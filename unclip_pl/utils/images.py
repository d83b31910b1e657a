"""Pictures at the file boundary: tensors in [-1, 1] to uint8 PNGs and labelled grids, and any
picture file to a tensor."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.metadata import without_metadata
from unclip_pl.utils.text import mended

Used = TypeVar("Used")
TURNS = {  # what brings a picture upright, by the orientation of its EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_uint8(images: Tensor) -> Tensor:
    """(..., C, H, W) in [-1, 1] -> uint8 (..., C, H, W), rounded and clamped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image (B, C, H, W) in [-1, 1] against its target:
    (B,)."""
    return 10 * (4 / (images.float() - targets.float()).square().flatten(1).mean(1)).log10()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> PIL RGB."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image, size: int | None = None) -> Tensor:
    """A PIL picture of any mode -> float32 (3, H, W) in [-1, 1]; turned as its EXIF says,
    transparency on white.

    With `size`: the short side becomes `size` (antialiased bicubic), then the centre square is cut
    out.
    """
    pixels = torch.from_numpy(np.array(flatten(upright(image)))).permute(2, 0, 1)
    if size is not None and pixels.shape[1:] != (size, size):
        scale = size / min(pixels.shape[1:])
        height, width = (max(size, round(side * scale)) for side in pixels.shape[1:])
        if scale != 1:  # as Pillow does it to a level or two, four times as fast
            pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
        top, left = (height - size) // 2, (width - size) // 2
        pixels = pixels[:, top : top + size, left : left + size]
    return pixels.float().div_(127.5).sub_(1)


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; itself where there is nothing to turn, or the EXIF is
    broken."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises nearly anything on damaged metadata
        return image
    return image if turn is None else image.transpose(turn)


def open_image(
    data: bytes, use: Callable[[Image.Image], Used], formats: tuple[str, ...] | None = None
) -> Used:
    """What `use` makes of the picture in `data`. Where the file cannot be read, its metadata are
    left out, for they may be what is broken.

    Raises:
        Exception: Pillow's; Image.DecompressionBombError as `use` or Pillow raises it.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            return use(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:
        bare = without_metadata(data)
        if bare == data:
            raise
        try:
            with Image.open(io.BytesIO(bare), formats=formats) as image:
                return use(image)
        except Exception:
            raise error from None


def reduced(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1], brought (antialiased bicubic) to `side` pixels at the longer side;
    smaller ones come back as they are."""
    longer = max(images.shape[-2:])
    if longer <= side:
        return images
    shape = [max(1, round(pixels * side / longer)) for pixels in images.shape[-2:]]
    return F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(-1, 1)


def _of_floats(image: Image.Image) -> Image.Image:
    """A picture of floats as one of 8 bits: from 0 to 1, 255 or 65535, whatever holds them."""
    grey = np.asarray(image, dtype=np.float64)
    low, high = float(grey.min()), float(grey.max())
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"its floats are from {low:g} to {high:g}, not from 0 to 1, 255 or 65535")
    white = next(white for white in (1.0, 255.0, 65535.0) if high <= white)
    return Image.fromarray((grey * (255 / white)).round().astype(np.uint8))


def flatten(image: Image.Image) -> Image.Image:
    """Any mode (grey, 16 bit, palette, CMYK, transparent) as RGB on white."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode == "F":
        image = _of_floats(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: str | os.PathLike, size: int | None = None) -> Tensor:
    """Read a picture file as float32 (3, H, W) in [-1, 1]; see `from_pil`. One sentence where it
    cannot be read."""
    try:
        return open_image(Path(path).read_bytes(), lambda image: from_pil(image, size))
    except FileNotFoundError:
        raise UserError(f"There is no picture {path}.") from None
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}).") from error


def grid(
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    gap: int = 2,
    heads: Sequence[str] | None = None,
) -> Image.Image:
    """Rows of (N_r, 3, H, W) in [-1, 1] as one picture on white, each row with its label (of any
    lines) at the left, each column with its head above it.

    Sizes may differ from row to row; a cell is as large as the largest.
    """
    height, width = max(row.shape[-2] for row in rows), max(row.shape[-1] for row in rows)
    columns = max(len(row) for row in rows)
    points = max(10, min(16, height // 5))
    labels = [mended(label) for label in labels] if labels else None
    font = ImageFont.load_default(size=points)
    margin = (
        max(
            (int(font.getlength(line)) for label in labels for line in label.split("\n")), default=0
        )
        + 2 * gap
        if labels
        else 0
    )
    above = points + 2 * gap if heads else 0
    canvas = Image.new(
        "RGB",
        (margin + columns * (width + gap) + gap, above + len(rows) * (height + gap) + gap),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for c, head in enumerate(heads or ()):
        draw.text(
            (margin + gap + c * (width + gap) + width // 2, gap),
            head,
            fill="black",
            font=font,
            anchor="ma",
        )
    for r, row in enumerate(rows):
        top = above + gap + r * (height + gap)
        if labels:
            draw.text((gap, top + height // 2), labels[r], fill="black", font=font, anchor="lm")
        for c, image in enumerate(row):
            canvas.paste(to_pil(image), (margin + gap + c * (width + gap), top))
    return canvas


def save_png(image: Image.Image | Tensor, path: str | os.PathLike, **metadata: str) -> Path:
    """Write a PNG atomically, with `metadata` as its text chunks; returns the path."""
    picture = to_pil(image) if isinstance(image, Tensor) else image
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_itxt(key, mended(value))
    with atomic_file(path) as file:
        picture.save(file, format="PNG", pnginfo=text, optimize=True)
    return Path(path)
