"""Image bytes of a shard -> tensor, within limits."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unclip_pl.data.bad_samples import BadSample
from unclip_pl.utils.images import apply_exif_orientation, from_pil, open_image, to_rgb

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What a file with one of these endings may hold: the web names many of them wrongly."""
MAX_PIXELS = 50_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see MAX_PIXELS
Decoded = TypeVar("Decoded")


def decode(data: bytes, image_size: int | None, exact_jpeg: bool = False) -> Tensor:
    """Image bytes -> float32 (3, S, S) in [-1, 1].

    The short side is resized to S, antialiased, and the centre is cropped.

    Args:
        data: the bytes of an image file.
        image_size: S in pixels; None: the whole image at its own size.
        exact_jpeg: decode a JPEG whole; else at a half, quarter or eighth where that is still
            twice as large as S.

    Raises:
        BadSample: the bytes are no image, or one of more than `MAX_PIXELS`.
    """

    def to_tensor(image: Image.Image) -> Tensor:
        return from_pil(image if image_size is None else _crop_strip(image), image_size)

    return _open(data, image_size, exact_jpeg, to_tensor)


def decode_uncut(data: bytes, image_size: int, exact_jpeg: bool = False) -> Image.Image:
    """Image bytes -> RGB image whose short side is at most `image_size` pixels.

    Larger images are made smaller, antialiased; smaller ones stay as they are. JPEGs, limit and
    BadSample as in `decode`.
    """

    def shrink(image: Image.Image) -> Image.Image:
        image = to_rgb(apply_exif_orientation(_crop_strip(image)))
        scale = image_size / min(image.size)
        if scale >= 1:
            return image
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    return _open(data, image_size, exact_jpeg, shrink)


def _open(
    data: bytes, image_size: int | None, exact_jpeg: bool, use: Callable[[Image.Image], Decoded]
) -> Decoded:
    """`use` of the image in `data`; raises BadSample, see `decode`."""
    if not data:
        raise BadSample("its image is empty, a file of 0 bytes")

    def within_limits(image: Image.Image) -> Decoded:
        if image_size is not None and not exact_jpeg:
            image.draft(None, (2 * image_size, 2 * image_size))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        return use(image)

    try:
        return open_image(data, within_limits, IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # -W error raises both
        raise BadSample(
            f"its image is larger than {MAX_PIXELS // 10**6} megapixels: make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise BadSample("its image cannot be decoded (of no known format)") from None
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise BadSample(
            f"its image cannot be decoded ({str(error) or type(error).__name__})"
        ) from None


def _crop_strip(image: Image.Image) -> Image.Image:
    """Cut off the ends of a thin strip: enlarged to S it would not fit into memory."""
    long = 4 * min(image.size)
    if max(image.size) <= 2 * long:
        return image
    width, height = min(image.width, long), min(image.height, long)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
