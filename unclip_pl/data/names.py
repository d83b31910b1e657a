"""Names of shards: what a pattern, a folder or a URL stands for, and how each is opened."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import braceexpand

from unclip_pl.errors import UserError


def is_url(shard: str) -> bool:
    """Whether a shard is read through webdataset's `gopen` from elsewhere, not from a file here."""
    return "://" in shard or shard.startswith("pipe:")


def expand(spec: str | Sequence[str]) -> list[str]:
    """Shard names from a brace pattern, a glob, a folder, one file, a URL (`http:`, `pipe:`, ...;
    webdataset's forms), or a list of these.

    Raises:
        UserError: nothing is there, or webdataset has no means for the URL.
    """
    if not isinstance(spec, str):
        return [url for one in spec for url in expand(one)]
    try:
        names = (
            [spec]
            if spec.startswith("pipe:") and "{" not in spec
            else list(braceexpand.braceexpand(spec))
        )
    except ValueError as error:
        raise UserError(
            f"The shards {spec} are no pattern ({error}): write for example "
            f"'data/{{00000..00009}}.tar'."
        ) from None
    found: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        if is_url(name):
            found.append(_known(name))
        elif path.is_dir():
            found += sorted(str(file) for file in path.glob("*.tar"))
        elif path.is_file():
            found.append(str(path))
        elif matches := sorted(glob.glob(str(path))):  # noqa: PTH207  the pattern may be absolute
            found += matches
        else:
            raise UserError(
                f"There is no shard {path}: check data.train and data.val (a folder, a file, or a "
                f"pattern such as 'data/{{00000..00009}}.tar')."
            )
    if not found:
        raise UserError(
            f"There are no .tar files in {spec}: give a folder of shards or a pattern such as "
            f"'data/{{00000..00009}}.tar'."
        )
    return found


def _known(url: str) -> str:
    from webdataset.gopen import gopen_schemes

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes and scheme != "file":
        example = f" (for example 'pipe:aws s3 cp {url} -')" if scheme == "s3" else ""
        raise UserError(
            f"webdataset has no means to read {url}: name a command that writes the tar, as "
            f"'pipe:COMMAND'{example}."
        )
    return url


def open_shard(shard: str) -> IO[bytes]:
    """The bytes of a shard: of a file here, or of a URL through webdataset's `gopen`."""
    if not is_url(shard):
        return Path(shard).open("rb")
    from webdataset.gopen import gopen

    return gopen(shard)
