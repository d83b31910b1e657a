"""Copies of remote releases and checkpoints in the cache, each made once for a version of them."""

import hashlib
import os
import shutil
from pathlib import Path

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder, cache_dir, file_lock
from unclip_pl.utils.remote import (
    RemoteError,
    find_below,
    forget_listings,
    is_remote,
    open_remote,
    scheme_of,
    stat,
)


def local_folder(path: str | os.PathLike) -> Path:
    """A folder to write into.

    Raises:
        UserError: it is a remote URL.
    """
    if is_remote(path):
        raise UserError(
            f"{path} is remote, and this is written here: give a local folder, and copy that when "
            "it is whole."
        )
    return Path(path)


def local_path(path: str | os.PathLike) -> Path:
    """The path itself, or that of a copy of a remote file or folder.

    The copy lies in the cache as `remote/VERSION/SCHEME/BUCKET/...`. It is fetched if it is not
    there yet, by one process of a machine while others wait, and appears when it is whole.

    Raises:
        UserError: there is nothing, it may not be read, or it fails at all tries.
    """
    if not is_remote(path):
        return Path(path)
    url = str(path).rstrip("/")
    forget_listings(url)
    objects = _objects(url)
    versions = _versions(objects)
    version = hashlib.sha256("\n".join([url, *versions]).encode()).hexdigest()[:16]
    scheme, _, name = url.partition("://")
    folder = cache_dir() / "remote" / version
    copy = folder / scheme / name
    if copy.exists():
        return copy
    with file_lock(folder.with_suffix(".lock")):
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                for part, one in objects.items():
                    target = temporary / scheme / name / part
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open_remote(one) as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                forget_listings(url)
                if _versions(objects) != versions:  # a mixture of old and new parts
                    raise RemoteError(f"{url} was changed while it was read: run again.")
    return copy


def _versions(objects: dict[str, str]) -> list[str]:
    """What changes when one of the objects does."""
    return [f"{part} {stat(one)}" for part, one in objects.items()]


def _objects(url: str) -> dict[str, str]:
    """The URLs of a file (its part is "") or of the files in a folder, by their place in it."""
    try:
        stat(url)
        return {"": url}
    except FileNotFoundError:
        below = {} if scheme_of(url) in ("http", "https") else find_below(url)
    objects = {part: one for part, one in below.items() if part and not part.endswith("/")}
    if not objects:
        raise UserError(f"There is no {url}: give the URL of a release or of a checkpoint.")
    if bad := [part for part in objects if {"", ".", ".."} & set(part.split("/"))]:
        raise UserError(
            f"{url} holds an object named {bad[0]}, which is no place in a folder: remove it, or "
            "give another URL."
        )
    return objects
