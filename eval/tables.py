"""The tables of `eval.compare`: a line per arm, with what reaches the decoder, and the floor."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eval import report
from eval.arms import TITLES
from eval.common import Figures
from eval.floor import Floor
from eval.judge import shown
from eval.metrics import FRECHET
from eval.paired import Difference

BRACKETS = "In round brackets: the interval of 95 % holds 0."
AT_FLOOR = (
    "At the floor: as near to the reference as other real pictures are, at the same number of "
    "pictures. By that figure such sets cannot be told from real ones, nor is one of them better."
)
AT_EDGE = "* The best value is at the edge of its grid: a better one may lie beyond."


class Section(NamedTuple):
    """A table with its title."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        return f"### {self.title}\n\n{report.markdown(self.headers, self.rows)}"

    @property
    def html(self) -> str:
        return report.heading(self.title) + report.table(self.headers, self.rows)


def headers(frechet: str) -> list[str]:
    """Of the table of figures."""
    return ["", "the decoder sees", "guidance", *shown(frechet).values()]


def row(arm: str, sees: str, figures: Figures, frechet: str) -> list[str]:
    """One arm's line of a table.

    Args:
        figures: with `guidance_scale`, perhaps `prior_guidance_scale`, and the names of those that
            are `at_edge` of their grids and `at_floor`.
    """

    def scale(name: str) -> str:
        return f"{figures[name]:g}" + ("*" if name in figures["at_edge"] else "")

    def floored(name: str, text: str) -> str:
        return f"{text}, at the floor" if name in figures["at_floor"] else text

    guidance = scale("guidance_scale")
    if "prior_guidance_scale" in figures:
        guidance += f", prior {scale('prior_guidance_scale')}"
    low, high = figures[f"{frechet}_low"], figures[f"{frechet}_high"]
    kid = f"{1000 * figures['kid']:.4g} ± {1000 * figures['kid_se']:.2g}"
    return [
        TITLES[arm],
        sees,
        guidance,
        floored(frechet, f"{figures[frechet]:.4g} [{low:.4g}, {high:.4g}]"),
        floored("kid", kid),
        score(figures),
        f"{figures['precision']:.3f}",
        f"{figures['recall']:.3f}",
        f"{figures['r1']:.1%}",
    ]


def score(figures: Figures) -> str:
    """The CLIP score with its interval."""
    low, high = figures["clip_score_low"], figures["clip_score_high"]
    return f"{figures['clip_score']:.2f} [{low:.2f}, {high:.2f}]"


def real_row(real: Figures) -> list[str]:
    """The captions' own pictures, which have no distance from themselves."""
    return ["real pictures", "-", "-", "-", "-", score(real), "-", "-", f"{real['r1']:.1%}"]


def floor_row(floor: Floor | None, frechet: str) -> list[str]:
    """Real pictures against other real ones; dashes where there are too few.

    It goes under any table whose fourth column is the Frechet distance and whose fifth is KID.
    """
    cells = ["-", "-"]
    if floor is not None:
        cells = [
            f"{factor * floor.mean[name]:.4g}, up to {factor * floor.high[name]:.4g}"
            for name, factor in ((frechet, 1), ("kid", 1000))
        ]
    return ["floor: real against other real pictures", "-", "-", *cells, "-", "-", "-", "-"]


def difference_headers(baseline: str, what: str, frechet: str) -> list[str]:
    """Of the table of differences from an arm."""
    figures = (FRECHET[frechet], "KID x 1000", "CLIP score", "own caption first, points")
    return [f"less the {baseline}: {what}", *figures]


def difference_row(arm: str, differences: Mapping[str, Difference], frechet: str) -> list[str]:
    """One arm's line of the table of differences; what is not sure stands in brackets."""

    def cell(name: str, digits: int, factor: float = 1.0) -> str:
        one = differences[name]
        if one.at_floor:
            return "both at the floor"
        value, low, high = (factor * number for number in (one.value, one.low, one.high))
        text = f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        return text if one.sure else f"({text})"

    return [
        TITLES[arm],
        cell(frechet, 2),
        cell("kid", 1, 1000),
        cell("clip_score", 2),
        cell("r1", 1, 100),
    ]


def notes(sections: Sequence[Section]) -> list[str]:
    """What the signs in the tables mean, those that occur."""
    cells = [str(cell) for section in sections for line in section.rows for cell in line]
    found = [BRACKETS] if any(cell.startswith("(") for cell in cells) else []
    found += [AT_FLOOR] if any("at the floor" in cell for cell in cells) else []
    return found + ([AT_EDGE] if any("*" in cell for cell in cells) else [])
