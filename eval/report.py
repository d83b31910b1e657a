"""One self-contained HTML page a run: tables, plots as SVG, pictures as data URIs, settings, versions, the command. And the same into TensorBoard."""

import base64
import html
import io
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip_pl import __version__
from unclip_pl.utils.files import atomic_file

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # Okabe & Ito: told apart by everyone
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 2px solid #888 }
img { max-width: 100%; image-rendering: auto } svg { margin: .5em } pre { background: #f4f4f4; padding: .8em; overflow-x: auto }
"""
Points = Sequence[tuple[float, float]]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    lines = [headers, [":--", *["--:"] * (len(headers) - 1)], *rows]
    return (
        "\n".join(
            "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
            for line in lines
        )
        + "\n"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML."""
    lines = [("th", headers), *(("td", row) for row in rows)]
    return f"<table>{''.join(_row(tag, cells) for tag, cells in lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def picture(image: Image.Image, title: str = "") -> str:
    """An image inside the page."""
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return f'<img alt="{html.escape(title)}" title="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def plot(series: Mapping[str, Points], x: str, y: str, width: int = 420, height: int = 300) -> str:
    """Lines through points as an SVG of its own, with axes, ticks and a legend."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, right, top, bottom = 58, 12, 12, 44 + 17 * len(series)
    (low_x, high_x), (low_y, high_y) = (_span([point[axis] for point in points]) for axis in (0, 1))

    def at_x(value: float) -> float:
        return left + (value - low_x) / (high_x - low_x) * (width - left - right)

    def at_y(value: float) -> float:
        return height - 44 - (value - low_y) / (high_y - low_y) * (height - 44 - top)

    whole = height + bottom - 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{whole}" viewBox="0 0 {width} {whole}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for value in _ticks(low_x, high_x):
        parts.append(
            f'<line x1="{at_x(value):.1f}" x2="{at_x(value):.1f}" y1="{top}" y2="{height - 44}" stroke="#e5e5e5"/>'
        )
        parts.append(
            f'<text x="{at_x(value):.1f}" y="{height - 30}" text-anchor="middle">{value:g}</text>'
        )
    for value in _ticks(low_y, high_y):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{at_y(value):.1f}" y2="{at_y(value):.1f}" stroke="#e5e5e5"/>'
        )
        parts.append(
            f'<text x="{left - 5}" y="{at_y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 14}" text-anchor="middle">{html.escape(x)}</text>'
    )
    middle = (top + height - 44) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{html.escape(y)}</text>'
    )
    for i, (name, line) in enumerate(series.items()):
        colour, below = COLOURS[i % len(COLOURS)], height + 4 + 17 * i
        dots = [(at_x(a), at_y(b)) for a, b in line]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in dots)}"/>'
        )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.8" fill="{colour}"/>' for a, b in dots]
        parts.append(
            f'<line x1="{left}" x2="{left + 18}" y1="{below}" y2="{below}" stroke="{colour}" stroke-width="1.8"/>'
        )
        parts.append(f'<text x="{left + 24}" y="{below + 4}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest with a little room; never of no width."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(float(power * factor) for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [
        round(k * step, 12) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)
    ]


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    packages = {
        name: metadata.version(name)
        for name in ("torch", "torchmetrics", "open_clip_torch", "numpy", "pillow")
    }
    return {"unclip_pl": __version__, "Python": platform.python_version(), **packages}


def command_line() -> str:
    """The command that runs now, as one would type it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return shlex.join(["python", *(["-m", spec.name] if spec else [sys.argv[0]]), *sys.argv[1:]])


def write_page(path: Path, title: str, parts: Sequence[str], settings: Mapping[str, Any]) -> Path:
    """The page, whole or not at all; settings, versions and the command stand at its end."""
    rows = [[name, str(value)] for name, value in {**settings, **versions()}.items()]
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            *parts,
            heading("Settings"),
            table(["", ""], rows),
            f"<pre>{html.escape(command_line())}</pre>",
        ]
    )
    with atomic_file(path, "w") as file:
        file.write(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n{body}\n</html>\n'
        )
    return path


def write_tensorboard(
    folder: Path, scalars: Mapping[str, Points], pictures: Mapping[str, Image.Image] | None = None
) -> None:
    """Scalars (step, value) and pictures as TensorBoard's events; a line's x is its step, times 100 where it is no whole number."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, line in scalars.items():
            factor = 1 if all(float(step).is_integer() for step, _ in line) else 100
            for step, value in line:
                writer.add_scalar(name, value, round(step * factor))
        for name, image in (pictures or {}).items():
            writer.add_image(name, np.asarray(image.convert("RGB")), dataformats="HWC")
