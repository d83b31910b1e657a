"""The tables of `eval.compare` and `eval.sweep`: a line per condition or setting, and the floor."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eval import report
from eval.commands import Figures
from eval.conditioning import TITLES
from eval.evaluator import metric_titles
from eval.floor import Floor
from eval.metrics import FRECHET
from eval.paired import Difference

BRACKETS = "In round brackets: the interval of 95 % holds 0."
AT_FLOOR = (
    "At the floor: as near to the reference as other real images are, at the same number of "
    "images. That figure cannot distinguish such sets from real ones, nor is one of them better. "
    "A difference is left out as well where one set is at the floor and the interval of the other "
    "reaches it."
)
AT_EDGE = (
    "* The best value is at the edge of its grid: a better one may lie beyond, except below 1, "
    "which is no guidance."
)

FLOOR_LINE = "floor: real images are below"
FLOOR_TITLE = "floor: real against other real images"


class Section(NamedTuple):
    """A table with its title."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        return f"### {self.title}\n\n{report.markdown(self.headers, self.rows)}"


def body(sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The Markdown of tables, and below them the notes and what the signs in the tables mean."""
    tables = "\n".join(section.markdown for section in sections)
    return tables + "".join(f"\n{text}\n" for text in [*footnotes(sections), *notes])


def condition_headers(frechet: str) -> list[str]:
    """Of the table of figures; the Frechet distance has the key `frechet`."""
    return ["", "the decoder sees", "guidance", *metric_titles(frechet).values()]


def condition_row(condition: str, inputs: str, figures: Figures, frechet: str) -> list[str]:
    """One condition's line of the table of figures.

    Args:
        condition: its name, a key of `TITLES`.
        inputs: what reaches the decoder, in words.
        figures: with `guidance_scale`, perhaps `prior_guidance_scale`, and the names of those that
            are `at_edge` of their grids and `at_floor`.
        frechet: the key of the Frechet distance.
    """

    def scale(name: str) -> str:
        return f"{figures[name]:g}" + ("*" if name in figures["at_edge"] else "")

    def with_floor(name: str, text: str) -> str:
        return f"{text}, at the floor" if name in figures["at_floor"] else text

    guidance = scale("guidance_scale")
    if "prior_guidance_scale" in figures:
        guidance += f", prior {scale('prior_guidance_scale')}"
    value, low, high = (number(figures[f"{frechet}{end}"]) for end in ("", "_low", "_high"))
    kid, error = (number(1000 * figures[name]) for name in ("kid", "kid_se"))
    return [
        TITLES[condition],
        inputs,
        guidance,
        with_floor(frechet, f"{value} [{low}, {high}]"),
        with_floor("kid", f"{kid} ± {error}"),
        clip_score(figures),
        f"{figures['precision']:.3f}",
        f"{figures['recall']:.3f}",
        f"{figures['r1']:.1%}",
    ]


def number(value: float) -> str:
    """Four digits, and more where there are more before the point: no exponent above 1."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clip_score(figures: Figures) -> str:
    """The CLIP score with its interval."""
    low, high = figures["clip_score_low"], figures["clip_score_high"]
    return f"{figures['clip_score']:.2f} [{low:.2f}, {high:.2f}]"


def real_row(real: Figures) -> list[str]:
    """The captions' own pictures, which have no distance from themselves."""
    return ["real pictures", "-", "-", "-", "-", clip_score(real), "-", "-", f"{real['r1']:.1%}"]


def floor_row(floor: Floor | None, frechet: str) -> list[str]:
    """Real images against other real ones; dashes where there are too few.

    It goes under any table whose fourth column is the Frechet distance and whose fifth is KID.
    """
    return [FLOOR_TITLE, "-", "-", *floor_cells(floor, frechet), "-", "-", "-", "-"]


def floor_cells(floor: Floor | None, frechet: str) -> list[str]:
    """The Frechet distance `frechet` and KID of real images, or dashes."""
    if floor is None:
        return ["-", "-"]
    return [
        f"{number(factor * floor.mean[name])}, up to {number(factor * floor.high[name])}"
        for name, factor in ((frechet, 1), ("kid", 1000))
    ]


def floor_line(floor: Floor | None, figure: str, points: report.Points) -> dict[str, report.Points]:
    """The level that real images stay below, as a line of a plot; none without a floor.

    Args:
        floor: of sets of the size of those in the plot.
        figure: what is plotted.
        points: of any line of the plot, from the first to the last x.
    """
    if floor is None or figure not in floor.high:
        return {}
    xs = [x for x, _ in points]
    return {FLOOR_LINE: [(x, floor.high[figure]) for x in (min(xs), max(xs))]}


def difference_headers(baseline: str, frechet: str) -> list[str]:
    """Of the table of differences from the condition `baseline`."""
    figures = (FRECHET[frechet], "KID x 1000", "CLIP score", "own caption first, points")
    return [f"this condition minus the {baseline}", *figures]


def difference_row(
    condition: str, differences: Mapping[str, Difference], frechet: str
) -> list[str]:
    """One condition's line of the table of differences; what is not sure stands in brackets."""

    def cell(name: str, digits: int, factor: float = 1.0) -> str:
        difference = differences[name]
        if difference.at_floor:
            return "at the floor"
        numbers = (difference.value, difference.low, difference.high)
        value, low, high = (factor * number for number in numbers)
        text = f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        return text if difference.sure else f"({text})"

    return [
        TITLES[condition],
        cell(frechet, 2),
        cell("kid", 1, 1000),
        cell("clip_score", 2),
        cell("r1", 1, 100),
    ]


def footnotes(sections: Sequence[Section]) -> list[str]:
    """What the signs in the tables mean, for those that occur."""
    cells = [str(cell) for section in sections for line in section.rows for cell in line]
    notes = []
    if any(cell.startswith("(") for cell in cells):
        notes.append(BRACKETS)
    if any("at the floor" in cell for cell in cells):
        notes.append(AT_FLOOR)
    if any("*" in cell for cell in cells):
        notes.append(AT_EDGE)
    return notes
