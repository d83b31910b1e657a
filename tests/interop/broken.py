"""Files that are damaged, or would do something when they are read."""

import os
from pathlib import Path


class Touch:
    """Unpickling it would make a folder."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def cut(file: Path) -> None:
    """Leave the first half of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
