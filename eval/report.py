"""Reports: tables in Markdown, curves as a PNG, and both for TensorBoard."""

import io
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_pl import __version__
from unclip_pl.utils.outputs import OutputFolder

Points = Sequence[tuple[float, float]]
"""(x, y) of each point of a line."""
COLUMNS = 3
"""Panels next to each other."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito: colour-blind readers can tell them apart."""


class Panel(NamedTuple):
    """One pair of axes with lines by name."""

    x: str
    y: str
    lines: Mapping[str, Points]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    lines = [headers, [":--", *["--:"] * (len(headers) - 1)], *rows]
    return "".join(_markdown_line(line) for line in lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    names = ("torch", "torchmetrics", "open_clip_torch", "numpy", "pillow")
    packages = {name: metadata.version(name) for name in names}
    return {"unclip_pl": __version__, "Python": platform.python_version(), **packages}


def command_line() -> str:
    """The command that runs now, as one would type it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def write_report(
    out: OutputFolder,
    name: str,
    title: str,
    body: str,
    pictures: Mapping[str, Path],
    settings: Mapping[str, Any],
) -> Path:
    """Write a report in Markdown, whole or not at all, and return its path.

    Args:
        out: the folder.
        name: of the file.
        title: its heading.
        body: Markdown, between the title and the pictures.
        pictures: by title the files in the same folder.
        settings: go into a table at the end, with versions and the command.
    """
    shown = "".join(f"\n## {name}\n\n![{name}]({file.name})\n" for name, file in pictures.items())
    rows = [[name, _plain(value)] for name, value in {**settings, **versions()}.items()]
    table = markdown(["setting", "value"], rows)
    text = f"# {title}\n\n{body}{shown}\n## Settings\n\n{table}\n```\n{command_line()}\n```\n"
    return out.write(name, text.encode())


def _plain(value: Any) -> str:
    """A setting as one reads it: a dict as its names and values, None and empty lists as a dash."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "-"
    return "-" if value is None else str(value)


def write_curves(out: OutputFolder, name: str, panels: Sequence[Panel]) -> Path:
    """Write one PNG with a plot for each panel, whole or not at all; returns its path.

    A line has the same colour in all panels, and the legend is below them.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    colours: dict[str, str] = {}
    handles: dict[str, Any] = {}
    for axes, panel in zip(all_axes, panels, strict=False):
        for line, points in panel.lines.items():
            colour = colours.setdefault(line, COLOURS[len(colours) % len(COLOURS)])
            x, y = zip(*points, strict=True)
            (handles[line],) = axes.plot(x, y, color=colour, marker="o", markersize=4, label=line)
        axes.set(xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.3)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return out.write(name, content.getvalue())


def write_tensorboard(
    out: OutputFolder,
    report: Path,
    scalars: Mapping[str, Points],
    pictures: Mapping[str, Image.Image] | None = None,
) -> None:
    """Lines and pictures as TensorBoard's events, in a folder with the name of their report.

    They are written with a new report only. The x of a point is its step, times 100 where a line
    has one that is no whole number.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = out.folder / "tensorboard" / report.stem
    if out.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        return
    with SummaryWriter(str(folder)) as writer:
        for name, points in scalars.items():
            whole = all(float(x).is_integer() for x, _ in points)
            for x, y in points:
                writer.add_scalar(name, y, round(x if whole else 100 * x))
        for name, image in (pictures or {}).items():
            writer.add_image(name, np.asarray(image.convert("RGB")), dataformats="HWC")
