"""The bytes of a picture in a shard to a tensor, within limits."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unclip_pl.data.budget import BadSample
from unclip_pl.utils.images import apply_exif_orientation, from_pil, open_image, to_rgb

IMAGES = ("png", "jpg", "jpeg", "webp")
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # what a file of these names may hold: the web names many of them wrongly
MAX_PIXELS = 50_000_000
warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # `decode` has a limit of its own
Decoded = TypeVar("Decoded")


def decode(data: bytes, image_size: int | None, exact_jpeg: bool = False) -> Tensor:
    """The bytes of a picture -> float32 (3, S, S) in [-1, 1]: short side to S, antialiased, and the
    centre cut out. With None: whole, at its own size.

    A JPEG is decoded at a half, quarter or eighth where that is still twice as large as S (not with
    `exact_jpeg`); no more than `MAX_PIXELS` are decoded.

    Raises:
        BadSample: they are no picture, or too large a one.
    """
    return _opened(
        data,
        image_size,
        exact_jpeg,
        lambda image: from_pil(image if image_size is None else _less_long(image), image_size),
    )


def decode_uncut(data: bytes, image_size: int, exact_jpeg: bool = False) -> Image.Image:
    """The bytes of a picture -> RGB picture whose short side is at most S: larger ones are made
    smaller, antialiased, smaller ones stay as they are.

    JPEGs, limit and BadSample as in `decode`.
    """

    def reduced(image: Image.Image) -> Image.Image:
        image = to_rgb(apply_exif_orientation(_less_long(image)))
        scale = image_size / min(image.size)
        if scale >= 1:
            return image
        return image.resize(
            (
                max(image_size, round(image.width * scale)),
                max(image_size, round(image.height * scale)),
            ),
            Image.Resampling.BICUBIC,
        )

    return _opened(data, image_size, exact_jpeg, reduced)


def _opened(
    data: bytes, image_size: int | None, exact_jpeg: bool, use: Callable[[Image.Image], Decoded]
) -> Decoded:
    """What `use` makes of the picture in `data`; raises BadSample, see `decode`."""
    if not data:
        raise BadSample("its image is empty, a file of 0 bytes")

    def within_limits(image: Image.Image) -> Decoded:
        if image_size is not None and not exact_jpeg:
            image.draft(None, (2 * image_size, 2 * image_size))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        return use(image)

    try:
        return open_image(data, within_limits, FORMATS)
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):  # a warning only where the user makes errors of them
        raise BadSample(
            f"its image is larger than {MAX_PIXELS // 10**6} megapixels: make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise BadSample("its image cannot be decoded (of no known format)") from None
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise BadSample(
            f"its image cannot be decoded ({str(error) or type(error).__name__})"
        ) from None


def _less_long(image: Image.Image) -> Image.Image:
    """Cut the ends of a picture that is a thin strip: enlarged to S it would not fit into
    memory."""
    long = 4 * min(image.size)
    if max(image.size) <= 2 * long:
        return image
    width, height = min(image.width, long), min(image.height, long)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
