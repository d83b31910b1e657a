"""Names of shards: which shards a pattern, a folder or a URL stands for, and how to open each."""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import braceexpand

from unclip_pl.utils.errors import UserError

URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
HINT = "give a folder of shards, a file, or a pattern such as 'data/{00000..00009}.tar'"


def is_url(shard: str) -> bool:
    """Whether a shard is read through webdataset's `gopen`, not from a local file.

    `expand` gives no local file such a name.
    """
    return URL.match(shard) is not None


def expand(spec: str | Sequence[str]) -> list[str]:
    """The names of shards.

    Args:
        spec: a brace pattern, a glob, a folder, one file, a URL (`http:`, `pipe:`, ... as
            webdataset writes them), or a list of these. A file or folder of exactly this name is
            taken as it is, whatever characters the name has; of a pattern, so is its folder. Hidden
            files are no shards, unless they are named.

    Raises:
        UserError: nothing is there, or webdataset cannot read the URL.
    """
    if not isinstance(spec, str):
        return [shard for pattern in spec for shard in expand(pattern)]
    path = Path(spec)
    if spec.startswith("~") and not _exists(path):
        path = path.expanduser()
    local = _exists(path) or (path.parent != Path() and _exists(path.parent))
    if is_url(spec) and not local:
        plain = spec.startswith("pipe:") and "{" not in spec
        return [_check_scheme(url) for url in ([spec] if plain else _braces(spec))]
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
            raise UserError(f"There is no shard {here}: check data.train and data.val ({HINT}).")
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
    if file.is_file() and file.stat().st_size == 0:
        raise UserError(
            f"The shard {file} is empty, a file of 0 bytes: fetch it again or remove it."
        )
    name = str(file)
    return str(Path.cwd() / name) if is_url(name) or name.startswith("~") else name


def _shards_of(folder: Path) -> list[str]:
    """The .tar files of a folder; its compressed ones where there are none."""
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    files = [file for file in files if not file.is_dir()]
    plain = [_name(file) for file in files if file.suffix == ".tar"]
    packed = [_name(file) for file in files if file.name.endswith(PACKED)]
    if plain and packed:
        raise UserError(
            f"{folder} has {len(plain)} .tar files and {len(packed)} compressed ones, such as "
            f"{packed[0]}: give a pattern that says which."
        )
    if not (plain or packed):
        raise UserError(f"There are no .tar files in {folder}: {HINT}.")
    return plain or packed


def _check_scheme(url: str) -> str:
    from webdataset.gopen import gopen_schemes

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes and scheme != "file":
        example = f" (for example 'pipe:aws s3 cp {url} -')" if scheme == "s3" else ""
        raise UserError(
            f"webdataset cannot read {url}: name a command that writes the tar, as "
            f"'pipe:COMMAND'{example}."
        )
    return url


def open_shard(shard: str) -> IO[bytes]:
    """The bytes of a shard: of a local file, or of a URL through webdataset's `gopen`."""
    if not is_url(shard):
        return Path(shard).open("rb")
    from webdataset.gopen import gopen

    return gopen(shard)
