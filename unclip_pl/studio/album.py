"""The pictures of everybody who is at the page: PNG files with their settings.

They are kept for as long as the person stays.
"""

import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip_pl.studio.engine import Ticket
from unclip_pl.studio.picture_files import png_file, settings_of
from unclip_pl.studio.requests import Create

MOST = 200
"""Pictures that one person has; older ones go."""
MOST_OF_ALL = 5000
"""Pictures of everybody; those of whoever drew nothing for the longest time go."""


@dataclass(frozen=True)
class Print:
    """A picture in the album."""

    path: Path
    label: str
    settings: dict[str, Any]


class Album:
    """Files in a temporary folder of its own, which `close` removes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="unclip-studio-")).resolve()
        self._prints: dict[str, list[Print]] = {}
        self._lock = threading.Lock()

    def add(self, person: str, ticket: Ticket) -> list[Print]:
        """Put the pictures of a finished ticket first; they come back."""
        added = []
        for shown in ticket.pictures:
            folder = self.folder / secrets.token_urlsafe(16)
            folder.mkdir()
            name = re.sub(r"\W+", "-", shown.label).strip("-")[:60] or "picture"
            path = folder / f"{name}-{shown.seed}.png"
            path.write_bytes(png_file(shown.image, ticket.request, shown.label, shown.seed))
            settings = settings_of(ticket.request, shown.label, shown.seed)
            own = isinstance(ticket.request, Create)  # its pictures may share a caption
            label = f"{shown.label}, seed {shown.seed}" if own else shown.label
            added.append(Print(path, label, settings))
        with self._lock:
            prints = added + self._prints.pop(person, [])
            self._prints[person], old = prints[:MOST], prints[MOST:]  # who drew last is last
            while sum(map(len, self._prints.values())) > MOST_OF_ALL and len(self._prints) > 1:
                old += self._prints.pop(next(iter(self._prints)))
        _remove(old)
        return added

    def of(self, person: str) -> list[Print]:
        """The newest first."""
        with self._lock:
            return list(self._prints.get(person, []))

    def __iter__(self) -> Iterator[str]:
        """The files of all pictures."""
        with self._lock:
            prints = list(self._prints.values())
        return (str(one.path) for own in prints for one in own)

    def forget(self, person: str) -> None:
        """Remove somebody's pictures."""
        with self._lock:
            prints = self._prints.pop(person, [])
        _remove(prints)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove(prints: list[Print]) -> None:
    for one in prints:
        shutil.rmtree(one.path.parent, ignore_errors=True)
