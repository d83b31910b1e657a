"""Tar shards of images and captions, as img2dataset and webdataset write them: KEY.jpg|png|webp, KEY.txt, KEY.json. Read by webdataset's means.

Nothing in a shard is ever unpickled: only the extensions named here are looked at. What cannot be read is named, counted, and passed over
up to a share of the samples (`ErrorBudget`). Among that are a second sample of the same key in a shard, for images and embeddings are paired
by key, and an image of more than 50 megapixels, for it would stall a worker and take a GB; a JPEG counts as large as it is decoded (`decode`).
"""

import errno
import glob
import io
import json
import logging
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import braceexpand
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unclip_pl.errors import UserError
from unclip_pl.images import flatten, from_pil, upright

IMAGES = ("png", "jpg", "jpeg", "webp")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # what a file of these names may hold: the web names many of them wrongly
MAX_PIXELS = 50_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `decode` has a limit of its own
log = logging.getLogger(__name__)
Decoded = TypeVar("Decoded")


class BadSample(Exception):
    """A sample that cannot be used; its text says why and follows "sample KEY of SHARD was passed over: "."""


def is_url(shard: str) -> bool:
    """Whether a shard is read through webdataset's `gopen` from elsewhere, not from a file here."""
    return "://" in shard or shard.startswith("pipe:")


def expand(spec: str | Sequence[str]) -> list[str]:
    """Shard names from a brace pattern, a glob, a folder, one file, a URL (`http:`, `pipe:`, ...; webdataset's forms), or a list of these.

    Raises:
        UserError: nothing is there, or webdataset has no means for the URL.
    """
    if not isinstance(spec, str):
        return [url for one in spec for url in expand(one)]
    try:
        names = [spec] if spec.startswith("pipe:") and "{" not in spec else list(braceexpand.braceexpand(spec))
    except ValueError as error:
        raise UserError(f"The shards {spec} are no pattern ({error}): write for example 'data/{{00000..00009}}.tar'.") from None
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
            raise UserError(f"There is no shard {path}: check data.train and data.val (a folder, a file, or a pattern such as 'data/{{00000..00009}}.tar').")
    if not found:
        raise UserError(f"There are no .tar files in {spec}: give a folder of shards or a pattern such as 'data/{{00000..00009}}.tar'.")
    return found


def _known(url: str) -> str:
    from webdataset.gopen import gopen_schemes

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes and scheme != "file":
        example = f" (for example 'pipe:aws s3 cp {url} -')" if scheme == "s3" else ""
        raise UserError(f"webdataset has no means to read {url}: name a command that writes the tar, as 'pipe:COMMAND'{example}.")
    return url


@dataclass(frozen=True)
class Lost:
    """What `read_shard` gives in the place of samples that cannot be used; whoever comes to it has `ErrorBudget.charge` count it."""

    where: str
    reason: object
    count: int = 1


class ErrorBudget:
    """Counts the samples that could not be used and stops the run when they are too many.

    Args:
        max_rate: largest share of bad samples; judged from the 100th sample on.
        option: the setting that the sentence names.
    """

    def __init__(self, max_rate: float = 0.01, option: str = "data.loader.max_bad_rate") -> None:
        self.max_rate, self.option = max_rate, option
        self.seen = self.bad = self.largest = 0
        self._last = ""
        self._broken: list[tuple[int, int]] = []  # of each broken shard: samples read, and taken for lost

    def good(self) -> None:
        self.seen += 1
        if self.seen == 100:
            self._judge()

    def spend(self, where: str, reason: object, count: int = 1) -> None:
        """Name a bad sample in the log; raises a UserError where there are too many."""
        self.seen += count
        self.bad += count
        log.warning("%s was passed over: %s", where, reason)
        self._last = f"{where} ({reason})"
        if self.seen >= 100:
            self._judge()

    def _judge(self) -> None:
        if self.bad > self.max_rate * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} samples could not be used, the last one {self._last}: "
                f"mend the data or raise {self.option} ({self.max_rate:g})."
            )

    def end(self) -> None:
        """All was read: judge a set of fewer than 100 samples, too."""
        self._judge()

    def charge(self, lost: Lost) -> None:
        self.spend(lost.where, lost.reason, lost.count)

    def broken(self, read: int, rest: int) -> int:
        """How many samples a shard lost that ends after `read`: `rest`, or as many as the largest shard so far has more, and one at least."""
        lost = max(1, rest, self.largest - read)
        self._broken.append((read, lost))
        return lost

    def larger(self, read: int) -> int:
        """Take note of a shard of `read` samples; returns how many more than was thought the broken shards before it lost, if it is the largest."""
        if read <= self.largest:
            return 0
        self.largest, before = read, sum(lost for _, lost in self._broken)
        self._broken = [(had, max(lost, read - had)) for had, lost in self._broken]
        return sum(lost for _, lost in self._broken) - before


class _Member(tarfile.TarInfo):
    """tarfile takes a tar for ended where it is cut between two files, or where a header is damaged: here only its zeros are an end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            damaged = isinstance(error, tarfile.InvalidHeaderError)  # type: ignore[attr-defined]
            raise tarfile.ReadError("a header in it is damaged" if damaged else "it is cut short") from None


def tar_files(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar, compressed or not; raises nearly anything where it is damaged."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:
        for member in tar:
            if not re.match(r"__[^/]*__($|/)", member.name) and member.isreg() and (file := tar.extractfile(member)):  # not webdataset's own files
                yield member.name, file.read()
            tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
    while stream.read(1 << 20):  # padding: the command of a pipe is not left before it has ended
        pass


def raw_samples(url: str, budget: ErrorBudget, members: Collection[str] = (), whole: bool = False) -> Iterator[dict[str, Any]]:
    """The samples of a shard, undecoded: `key`, `shard`, `image` (bytes), `caption` (str). In the tar's order; bad ones are charged at once.

    With `members`, further endings such as "img_emb.npy" in small letters, also `members`: the bytes of those that are there.
    """
    for sample in read_shard(url, budget, members, whole):
        if isinstance(sample, Lost):
            budget.charge(sample)
        else:
            yield sample


def read_shard(url: str, budget: ErrorBudget, members: Collection[str] = (), whole: bool = False) -> Iterator[dict[str, Any] | Lost]:
    """As `raw_samples`, but what cannot be used is given too and not charged; `budget` only learns how large shards are.

    With `whole`, a URL that breaks off is a UserError: unlike a damaged file it may well be whole the next time, and nothing here would tell.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys

    double: list[Lost] = []

    def noted(error: Exception) -> bool:
        name, twice, _ = _cause(error).partition(": duplicate file name")
        double.append(Lost(f"a file of {url}", f"it is the second of the name {name}" if twice else _cause(error)))
        return True

    read, keys, rest = 0, set(), 0
    try:
        with gopen(url) as stream:
            files = ({"fname": name, "data": data, "__url__": url} for name, data in tar_files(stream))
            try:
                for sample in group_by_keys(files, suffixes={*IMAGES, "txt", "json", *members}, handler=noted):
                    yield from double
                    double.clear()
                    image = next((sample[extension] for extension in IMAGES if extension in sample), None)
                    read += 1
                    try:
                        if sample["__key__"] in keys:
                            raise BadSample("an earlier sample of the shard has the same key")
                        if image is None:
                            raise BadSample(f"it has no image ({', '.join(IMAGES)})")
                        ready = {"key": sample["__key__"], "shard": url, "image": image, "caption": caption_of(sample)}
                    except BadSample as error:
                        yield Lost(f"sample {sample['__key__']} of {url}", error)
                        continue
                    if members:
                        ready["members"] = {name: sample[name] for name in members if name in sample}
                    keys.add(ready["key"])
                    yield ready
            except Exception:
                rest = 0 if is_url(url) else _rest(stream, read)
                raise
    except FileNotFoundError:
        raise UserError(f"The shard {url} is gone: put it back, or take it out of data.train and data.val.") from None
    except UserError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged files
        if full := too_many_files(error):
            raise full from None
        if whole and is_url(url):
            raise UserError(
                f"The shard {url} broke off after {read} samples ({_cause(error)}): run again, finished shards are kept; if it ends there each time, mend it."
            ) from None
        yield from double
        yield Lost(f"the rest of shard {url}, after {read} samples,", f"it is no whole tar ({_cause(error)})", budget.broken(read, rest))
    else:
        yield from double
    if more := budget.larger(read):
        yield Lost("the rest of broken shards before", f"{url} shows that they had at least {read} samples", more)


def _rest(stream: IO[bytes], read: int) -> int:
    """How many samples the bytes behind the damage may hold, by how many those before it held; 0 where the file is cut there."""
    position = stream.tell()
    return round(read * (os.fstat(stream.fileno()).st_size / position - 1)) if position else 0


def too_many_files(error: Exception) -> UserError | None:
    """What to raise for an error that is none of the file that was to be opened, but of the limit on open files; else None."""
    if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return UserError(f"No more files can be opened ({error.strerror}): raise the limit with `ulimit -n` in the shell that starts the run.")


def _cause(error: Exception) -> str:
    """An exception's text without webdataset's additions."""
    return str(error.args[0]).partition(" @ <")[0] if error.args else type(error).__name__


def caption_of(sample: dict[str, Any]) -> str:
    """The caption: KEY.txt, else "caption" of KEY.json, else "": img2dataset writes images without captions, too."""
    if "txt" in sample:
        return sample["txt"].decode("utf-8", errors="replace").strip()
    try:
        fields = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        raise BadSample("its .json cannot be read") from None
    caption = fields.get("caption") if isinstance(fields, dict) else None
    return caption.strip() if isinstance(caption, str) else ""


def decode(data: bytes, image_size: int | None, exact_jpeg: bool = False) -> Tensor:
    """The bytes of a picture -> float32 (3, S, S) in [-1, 1]: short side to S, antialiased, and the centre cut out. With None: whole, at its own size.

    A JPEG is decoded at a half, quarter or eighth where that is still twice as large as S (not with `exact_jpeg`); no more than `MAX_PIXELS` are decoded.

    Raises:
        BadSample: they are no picture, or too large a one.
    """
    return _opened(data, image_size, exact_jpeg, lambda image: from_pil(image if image_size is None else _less_long(image), image_size))


def decode_uncut(data: bytes, image_size: int, exact_jpeg: bool = False) -> Image.Image:
    """The bytes of a picture -> RGB picture whose short side is at most S: larger ones are made smaller, antialiased, smaller ones stay as they are.

    JPEGs, limit and BadSample as in `decode`.
    """

    def reduced(image: Image.Image) -> Image.Image:
        image = flatten(upright(_less_long(image)))
        scale = image_size / min(image.size)
        if scale >= 1:
            return image
        return image.resize((max(image_size, round(image.width * scale)), max(image_size, round(image.height * scale))), Image.Resampling.BICUBIC)

    return _opened(data, image_size, exact_jpeg, reduced)


def _opened(data: bytes, image_size: int | None, exact_jpeg: bool, use: Callable[[Image.Image], Decoded]) -> Decoded:
    """What `use` makes of the picture in `data`; raises BadSample, see `decode`."""
    if not data:
        raise BadSample("its image is empty, a file of 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image_size is not None and not exact_jpeg:
                image.draft(None, (2 * image_size, 2 * image_size))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return use(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # a warning only where the user makes errors of them
        raise BadSample(f"its image is larger than {MAX_PIXELS // 10**6} megapixels: make it smaller") from None
    except UnidentifiedImageError:
        raise BadSample("its image cannot be decoded (of no known format)") from None
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise BadSample(f"its image cannot be decoded ({str(error) or type(error).__name__})") from None


def _less_long(image: Image.Image) -> Image.Image:
    """Cut the ends of a picture that is a thin strip: enlarged to S it would not fit into memory."""
    long = 4 * min(image.size)
    if max(image.size) <= 2 * long:
        return image
    width, height = min(image.width, long), min(image.height, long)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def count_samples(shard: str) -> int:
    """Number of samples with an image in a shard: of a file from the tar's headers alone, of a URL by reading it through.

    Raises:
        UserError: it is no whole tar.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import base_plus_ext

    try:
        if is_url(shard):
            with gopen(shard) as stream:
                names = [name for name, _ in tar_files(stream)]
        else:
            with tarfile.open(shard, tarinfo=_Member) as tar:
                names = [member.name for member in tar if member.isreg()]
    except Exception as error:
        raise UserError(f"The shard {shard} is no whole tar ({_cause(error)}): fetch it again, take it out, or set data.loader.steps_per_epoch.") from None
    return len({key for key, ending in map(base_plus_ext, names) if key and ending.lower() in IMAGES})
