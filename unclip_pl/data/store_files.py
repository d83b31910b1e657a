"""The files of an embedding store: in a local folder, or in a bucket.

Both show a file under its name when it is whole.
"""

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path

from unclip_pl.utils.files import atomic_file, cache_dir, file_lock
from unclip_pl.utils.remote import (
    create,
    exists,
    list_folder,
    read,
    require_writable,
    stat,
    upload,
)
from unclip_pl.utils.remote_copies import local_path


class LocalFiles:
    """The files of a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str) -> Path:
        """Where a file lies."""
        return self.folder / name

    def mapped(self, name: str) -> Path:
        """A local path of a file, to map it into memory."""
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The contents of a file; OSError: it cannot be read."""
        return self.place(name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        with atomic_file(self.place(name)) as file:
            file.write(content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it is there, under a lock; returns whether it was written."""
        if self.exists(name):
            return False
        self.write(name, content)
        return True

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.place(name).is_file()

    def names(self) -> list[str]:
        """The names of all files."""
        return [path.name for path in self.folder.glob("*") if path.is_file()]

    def lock(self, name: str, timeout: float = 3600.0) -> AbstractContextManager[None]:
        """A lock that all processes see which see the folder; see `file_lock`."""
        return file_lock(self.folder / f".{name}.lock", timeout)


class BucketFiles:
    """The objects in a folder of a bucket.

    A bucket has no locks. Fill one store from one job at a time: of two, the manifest may lack the
    shards of one, which comes back when it is run again.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def place(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}"

    def mapped(self, name: str) -> Path:
        """The path of a copy in the cache, which is fetched if it is not there.

        Raises:
            FileNotFoundError: there is no such object.
        """
        stat(self.place(name))
        return local_path(self.place(name))

    def read(self, name: str) -> bytes:
        """The contents of an object; FileNotFoundError: there is none."""
        return read(self.place(name))

    def write(self, name: str, content: bytes) -> None:
        """Write an object, or replace it."""
        require_writable(self.url)
        upload(self.place(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless it is there; returns whether it was written."""
        require_writable(self.url)
        return create(self.place(name), content)

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        return exists(self.place(name))

    def names(self) -> list[str]:
        """The names of all objects directly in the folder."""
        return [url.rpartition("/")[2] for url in list_folder(self.url)]

    def lock(self, name: str, timeout: float = 3600.0) -> AbstractContextManager[None]:
        """A lock that the processes of this machine see; see `file_lock`."""
        digest = hashlib.sha256(self.place(name).encode()).hexdigest()[:16]
        return file_lock(cache_dir() / "locks" / f"{digest}.lock", timeout)
