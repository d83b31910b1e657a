"""The files in a tar, and which of them make up a sample.

Files that follow each other and have the same KEY are a sample: KEY.png, KEY.txt, KEY.json. A key
may hold dots: photo.0001.png and photo.0001.txt are the sample photo.0001. Where a key has
captions and its one picture is named by its role (KEY.input.jpg, KEY.txt), they are the sample KEY.
Every file is used, given as lost, or counted in `Groups.unread`.
"""

import gzip
import io
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from unclip_pl.data.budget import Lost
from unclip_pl.data.captions import ENDINGS
from unclip_pl.data.pictures import IMAGES
from unclip_pl.utils.text import repair_text

TEXTS = (*ENDINGS, "json")
"""Endings of the files that may hold a caption."""
HELD = 64
"""Keys of one beginning (photo.0001, photo.0002) that are held at a time."""
KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.FIFOTYPE: "pipe",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
}


@dataclass(frozen=True)
class NotPlain:
    """In the place of a file's content: why the tar does not hold it."""

    why: str


Content = bytes | NotPlain


class Member(tarfile.TarInfo):
    """tarfile takes a tar for ended where it is cut between two files, or where a header is
    damaged: here only its zeros are an end, and tars put one behind the other are all read."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Member":
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EmptyHeaderError) and getattr(tar, "ended", False):  # type: ignore[attr-defined]
                raise
            damaged = isinstance(error, tarfile.InvalidHeaderError)  # type: ignore[attr-defined]
            text = "a header in it is damaged" if damaged else "it is cut short"
            raise tarfile.ReadError(text) from None
        tar.ended = False  # type: ignore[attr-defined]
        return member


def tar_files(stream: IO[bytes]) -> Iterator[tuple[str, Content]]:
    """Names and contents of the files in a tar, compressed or not; raises nearly anything where it
    is damaged."""
    packed: Any = stream
    if isinstance(stream, io.BufferedReader) and stream.peek(2)[:2] == b"\x1f\x8b":
        packed = gzip.GzipFile(fileobj=stream)  # tarfile's own reads the first of several parts
    with tarfile.open(fileobj=packed, mode="r|*", tarinfo=Member, ignore_zeros=True) as tar:
        for member in tar:
            if _of_interest(member):
                yield repair_text(member.name), _content(tar, member)
            tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
    while stream.read(1 << 20):  # the command of a pipe is not left before it has ended
        pass


def tar_names(path: str) -> Iterator[tuple[str, Content]]:
    """As `tar_files`, of a file here and from the headers alone: every content is empty."""
    with tarfile.open(path, tarinfo=Member, ignore_zeros=True) as tar:
        for member in tar:
            if _of_interest(member):
                yield repair_text(member.name), b"" if member.isreg() else _not_plain(member)


def _of_interest(member: tarfile.TarInfo) -> bool:
    """Not a folder, and not one of webdataset's own files."""
    return not member.isdir() and not re.match(r"__[^/]*__($|/)", member.name)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Content:
    file = tar.extractfile(member) if member.isreg() else None
    return file.read() if file else _not_plain(member)


def _not_plain(member: tarfile.TarInfo) -> NotPlain:
    kind = KINDS.get(member.type, f"file of tar's type {member.type.decode('latin-1')!r}")
    if member.islnk() or member.issym():
        cure = "write the tar again with its content (tar --dereference --hard-dereference)"
        return NotPlain(f"is a {kind} to {member.linkname}: {cure}")
    return NotPlain(f"is a {kind}, not a plain file")


@dataclass
class Group:
    """The files of a sample by ending (in small letters), and all endings of its key."""

    key: str
    files: dict[str, Content]
    endings: list[str] = field(default_factory=list)

    @property
    def image(self) -> str | None:
        """The ending of its picture; None: it has none."""
        return next((ending for ending in IMAGES if ending in self.files), None)

    @property
    def captioned(self) -> bool:
        """Whether a file of it may hold a caption."""
        return any(ending in self.files for ending in TEXTS)


class Groups:
    """Puts the files of a tar together to samples; once through with `of`.

    Args:
        shard: for sentences.
        members: endings besides those of pictures and captions, such as "img_emb.npy".
    """

    def __init__(self, shard: str, members: Collection[str] = ()) -> None:
        self.shard = shard
        self.unread: Counter[str] = Counter()  # files that nothing is made of, by what they are
        self._known = sorted({*IMAGES, *TEXTS, *members}, key=len, reverse=True)
        self._family = ""
        self._groups: dict[str, Group] = {}
        self._others: list[str] = []

    def of(self, files: Iterable[tuple[str, Content]]) -> Iterator[Group | Lost]:
        """The samples in the tar's order, with or without a picture, and what is lost."""
        for name, content in files:
            family, key, ending = self._place(name)
            if not family:
                self.unread[ending] += 1
                continue
            full = len(self._groups) >= HELD and key not in self._groups
            if family != self._family or full:
                yield from self._resolved()
                self._family = family
            if key is None:
                self._others.append(ending)
                continue
            group = self._groups.setdefault(key, Group(key, {}))
            if ending in group.files:
                where = f"a file of {self.shard}"
                yield Lost(where, f"it is the second of the name {name}")
                continue
            group.files[ending] = content
        yield from self._resolved()

    def _place(self, name: str) -> tuple[str, str | None, str]:
        """(beginning up to the first dot, key, ending); no key where the ending is none of those
        looked for, and no beginning where the file is hidden or has no ending."""
        folder, slash, base = name.rpartition("/")
        if any(part.startswith(".") and part.strip(".") for part in name.split("/")):
            return "", None, "hidden files"
        first, dot, _ = base.partition(".")
        if not dot or not first:
            return "", None, "files without an ending"
        family, small = folder + slash + first, base.lower()
        for ending in self._known:
            if small.endswith(f".{ending}"):
                return family, name[: -len(ending) - 1], ending
        return family, None, small.rpartition(".")[2]

    def _resolved(self) -> Iterator[Group | Lost]:
        """The samples among the files held, which have one beginning."""
        groups, others, family = self._groups, self._others, self._family
        self._groups, self._others = {}, []
        self.unread.update(others)
        if not groups:
            return
        whole = groups.pop(family, Group(family, {}))
        pictured = [group for group in groups.values() if group.image]
        loose = [group for group in groups.values() if not group.image]
        if whole.image:  # KEY.jpg with KEY.mask.png is one sample, with KEY.1.png, KEY.1.txt two
            given = [whole, *(group for group in pictured if group.captioned)]
        elif not pictured:
            given = [whole] if whole.files else loose
        elif whole.captioned and not any(group.captioned for group in pictured):
            if len(pictured) > 1:
                found = ", ".join(self._endings(group) for group in pictured[:3])
                several = f"it has several images ({found}) and none of them is {family}.jpg"
                yield Lost(f"sample {family} of {self.shard}", several, len(pictured))
                return
            given = [Group(family, pictured[0].files | whole.files)]
            pictured = []
        else:
            given = [*pictured, *loose, *([whole] if whole.captioned else [])]
        keys = {group.key for group in given}
        for group in (*pictured, *loose):
            if group.key not in keys:
                self.unread.update(f"{self._role(group)}{ending}" for ending in group.files)
        for group in given:
            group.endings = sorted({*group.files, *others})
            self.unread.update(f"a second {end}" for end in group.files if self._spare(group, end))
            yield group

    def _role(self, group: Group) -> str:
        """What stands between a key and the ending: "mask." of KEY.mask.png."""
        return group.key[len(self._family) + 1 :] + "."

    def _endings(self, group: Group) -> str:
        return self._role(group) + (group.image or "")

    def _spare(self, group: Group, ending: str) -> bool:
        return ending in IMAGES and ending != group.image
