"""Where commands put their files: what lies there already is kept. No torch until a picture comes.

One rule for all commands that write into an `--out`, see `OutputFolder`.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file, explain_disk_errors

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PNG = b"\x89PNG"
ROUNDING = 2
"""Levels of 255 by which a picture drawn in a batch of another size may differ."""


class OutputFolder:
    """A folder for the files of one run of a command, made with the first of them.

    A file that lies there stays as it is. If the new one has the same content, there is nothing to
    write (a picture may differ by `ROUNDING`); if not, it gets the next free name ("fox-0_2.png"
    after "fox-0.png"), and one line on stderr says so.

    Args:
        folder: where the files go.
        overwrite: replace files of the same name instead.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike, overwrite: bool = False) -> None:
        self.folder, self.overwrite = Path(folder), overwrite
        require_writable(self.folder)
        self._written: set[Path] = set()
        self._has_told = False

    def write(self, name: str, data: bytes) -> Path:
        """Write a file, whole or not at all, and return its path.

        Two files of one run never share a name.
        """
        first = path = self.folder / name
        number = 1
        while not self._may_take(path, data):
            number += 1
            path = first.with_name(f"{first.stem}_{number}{first.suffix}")
        if path != first and first not in self._written:
            self._tell(first, path)
        if self.overwrite or not path.stat().st_size:
            with atomic_file(path) as file:
                file.write(data)
        self._written.add(path)
        return path

    def write_picture(self, name: str, image: "Image | Tensor", **metadata: str) -> Path:
        """Write a PNG file as `write` does; image and metadata are those of `png_bytes`."""
        from unclip_pl.utils.images import png_bytes

        return self.write(name, png_bytes(image, **metadata))

    def _may_take(self, path: Path, data: bytes) -> bool:
        """Whether this run may have a name: nothing else has it, or may be replaced.

        A new name is taken at once, by an empty file: another command may write there as well.
        """
        if path in self._written:
            return False
        if self.overwrite:
            return True
        with explain_disk_errors(path), contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("xb").close()
            return True
        return path.is_file() and _same(path.read_bytes(), data)

    def _tell(self, old: Path, new: Path) -> None:
        """Say once that something is kept."""
        from tqdm import tqdm  # its `write` leaves a progress bar whole

        if not self._has_told:
            text = f"{old} is there already and is kept, so the new one is {new.name} (--overwrite"
            tqdm.write(f"{text} replaces files of the same name).", file=sys.stderr)
        self._has_told = True


def _same(old: bytes, new: bytes) -> bool:
    """Whether two files are equal; PNG files by their text and, within `ROUNDING`, their pixels."""
    if old == new or not (old.startswith(PNG) and new.startswith(PNG)):
        return old == new
    from PIL import Image, ImageChops, PngImagePlugin

    try:
        first, second = (PngImagePlugin.PngImageFile(io.BytesIO(data)) for data in (old, new))
        if (first.size, first.mode, first.text) != (second.size, second.mode, second.text):
            return False
        difference = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return False
    return max(difference.tobytes(), default=0) <= ROUNDING


def require_writable(folder: Path) -> None:
    """Raise a UserError if files cannot be written into a folder, or into one that is to be made.

    Nothing is left behind.
    """
    place = folder.absolute()
    try:
        while not os.path.lexists(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"Nothing can be written into {folder} ({place}: {error.strerror}): choose another "
            "folder with --out."
        ) from None


def require_new(folder: str | os.PathLike) -> None:
    """Raise a UserError if a folder that is to be made is there already."""
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: choose another folder, or remove it first.")
