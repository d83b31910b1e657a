"""Read any picture file as a tensor in [-1, 1]; write tensors as PNG files and labelled grids."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.lettering import draw_lines, line_height, text_width, wrap_text
from unclip_pl.utils.metadata import strip_metadata
from unclip_pl.utils.text import repair_text

LABEL_WIDTH = 320  # pixels
SMALLEST_CELL = 64  # pixels
SHEET = "unclip-sheet"
"""The text chunk by which `is_sheet` knows a file."""
ROWS = "rows of unclip_pl.utils.images.grid"
"""The key of a picture's `info` that becomes this chunk. It has another name, so that what is cut
out of such a file is no sheet."""
Result = TypeVar("Result")
Images = Tensor | Image.Image | Sequence[Image.Image]
"""Images as a tensor (B, 3, H, W) in [-1, 1], or PIL images of any mode; one is a batch of one."""
EXIF_TRANSPOSE = {  # the operation that undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_uint8(images: Tensor) -> Tensor:
    """Images (..., C, H, W) in [-1, 1] as uint8 of the same shape, rounded and clamped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of images (B, C, H, W) in [-1, 1] and targets."""
    return 10 * (4 / (images.float() - targets.float()).square().flatten(1).mean(1)).log10()


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [-1, 1] as a PIL image of mode RGB."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image, size: int | None = None) -> Tensor:
    """A PIL image of any mode as float32 (3, H, W) in [-1, 1].

    It is turned as its EXIF orientation says, and transparent parts become white.

    Args:
        image: of any mode.
        size: resize the short side to this many pixels (antialiased bicubic), then crop the centre
            square; None: keep the size.
    """
    pixels = torch.from_numpy(np.array(to_rgb(apply_exif_orientation(image)))).permute(2, 0, 1)
    if size is not None and pixels.shape[1:] != (size, size):
        scale = size / min(pixels.shape[1:])
        height, width = (max(size, round(side * scale)) for side in pixels.shape[1:])
        if scale != 1:  # as Pillow does it to a level or two, four times as fast
            pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
        top, left = (height - size) // 2, (width - size) // 2
        pixels = pixels[:, top : top + size, left : left + size]
    return pixels.float().div_(127.5).sub_(1)


def as_tensor(images: Images, size: int | None = None) -> Tensor:
    """Images as (B, 3, H, W) in [-1, 1]: a tensor as it is, PIL images as `from_pil` reads them.

    Args:
        images: a tensor, a PIL image or several.
        size: see `from_pil`; tensors are not resized.

    Raises:
        UserError: something else, such as a path; or PIL images of several sizes without `size`.
    """
    if isinstance(images, Tensor):
        return images
    tensors = [from_pil(image, size) for image in as_pil_list(images)]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise UserError("The pictures have several sizes: give them one by one, or resize them.")
    return torch.stack(tensors)


def as_pil_list(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """One PIL image or several as a list.

    Raises:
        UserError: something else, or none.
    """
    pictures = images if isinstance(images, (list, tuple)) else [images]
    wrong = [picture for picture in pictures if not isinstance(picture, Image.Image)]
    if wrong or not pictures:
        found = f"{type(wrong[0]).__name__}" if wrong else "an empty list"
        raise UserError(
            f"Pictures were expected, and {found} was given: give PIL images (PIL.Image.open of a "
            "file) or a tensor (B, 3, H, W) in [-1, 1]."
        )
    return list(pictures)


def expand_to(images: Tensor, count: int) -> Tensor:
    """A batch of one image as `count` of the same; others as they are."""
    return images.expand(count, *images.shape[1:]) if len(images) == 1 else images


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; unchanged if that is missing or broken."""
    try:
        transpose = EXIF_TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises nearly anything on damaged metadata
        return image
    return image if transpose is None else image.transpose(transpose)


def open_image(
    data: bytes, use: Callable[[Image.Image], Result], formats: tuple[str, ...] | None = None
) -> Result:
    """Open a picture and return the result of `use(picture)`.

    If that fails, it is tried again without the file's metadata, which may be what is broken.

    Args:
        data: the content of the file.
        use: called with the open picture.
        formats: the formats to accept, as Pillow names them; None: all.

    Raises:
        Exception: the error of the first attempt, from Pillow or `use`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            return use(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:
        bare = strip_metadata(data)
        if bare == data:
            raise
        try:
            with Image.open(io.BytesIO(bare), formats=formats) as image:
                return use(image)
        except Exception:
            raise error from None


def shrink(images: Tensor, side: int) -> Tensor:
    """Shrink images (B, 3, H, W) in [-1, 1] until the longer side has `side` pixels.

    The filter is antialiased bicubic. Images that are small enough come back unchanged.
    """
    longer = max(images.shape[-2:])
    if longer <= side:
        return images
    shape = [max(1, round(pixels * side / longer)) for pixels in images.shape[-2:]]
    return F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(-1, 1)


def _floats_to_8_bit(image: Image.Image) -> Image.Image:
    """A float picture as an 8-bit one; white is the lowest of 1, 255 and 65535 that fits."""
    grey = np.asarray(image, dtype=np.float64)
    low, high = float(grey.min()), float(grey.max())
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"its floats are from {low:g} to {high:g}, not from 0 to 1, 255 or 65535")
    white = next(white for white in (1.0, 255.0, 65535.0) if high <= white)
    return Image.fromarray((grey * (255 / white)).round().astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode (grey, 16 bit, palette, CMYK, transparent) as RGB on white."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode == "F":
        image = _floats_to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: str | os.PathLike, size: int | None = None) -> Tensor:
    """Read a picture file as float32 (3, H, W) in [-1, 1].

    Args:
        path: of the file.
        size: see `from_pil`.

    Raises:
        UserError: the file is missing or cannot be read as a picture.
    """
    try:
        return open_image(Path(path).read_bytes(), lambda image: from_pil(image, size))
    except FileNotFoundError:
        raise UserError(f"There is no picture {path}.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture in a known format.") from None
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}).") from error


def grid(
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    gap: int = 2,
    heads: Sequence[str] | None = None,
    max_width: int | None = None,
) -> Image.Image:
    """One picture of rows of images on white. `is_sheet` knows its PNG files.

    Args:
        rows: images (N, 3, H, W) in [-1, 1]; N, H and W may differ from row to row. A cell is as
            large as the largest image.
        labels: the text to the left of each row, in any script; long ones are wrapped.
        gap: pixels between cells.
        heads: the text above each column.
        max_width: of the picture in pixels. Wider images are shown smaller, and where they would be
            smaller than `SMALLEST_CELL`, a row without heads goes on in the next line.
    """
    columns = max(len(row) for row in rows)
    points = max(10, min(16, max(row.shape[-2] for row in rows) // 5))
    texts = [wrap_text(label, points, LABEL_WIDTH) for label in labels or ()]
    margin = 0
    if texts:
        margin = max(text_width(line, points) for lines in texts for line in lines) + 2 * gap
    if max_width is not None:
        room = max_width - margin - gap
        if not heads and columns * (SMALLEST_CELL + gap) > room:
            columns = min(columns, max(1, room // (SMALLEST_CELL + gap)))
        side = max(1, room // columns - gap)
        rows = [shrink(row, side) if row.shape[-1] > side else row for row in rows]
    height, width = max(row.shape[-2] for row in rows), max(row.shape[-1] for row in rows)
    titles = [wrap_text(head, points, width) for head in heads or ()]
    above = max(map(len, titles), default=0) * line_height(points) + (2 * gap if titles else 0)
    blocks = []  # of each row: its images in lines, its label and its height
    for r, row in enumerate(rows):
        lines = row.split(columns)
        text = texts[r] if texts else []
        needed = max(len(lines) * (height + gap), len(text) * line_height(points) + gap)
        blocks.append((lines, text, needed))

    total_width = margin + columns * (width + gap) + gap
    total_height = above + sum(needed for _, _, needed in blocks) + gap
    canvas = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        for i, line in enumerate(title):
            centre = margin + gap + c * (width + gap) + width // 2
            left = centre - text_width(line, points) // 2
            draw_lines(draw, (left, gap + i * line_height(points)), [line], points)
    top = above + gap
    for lines, text, needed in blocks:
        middle = top + (needed - gap) // 2
        draw_lines(draw, (gap, middle - len(text) * line_height(points) // 2), text, points)
        for i, line_of_images in enumerate(lines):
            y = top + i * (height + gap)
            for c, image in enumerate(line_of_images):
                canvas.paste(to_pil(image), (margin + gap + c * (width + gap), y))
        top += needed
    canvas.info[ROWS] = f"{len(rows)} rows"
    return canvas


def png_bytes(image: Image.Image | Tensor, **metadata: str) -> bytes:
    """The bytes of a PNG file.

    Args:
        image: a PIL image, or a tensor (3, H, W) in [-1, 1].
        metadata: written as text chunks.
    """
    picture = to_pil(image) if isinstance(image, Tensor) else image
    text = PngImagePlugin.PngInfo()
    if ROWS in picture.info:  # first, so that `is_sheet` need not read far
        text.add_text(SHEET, picture.info[ROWS])
    for key, value in metadata.items():
        text.add_itxt(key, repair_text(value))
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=text, optimize=True)
    return file.getvalue()


def save_png(image: Image.Image | Tensor, path: str | os.PathLike, **metadata: str) -> Path:
    """Write a PNG file atomically.

    Args:
        image: a PIL image, or a tensor (3, H, W) in [-1, 1].
        path: of the file.
        metadata: written as text chunks.

    Returns:
        `path`.
    """
    data = png_bytes(image, **metadata)
    with atomic_file(path) as file:
        file.write(data)
    return Path(path)


def is_sheet(path: Path) -> bool:
    """Whether a file is a PNG of `grid`, as our commands write it: no picture, but several."""
    with path.open("rb") as file:
        start = file.read(64)
    return start.startswith(b"\x89PNG") and start[37:].startswith(f"tEXt{SHEET}\0".encode())
