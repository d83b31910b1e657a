"""Tar shards of images and captions, as img2dataset and webdataset write them: KEY.jpg|png|webp,
KEY.txt, KEY.json.

Nothing in a shard is ever unpickled: only the endings named in `data.tars` are looked at. What
cannot be read is named, counted, and passed over up to a share of the samples (`ErrorBudget`).
Among that are a second sample of the same key in a shard, for images and embeddings are paired by
key, and an image of more than 50 megapixels, for it would stall a worker and take a GB; a JPEG
counts as large as it is decoded (`decode`).
"""

import os
from collections.abc import Collection, Iterator
from typing import IO, Any

from unclip_pl.data.budget import BadSample, ErrorBudget, Lost, too_many_files
from unclip_pl.data.captions import caption_of
from unclip_pl.data.names import expand, is_url, open_shard
from unclip_pl.data.pictures import FORMATS, IMAGES, MAX_PIXELS, decode, decode_uncut
from unclip_pl.data.tars import Group, Groups, NotPlain, tar_files, tar_names
from unclip_pl.utils.errors import UserError

__all__ = [  # with what the rest of the system needs of the modules beneath
    "FORMATS", "IMAGES", "MAX_PIXELS", "BadSample", "ErrorBudget", "Lost",
    "count_samples", "decode", "decode_uncut", "expand", "is_url", "raw_samples", "read_shard",
    "too_many_files",
]  # fmt: skip


def raw_samples(
    url: str, budget: ErrorBudget, members: Collection[str] = (), whole: bool = False
) -> Iterator[dict[str, Any]]:
    """The samples of a shard, undecoded: `key`, `shard`, `image` (bytes), `caption` (str),
    `endings` (of all files with its key). In the tar's order; bad ones are charged at once.

    With `members`, further endings such as "img_emb.npy" in small letters, also `members`: the
    bytes of those that are there.
    """
    for sample in read_shard(url, budget, members, whole):
        if isinstance(sample, Lost):
            budget.charge(sample)
        else:
            yield sample


def read_shard(
    url: str, budget: ErrorBudget, members: Collection[str] = (), whole: bool = False
) -> Iterator[dict[str, Any] | Lost]:
    """As `raw_samples`, but what cannot be used is given too and not charged; `budget` only learns
    how large shards are, and which files in them are not read.

    With `whole`, a URL that breaks off is a UserError: unlike a damaged file it may well be whole
    the next time, and nothing here would tell.
    """
    read, rest = 0, 0
    keys: set[str] = set()
    groups = Groups(url, members)
    try:
        with open_shard(url) as stream:
            try:
                for group in groups.of(tar_files(stream)):
                    if isinstance(group, Lost):
                        yield group
                        continue
                    read += 1
                    try:
                        sample = _sample(group, url, keys, members)
                    except BadSample as error:
                        yield Lost(f"sample {group.key} of {url}", error)
                        continue
                    keys.add(group.key)
                    yield sample
            except Exception:
                rest = 0 if is_url(url) else _rest(stream, read)
                raise
    except FileNotFoundError:
        cure = "put it back, or take it out of data.train and data.val"
        raise UserError(f"The shard {url} is gone: {cure}.") from None
    except UserError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged files
        if full := too_many_files(error):
            raise full from None
        if whole and is_url(url):
            raise UserError(
                f"The shard {url} broke off after {read} samples ({_cause(error)}): run again, "
                "finished shards are kept; if it ends there each time, mend it."
            ) from None
        where = f"the rest of shard {url}, after {read} samples,"
        yield Lost(where, f"it is no whole tar ({_cause(error)})", budget.broken(read, rest))
    budget.unread(url, groups.unread)
    if more := budget.larger(read):
        shown = f"{url} shows that they had at least {read} samples"
        yield Lost("the rest of broken shards before", shown, more)


def _sample(group: Group, url: str, keys: set[str], members: Collection[str]) -> dict[str, Any]:
    if group.image is None:
        if group.key in keys:
            cure = "write the files of a sample one after the other (tar --sort=name)"
            raise BadSample(f"its {', '.join(group.files)} lies apart from its image: {cure}")
        raise BadSample(f"it has no image ({', '.join(IMAGES)})")
    if group.key in keys:
        raise BadSample("an earlier sample of the shard has the same key")
    files: dict[str, bytes] = {}
    for ending, content in group.files.items():
        if isinstance(content, NotPlain):
            raise BadSample(f"its .{ending} {content.why}")
        files[ending] = content
    sample: dict[str, Any] = {
        "key": group.key,
        "shard": url,
        "image": files[group.image],
        "caption": caption_of(files),
        "endings": group.endings,
    }
    if members:
        sample["members"] = {name: files[name] for name in members if name in files}
    return sample


def _rest(stream: IO[bytes], read: int) -> int:
    """How many samples the bytes behind the damage may hold, by how many those before it held; 0
    where the file is cut there."""
    position = stream.tell()
    return round(read * (os.fstat(stream.fileno()).st_size / position - 1)) if position else 0


def _cause(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


def count_samples(shard: str) -> int:
    """Number of samples with an image in a shard: of a file from the tar's headers alone, of a URL
    by reading it through.

    Raises:
        UserError: it is no whole tar.
    """
    try:
        if is_url(shard):
            with open_shard(shard) as stream:
                return _pictured(shard, tar_files(stream))
        return _pictured(shard, tar_names(shard))
    except Exception as error:
        raise UserError(
            f"The shard {shard} is no whole tar ({_cause(error)}): fetch it again, take it out, or "
            "set data.loader.steps_per_epoch."
        ) from None


def _pictured(shard: str, files: Iterator) -> int:
    groups = (group for group in Groups(shard).of(files) if isinstance(group, Group))
    return len({group.key for group in groups if group.image})
