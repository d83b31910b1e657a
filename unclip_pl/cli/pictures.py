"""Reading the user's pictures and preparing those that are shown. No torch until one is called."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.metadata import strip_metadata

if TYPE_CHECKING:
    from torch import Tensor

GRID_PIXELS = 2048
"""How wide a figure of pictures and their labels may be."""


def require_files(paths: Iterable[Path], latents: bool = False) -> None:
    """Raise a UserError for the first picture that is not there, or is none.

    That is before anything is loaded, from the beginnings of the files.

    Args:
        paths: the pictures.
        latents: what `unclip invert` wrote may be among them.
    """
    from PIL import Image, UnidentifiedImageError

    for path in paths:
        if not path.is_file():
            other = "a folder" if path.is_dir() else "no plain file"
            kind = f"{other}, and no picture" if path.exists() else "not there"
            raise UserError(f"The picture {path} is {kind}: check the path.")
        if latents and path.suffix == ".safetensors":
            continue
        try:
            with Image.open(path):
                pass
        except UnidentifiedImageError:
            data = path.read_bytes()
            if strip_metadata(data) == data:  # nor can it be mended when it is read
                raise UserError(f"{path} is no picture in a known format.") from None
        except Exception:  # Pillow raises nearly anything: reading it whole says what is wrong
            continue


def load_square(path: Path, size: int | None = None) -> "Tensor":
    """The centre square of a picture file of any size, mode and rotation, (1, 3, S, S) in [-1, 1].

    With `size` it is resized to that, and a line on stderr says so if something is cut off.
    """
    from unclip_pl.utils.images import load_image

    height, width = load_image(path).shape[1:]
    side = min(height, width)
    if size and height != width:
        print(
            f"unclip: {path} is {width} x {height} pixels, of which the {side} x {side} in the "
            "centre are taken.",
            file=sys.stderr,
        )
    return load_image(path, size or side)[None]


def enlarge_like(image: "Tensor", other: "Tensor") -> "Tensor":
    """(B, 3, H, W) at the size of the pictures `other`, each pixel as a square."""
    from torch.nn.functional import interpolate

    return interpolate(image, other.shape[-2:], mode="nearest")
