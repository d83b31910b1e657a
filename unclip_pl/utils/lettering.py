"""Text of any script in pictures: wrapped, a font for each character, right to left where it must.

The order within a line follows the bidirectional algorithm of Unicode (UAX 9) with one level of
embedding, which is what captions need.
"""

import unicodedata
from dataclasses import dataclass
from itertools import groupby

from PIL import ImageDraw, ImageFont, features

from unclip_pl.utils.fonts import find_font
from unclip_pl.utils.text import repair_text

JOINER = "\u200d"
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
ELLIPSIS = "…"


@dataclass(frozen=True)
class Run:
    """A part of a line that one font draws in one direction."""

    text: str
    font: ImageFont.FreeTypeFont
    rtl: bool

    @property
    def direction(self) -> str | None:
        """For Pillow. Its simple layout, without raqm, draws to the right only, and takes none."""
        if not features.check("raqm"):
            return None
        return "rtl" if self.rtl else "ltr"

    @property
    def width(self) -> float:
        """In pixels."""
        return self.font.getlength(self.text, direction=self.direction)


def line_height(points: int) -> int:
    """Pixels from one line to the next."""
    return round(points * 1.35)


def text_width(line: str, points: int) -> int:
    """The width of a line in pixels."""
    return round(sum(run.width for run in _runs(line, points)))


def wrap_text(text: str, points: int, width: int, max_lines: int = 12) -> list[str]:
    """Break a text into lines.

    A line ends at a space, before or after a character of Chinese or Japanese, or within a word
    that is longer than a line.

    Args:
        text: of one line or more.
        points: the height of the letters in pixels.
        width: of the lines in pixels.
        max_lines: what comes after these is cut off, and the last one ends in an ellipsis.
    """
    lines: list[str] = []
    text = repair_text(text)[: width * max_lines]  # a letter has a pixel or more
    for paragraph in text.expandtabs(1).splitlines() or [""]:
        line = ""
        for piece in _pieces(paragraph, points, width):
            if line and text_width((line + piece).rstrip(), points) > width:
                lines.append(line.rstrip())
                line = piece.lstrip()
            else:
                line += piece
            if len(lines) > max_lines:
                break
        lines.append(line.rstrip())
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        last = lines[-1]
        while last and text_width(last + ELLIPSIS, points) > width:
            last = last[:-1]
        lines[-1] = last + ELLIPSIS
    return lines


def draw_lines(
    draw: ImageDraw.ImageDraw, position: tuple[int, int], lines: list[str], points: int
) -> None:
    """Draw lines of black text under each other; `position` is their left top corner."""
    left, top = position
    for i, line in enumerate(lines):
        x = float(left)
        baseline = top + i * line_height(points) + points
        for run in _runs(line, points):
            draw.text(
                (x, baseline),
                run.text,
                fill="black",
                font=run.font,
                anchor="ls",
                embedded_color=True,
                direction=run.direction,
            )
            x += run.width


def _pieces(text: str, points: int, width: int) -> list[str]:
    """The parts of a text between which a line may end."""
    pieces = [""]
    for cluster in _clusters(text):
        wide = unicodedata.east_asian_width(cluster[0]) in "WF"
        after_wide = pieces[-1] and unicodedata.east_asian_width(pieces[-1][0]) in "WF"
        after_space = pieces[-1].endswith(" ") and cluster != " "
        closing = unicodedata.category(cluster[0]) in ("Pe", "Pf", "Po")  # never begins a line
        too_long = text_width(pieces[-1] + cluster, points) > width
        if too_long or after_space or ((wide or after_wide) and not closing):
            pieces.append(cluster)
        else:
            pieces[-1] += cluster
    return pieces


def _clusters(text: str) -> list[str]:
    """The characters of a text, each with the marks and modifiers that belong to it."""
    clusters: list[str] = []
    for character in text:
        last = clusters[-1] if clusters else ""
        code = ord(character)
        flag = code in FLAG_LETTERS and len(last) == 1 and ord(last) in FLAG_LETTERS
        belongs = unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
        if last and (belongs or flag or code in SKIN_TONES or last.endswith(JOINER)):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _runs(line: str, points: int) -> list[Run]:
    """The runs of a line from left to right."""
    clusters = _clusters(line)
    levels = _levels(clusters)
    fonts = [find_font(cluster, points) for cluster in clusters]
    runs: list[tuple[int, Run]] = []
    for (level, font), group in groupby(zip(clusters, levels, fonts), lambda item: item[1:]):
        parts = [cluster for cluster, _, _ in group]
        rtl = level % 2 == 1
        if rtl and not features.check("raqm"):
            parts.reverse()
        runs.append((level, Run("".join(parts), font, rtl)))
    for level in range(max(levels, default=0), 0, -1):
        runs = _reverse_parts(runs, level)
    return [run for _, run in runs]


def _reverse_parts(runs: list[tuple[int, Run]], level: int) -> list[tuple[int, Run]]:
    """Turn round each sequence of runs of a level or a higher one."""
    result: list[tuple[int, Run]] = []
    for inside, group in groupby(runs, lambda item: item[0] >= level):
        part = list(group)
        result += part[::-1] if inside else part
    return result


def _levels(clusters: list[str]) -> list[int]:
    """The embedding level of each cluster; odd ones are from right to left."""
    kinds = [_direction(cluster) for cluster in clusters]
    strong = [kind for kind in kinds if kind in "LR"]
    base = strong[0] if strong else "L"
    last = base  # of the last letter
    for i, kind in enumerate(kinds):
        if kind in "LR":
            last = kind
        elif kind == "N" and last == "L" and base == "L":
            kinds[i] = "L"  # a number in text from left to right
    levels = []
    for i, kind in enumerate(kinds):
        resolved = _resolve(kinds, i, base) if kind == " " else kind
        if resolved == "R":
            levels.append(1)
        else:
            levels.append(0 if resolved == base else 2)
    return levels


def _resolve(kinds: list[str], i: int, base: str) -> str:
    """The direction of a space or sign: that of its neighbours if they agree, else the line's."""
    before = next((kind for kind in kinds[i::-1] if kind != " "), base)
    after = next((kind for kind in kinds[i:] if kind != " "), base)
    before, after = ("R" if kind == "N" else kind for kind in (before, after))
    return before if before == after else base


def _direction(cluster: str) -> str:
    """L or R of a letter, N of a number, a space of all else, which takes that of its place."""
    kind = unicodedata.bidirectional(cluster[0])
    return {"L": "L", "R": "R", "AL": "R", "EN": "N", "AN": "N"}.get(kind, " ")
