"""Objects in buckets and on servers, by fsspec: `s3://`, `gs://`, `hf://`, `https://` and others.

All of these are read. S3 and Google Cloud Storage are written too: there an object appears
under its name when it is whole.

Credentials come from where fsspec's packages look for them: environment variables, their own files,
the machine's role. What fails for a moment is tried again: a range of bytes, not the whole object.
An object that cannot be read in the end is named, and never taken for a shorter one.
"""

import io
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote_errors import (
    first_line,
    is_hidden,
    is_refusal,
    may_pass,
    refusal,
    status_of,
)

log = logging.getLogger(__name__)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
NOT_REMOTE = ("file", "local")
WRITABLE = ("s3", "s3a", "gs", "gcs")
TRIES = 6
FIRST_WAIT = 0.5  # seconds; doubled before each further try
PATIENCE = 300.0  # seconds after which there is no further try
BLOCK = 8 << 20  # bytes that are asked for at a time
LISTING_AGE = 60.0  # seconds for which a listing of the hub serves again
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "oid", "Content-MD5", "Last-Modified", "mtime")
"""What file systems call a name of an object's contents, the best one first."""
Result = TypeVar("Result")


class RemoteError(UserError):
    """An object cannot be read or written, after all tries."""


@dataclass(frozen=True)
class RemoteStat:
    """Size in bytes (None: the server does not say) and what changes with the contents."""

    size: int | None
    version: str | None


def scheme_of(path: object) -> str | None:
    """The scheme of a URL that fsspec reads, such as "s3"; None: it is none."""
    match = SCHEME.match(str(path))
    if match is None or match[1] in NOT_REMOTE:
        return None
    from fsspec.registry import known_implementations

    return match[1] if match[1] in known_implementations else None


def is_remote(path: object) -> bool:
    """Whether this is the URL of an object that fsspec reads, not a local path or a command."""
    return scheme_of(path) is not None


def open_remote(url: str, block: int | None = None) -> IO[bytes]:
    """An object for reading, by ranges of bytes, with `seek`.

    Args:
        url: of the object.
        block: how many bytes are asked for at least; by default `BLOCK`.

    Raises:
        FileNotFoundError: there is none.
        UserError: it may not be read, a package is missing, or all tries failed.
    """
    return io.BufferedReader(_Ranges(url), block or BLOCK)


def stat(url: str) -> RemoteStat:
    """Size and version of an object.

    Raises:
        FileNotFoundError: there is none.
        UserError: see `open_remote`.
    """
    info = _try(url, lambda: _file_system(url).info(url))
    if info.get("type") == "directory":
        raise FileNotFoundError(url)
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), None)
    return RemoteStat(info.get("size"), version)


def exists(url: str) -> bool:
    """Whether there is an object of this name."""
    try:
        stat(url)
    except FileNotFoundError:
        return False
    return True


def find(pattern: str) -> list[str]:
    """The URLs of the objects that a glob pattern names, sorted; hidden ones are left out."""
    return _visible(pattern, lambda files: files.glob(pattern, detail=True).values())


def list_folder(url: str) -> list[str]:
    """The URLs of the objects directly in a folder, sorted; none where there is no such folder."""

    def entries(files: Any) -> Any:
        try:
            return files.ls(url.rstrip("/"), detail=True)
        except FileNotFoundError as error:
            if is_hidden(error):
                raise
            return []

    found = _visible(url, entries)
    return [] if found == [url] else found  # some list an object as the only one in itself


def find_below(url: str) -> dict[str, str]:
    """The URLs of all objects in a folder and the folders in it, by their place in the folder."""
    files = _file_system(url)
    return {part: files.unstrip_protocol(info["name"]) for part, info in _below(url).items()}


def sizes_below(url: str) -> dict[str, int]:
    """The sizes in bytes of all objects in a folder, by their place in the folder."""
    return {part: info["size"] for part, info in _below(url).items()}


def _below(url: str) -> dict[str, dict[str, Any]]:
    files = _file_system(url)
    found = _try(url, lambda: files.find(url, detail=True))
    root = files._strip_protocol(url).rstrip("/") + "/"
    return {name.removeprefix(root): found[name] for name in sorted(found)}


def forget_listings(url: str) -> None:
    """Let the next look at objects of this server show what is there now."""
    _file_system(url).invalidate_cache()


def require_writable(url: str) -> None:
    """Check that objects can be written below a URL.

    Raises:
        UserError: it is not in S3 or Google Cloud Storage.
    """
    if scheme_of(url) not in WRITABLE:
        raise UserError(
            f"{url} cannot be written to: give a local path, or one that begins with s3:// or "
            "gs://."
        )


def upload(url: str, source: bytes | Path) -> None:
    """Write an object, which appears when it is whole and replaces one of the same name.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: there is no such bucket, it may not be written, or all tries failed.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size

    def write() -> None:
        files = _file_system(url)
        if isinstance(source, bytes):
            files.pipe_file(url, source)
        else:
            files.put_file(str(source), url)
        if (found := files.info(url)["size"]) != size:
            raise OSError(f"{found} of {size} bytes arrived")

    try:
        _try(url, write)
    except FileNotFoundError:
        if isinstance(source, Path) and not source.exists():
            raise
        raise _no_bucket(url) from None


def create(url: str, content: bytes) -> bool:
    """Write a small object unless there is one of this name; returns whether it was written.

    Of several that do so at one time, one succeeds.

    Raises:
        UserError: there is no such bucket, it may not be written, or all tries failed.
    """

    def write() -> bool:
        try:
            _file_system(url).pipe_file(url, content, mode="create")
        except Exception as error:
            statuses = (status_of(error), status_of(error.__cause__))
            if not isinstance(error, FileExistsError) and 412 not in statuses:
                raise
            return False
        return True

    try:
        # An answer that was lost leaves the object of the first try
        return _try(url, write) or read(url) == content
    except FileNotFoundError:
        raise _no_bucket(url) from None


def _no_bucket(url: str) -> UserError:
    return UserError(f"{url} cannot be written: there is no such bucket, check its name.")


def read(url: str) -> bytes:
    """The contents of a small object.

    Raises:
        FileNotFoundError: there is none.
        UserError: see `open_remote`.
    """
    # One request: between two, another process may write an object of another length
    return _try(url, lambda: _file_system(url).cat_file(url))


def delete(url: str) -> None:
    """Remove an object, if there is one.

    Raises:
        UserError: it may not be removed, or all tries failed.
    """
    try:
        _try(url, lambda: _file_system(url).rm_file(url))
    except FileNotFoundError:
        pass


def _visible(url: str, entries: Callable[[Any], Any]) -> list[str]:
    files = _file_system(url)
    found = _try(url, lambda: list(entries(files)))
    names = [files.unstrip_protocol(entry["name"]) for entry in found if entry["type"] == "file"]
    return sorted(name for name in names if not PurePosixPath(name).name.startswith("."))


def _file_system(url: str) -> Any:
    """fsspec's file system of a URL; after a fork it is another one."""
    import fsspec

    scheme = str(scheme_of(url))
    try:
        # Another process may write at any time: what was listed before tells nothing
        files: Any = fsspec.url_to_fs(url, use_listings_cache=False)[0]
    except ImportError as error:
        package = PACKAGES.get(scheme)
        cure = f"pip install {package}" if package else str(error)
        raise UserError(f"{url} needs a package for {scheme}:// that is missing: {cure}.") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be read ({error}): check the name.") from None
    if scheme == "hf":
        # That one keeps all that it listed, for few requests are free
        now = time.monotonic()
        if now - getattr(files, "listed_at", now - LISTING_AGE) >= LISTING_AGE:
            files.invalidate_cache()
            files.listed_at = now
    return files


def _try(url: str, action: Callable[[], Result]) -> Result:
    """The result of `action`, which is tried again after what may pass."""
    start = time.monotonic()
    wait, tries = FIRST_WAIT, 1
    while True:
        try:
            return action()
        except (UserError, FileExistsError, IsADirectoryError, NotImplementedError):
            raise
        except FileNotFoundError as error:
            if is_hidden(error):
                raise refusal(url, error) from None
            if not may_pass(error.__cause__):
                raise FileNotFoundError(2, "there is no such object", url) from None
            # Not None if it may pass
            cause: Exception = error.__cause__  # type: ignore[assignment]
        except Exception as error:
            cause = error
            if is_refusal(error):
                raise refusal(url, error) from None
        if tries == TRIES or time.monotonic() - start > PATIENCE:
            raise RemoteError(
                f"{url} failed {tries} times, the last time with {first_line(cause)}: check the "
                "server and the connection, then run again."
            ) from cause
        log.warning(
            "%s failed (%s) and is tried again in about %.1f s", url, first_line(cause), wait
        )
        # Not the module's own numbers, which follow from the run's seed
        time.sleep(wait * random.SystemRandom().uniform(0.5, 1.5))
        wait, tries = 2 * wait, tries + 1


class _Ranges(io.RawIOBase):
    """An object as a file: each read asks for one range of bytes."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        size = stat(url).size
        # Held as a whole where the server knows no ranges, or does not say how long it is
        self._content = None if size is not None else _try(url, self._whole)
        self.size = len(self._content or b"") if size is None else size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self.size)
        if start >= end:
            return 0
        if self._content is None:
            data = _try(self.url, lambda: self._range(start, end))
        else:
            data = self._content[start:end]
        buffer[: len(data)] = data
        self._position = end
        return len(data)

    def _whole(self) -> bytes:
        return _file_system(self.url).cat_file(self.url)

    def _range(self, start: int, end: int) -> bytes:
        # The hub's file system would read 5 MB more each time
        options = {"cache_type": "none"} if scheme_of(self.url) == "hf" else {}
        data = _file_system(self.url).cat_file(self.url, start=start, end=end, **options)
        if len(data) == self.size:
            self._content = data
            return data[start:end]
        if len(data) != end - start:
            raise OSError(f"{len(data)} of {end - start} bytes came")
        return data
