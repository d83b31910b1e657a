"""Names of shards: which shards a pattern, a folder or a URL stands for, and how to open each."""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import braceexpand

from unclip_pl.utils import remote
from unclip_pl.utils.errors import UserError

URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
WHERE = "check the option that names it, such as data.train"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PACK = 'pictures are packed into shards first (docs/tutorial.md, "Tar shards")'
HINT = "give a folder of shards, a file, or a pattern such as 'data/{00000..00009}.tar'"


def is_url(shard: str) -> bool:
    """Whether a shard is anything but a local file.

    It is then an object in a bucket or on a server, or the output of a command. `expand` gives no
    local file such a name.
    """
    return URL.match(shard) is not None


def is_streamed(shard: str) -> bool:
    """Whether a shard is read through webdataset's `gopen` (`pipe:`).

    It is read once from its start to its end, and may break off without an error.
    """
    return is_url(shard) and not remote.is_remote(shard)


def expand(spec: str | Sequence[str]) -> list[str]:
    """The names of shards.

    Args:
        spec: a brace pattern, a glob, a folder, one file, or a list of these; all of them local, or
            URLs that fsspec reads (`s3://`, `gs://`, `hf://`; `https://` has neither folders nor
            globs); or `pipe:COMMAND`, as webdataset writes it. A local file or folder of exactly
            this name is taken as it is, whatever characters the name has; of a pattern, so is its
            folder. Hidden files are no shards, unless they are named.

    Raises:
        UserError: nothing is there, or nothing can read the URL.
    """
    if not isinstance(spec, str):
        return [shard for pattern in spec for shard in expand(pattern)]
    path = Path(spec)
    if spec.startswith("~") and not _exists(path):
        path = path.expanduser()
    local = _exists(path) or (path.parent != Path() and _exists(path.parent))
    if is_url(spec) and not local:
        plain = spec.startswith("pipe:") and "{" not in spec
        urls = [spec] if plain else _braces(spec)
        return [shard for url in urls for shard in _expand_url(url)]
    folder = path
    while not _exists(folder):
        folder = folder.parent
    names = ["."] if folder == path else _braces(str(path.relative_to(folder)))
    shards: list[str] = []
    for name in names:
        here = folder / name
        if here.is_dir():
            shards += _shards_of(here)
        elif _exists(here):
            shards.append(_name(here))
        elif matches := sorted(glob.glob(name, root_dir=folder)):  # noqa: PTH207  of many levels
            files = [folder / match for match in matches]
            shards += [_name(file) for file in files if not file.is_dir()]
        else:
            raise UserError(f"There is no shard {here}: {WHERE} ({HINT}).")
    return shards


def refuse_loose_shards(arguments: Sequence[str]) -> None:
    """Raise a UserError where the shell has expanded a pattern into several shards."""
    for before, argument in itertools.pairwise(arguments):
        if not argument.endswith((".tar", *PACKED)) or argument.startswith("-"):
            continue
        if not before.startswith("-") or "=" in before:
            options = [word for word in arguments if word.startswith("--data")]
            option = options[-1].partition("=")[0] if options else "--data.train"
            raise UserError(
                f"{option} was given several files, {argument} among them, because the shell "
                f"expanded a pattern: write it in quotes, as in {option} 'data/*.tar'."
            )


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"The shards {pattern} are no pattern ({error}): {HINT}.") from None


def _exists(path: Path) -> bool:
    """Whether something has this name, even a link to a file that is gone."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a name that no file can have
        return False


def _name(file: Path) -> str:
    """The file's name, made absolute where it looks like a URL or a home folder."""
    if not file.exists():
        target = file.readlink()
        raise UserError(f"The shard {file} is a link to {target}, which is not there: mend it.")
    if file.suffix.lower() in PICTURES:
        raise UserError(f"{file} is a picture and no .tar shard: {PACK}.")
    if file.is_file() and file.stat().st_size == 0:
        raise UserError(
            f"The shard {file} is empty, a file of 0 bytes: fetch it again or remove it."
        )
    name = str(file)
    return str(Path.cwd() / name) if is_url(name) or name.startswith("~") else name


def _shards_of(folder: Path) -> list[str]:
    """The .tar files of a folder; its compressed ones where there are none."""
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    return _tars(folder, [_name(file) for file in files if not file.is_dir() and _is_tar(file)])


def _is_tar(name: str | Path) -> bool:
    return str(name).endswith((".tar", *PACKED))


def _tars(folder: str | Path, names: list[str]) -> list[str]:
    """The .tar files among the names in a folder; its compressed ones where there are none."""
    plain = [name for name in names if name.endswith(".tar")]
    packed = [name for name in names if name.endswith(PACKED)]
    if plain and packed:
        raise UserError(
            f"{folder} has {len(plain)} .tar files and {len(packed)} compressed ones, such as "
            f"{packed[0]}: give a pattern that says which."
        )
    if not (plain or packed):
        raise UserError(f"There are no .tar files in {folder}: {HINT}; {PACK}.")
    return plain or packed


def _expand_url(url: str) -> list[str]:
    """The shards of a URL without braces: it is a name, a glob or a folder."""
    scheme = remote.scheme_of(url)
    if scheme is None:
        return [_check_scheme(url)]
    if scheme in ("http", "https"):
        return [url]
    if any(sign in url for sign in "*?[") and not remote.exists(url):
        if found := remote.find(url):
            return found
        raise UserError(f"There is no shard {url}: {WHERE} ({HINT}).")
    if _is_tar(url) or remote.exists(url):
        return [url]
    return _tars(url, remote.list_folder(url))


def _check_scheme(url: str) -> str:
    from webdataset.gopen import gopen_schemes

    if url.partition(":")[0] not in (*gopen_schemes, "file"):
        raise UserError(
            f"Neither fsspec nor webdataset can read {url}: name a command that writes the tar, as "
            "'pipe:COMMAND'."
        )
    return url


def open_shard(shard: str) -> IO[bytes]:
    """Open a shard to read its bytes.

    A shard is a local file, an object, or a command (by webdataset's `gopen`).

    Raises:
        FileNotFoundError: it is gone.
        UserError: an object failed at all tries, or may not be read.
    """
    if not is_url(shard):
        return Path(shard).open("rb")
    if remote.is_remote(shard):
        return remote.open_remote(shard)
    from webdataset.gopen import gopen

    return gopen(shard)
