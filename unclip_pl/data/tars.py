"""The files in a tar, and which of them make up a sample.

Files that follow each other and have the same KEY are a sample: KEY.png, KEY.txt, KEY.json. A key
may hold dots: photo.0001.png and photo.0001.txt are the sample photo.0001. Where a key has
captions and its one image is named by its role (KEY.input.jpg, KEY.txt), they are the sample KEY.
Every file is used, reported as skipped, or counted in `SampleGrouper.unused`.
"""

import gzip
import io
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from unclip_pl.data.bad_samples import SkippedSamples
from unclip_pl.data.captions import CAPTION_ENDINGS
from unclip_pl.data.decoding import IMAGE_ENDINGS
from unclip_pl.utils.text import repair_text

TEXT_ENDINGS = (*CAPTION_ENDINGS, "json")
"""Endings of the files that may hold a caption."""
MAX_OPEN_KEYS = 64
"""Keys of one stem (photo.0001, photo.0002) that are held at a time."""
KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.FIFOTYPE: "pipe",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
}


@dataclass(frozen=True)
class SpecialFile:
    """Stands for the content of a link or device, and says why the tar does not hold it."""

    why: str


Content = bytes | SpecialFile


class Member(tarfile.TarInfo):
    """A member of a tar that ends only with its zeros.

    tarfile takes a tar for ended where it is cut between two files, or where a header is damaged.
    Tars that are concatenated are all read.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Member":
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            empty = isinstance(error, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
            if empty and getattr(tar, "ended", False):
                raise
            damaged = isinstance(error, tarfile.InvalidHeaderError)  # type: ignore[attr-defined]
            text = "a header in it is damaged" if damaged else "it is cut short"
            raise tarfile.ReadError(text) from None
        tar.ended = False  # type: ignore[attr-defined]
        return member


def tar_files(stream: IO[bytes]) -> Iterator[tuple[str, Content]]:
    """Names and contents of the files in a tar, compressed or not.

    Raises nearly anything where the tar is damaged.
    """
    packed: Any = stream
    if isinstance(stream, io.BufferedReader) and stream.peek(2)[:2] == b"\x1f\x8b":
        packed = gzip.GzipFile(fileobj=stream)  # tarfile's own reads the first of several parts
    with tarfile.open(fileobj=packed, mode="r|*", tarinfo=Member, ignore_zeros=True) as tar:
        for member in tar:
            if _of_interest(member):
                yield repair_text(member.name), _content(tar, member)
            tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
    while stream.read(1 << 20):  # let the command of a pipe end
        pass


def tar_names(stream: IO[bytes]) -> Iterator[tuple[str, Content]]:
    """As `tar_files`, of a stream with `seek` and only from the headers: every content is empty."""
    with tarfile.open(fileobj=stream, tarinfo=Member, ignore_zeros=True) as tar:
        for member in tar:
            if _of_interest(member):
                yield repair_text(member.name), b"" if member.isreg() else _special_file(member)


def _of_interest(member: tarfile.TarInfo) -> bool:
    """Not a folder, and not one of webdataset's own files."""
    return not member.isdir() and not re.match(r"__[^/]*__($|/)", member.name)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Content:
    file = tar.extractfile(member) if member.isreg() else None
    return file.read() if file else _special_file(member)


def _special_file(member: tarfile.TarInfo) -> SpecialFile:
    kind = KINDS.get(member.type, f"file of tar's type {member.type.decode('latin-1')!r}")
    if member.islnk() or member.issym():
        cure = "write the tar again with its content (tar --dereference --hard-dereference)"
        return SpecialFile(f"is a {kind} to {member.linkname}: {cure}")
    return SpecialFile(f"is a {kind}, not a plain file")


@dataclass
class SampleFiles:
    """The files of a sample by ending (in small letters), and all endings of its key."""

    key: str
    files: dict[str, Content]
    endings: list[str] = field(default_factory=list)

    @property
    def image(self) -> str | None:
        """The ending of its image; None: it has none."""
        return next((ending for ending in IMAGE_ENDINGS if ending in self.files), None)

    @property
    def captioned(self) -> bool:
        """Whether one of its files may hold a caption."""
        return any(ending in self.files for ending in TEXT_ENDINGS)


class SampleGrouper:
    """Groups the files of a tar into samples; `samples` reads them once.

    Args:
        shard: its name, for messages.
        members: endings to read besides those of images and captions, such as "img_emb.npy".
    """

    def __init__(self, shard: str, members: Collection[str] = ()) -> None:
        self.shard = shard
        self.unused: Counter[str] = Counter()  # files that belong to no sample, by their kind
        self._known = sorted({*IMAGE_ENDINGS, *TEXT_ENDINGS, *members}, key=len, reverse=True)
        self._stem = ""
        self._groups: dict[str, SampleFiles] = {}
        self._others: list[str] = []

    def samples(
        self, files: Iterable[tuple[str, Content]]
    ) -> Iterator[SampleFiles | SkippedSamples]:
        """The samples in the tar's order, with or without an image, and what is skipped."""
        for name, content in files:
            stem, key, ending = self._split(name)
            if not stem:
                self.unused[ending] += 1
                continue
            full = len(self._groups) >= MAX_OPEN_KEYS and key not in self._groups
            if stem != self._stem or full:
                yield from self._close()
                self._stem = stem
            if key is None:
                self._others.append(ending)
                continue
            group = self._groups.setdefault(key, SampleFiles(key, {}))
            if ending in group.files:
                where = f"a file of {self.shard}"
                yield SkippedSamples(where, f"it is the second of the name {name}")
                continue
            group.files[ending] = content
        yield from self._close()

    def _split(self, name: str) -> tuple[str, str | None, str]:
        """A file's name -> (stem up to the first dot, key, ending).

        There is no key where the ending is not one that is read, and no stem where the file is
        hidden or has no ending.
        """
        folder, slash, base = name.rpartition("/")
        if any(part.startswith(".") and part.strip(".") for part in name.split("/")):
            return "", None, "hidden files"
        first, dot, _ = base.partition(".")
        if not dot or not first:
            return "", None, "files without an ending"
        stem, small = folder + slash + first, base.lower()
        for ending in self._known:
            if small.endswith(f".{ending}"):
                return stem, name[: -len(ending) - 1], ending
        return stem, None, small.rpartition(".")[2]

    def _close(self) -> Iterator[SampleFiles | SkippedSamples]:
        """The samples among the files held, which have one stem."""
        groups, others, stem = self._groups, self._others, self._stem
        self._groups, self._others = {}, []
        self.unused.update(others)
        if not groups:
            return
        whole = groups.pop(stem, SampleFiles(stem, {}))
        with_image = [group for group in groups.values() if group.image]
        without = [group for group in groups.values() if not group.image]
        if whole.image:  # KEY.jpg with KEY.mask.png is one sample, with KEY.1.png, KEY.1.txt two
            samples = [whole, *(group for group in with_image if group.captioned)]
        elif not with_image:
            samples = [whole] if whole.files else without
        elif whole.captioned and not any(group.captioned for group in with_image):
            if len(with_image) > 1:
                names = ", ".join(self._role(group) + str(group.image) for group in with_image[:3])
                reason = f"it has several images ({names}) and none of them is {stem}.jpg"
                yield SkippedSamples(f"sample {stem} of {self.shard}", reason, len(with_image))
                return
            samples = [SampleFiles(stem, with_image[0].files | whole.files)]
            with_image = []
        else:
            samples = [*with_image, *without, *([whole] if whole.captioned else [])]
        keys = {group.key for group in samples}
        for group in (*with_image, *without):
            if group.key not in keys:
                self.unused.update(f"{self._role(group)}{ending}" for ending in group.files)
        for group in samples:
            group.endings = sorted({*group.files, *others})
            images = [ending for ending in IMAGE_ENDINGS if ending in group.files]
            self.unused.update(f"a second {ending}" for ending in images[1:])
            yield group

    def _role(self, group: SampleFiles) -> str:
        """What stands between a key and the ending: "mask." of KEY.mask.png."""
        return group.key[len(self._stem) + 1 :] + "."
