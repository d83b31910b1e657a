"""`unclip edit`: text diffs, pictures changed as two captions differ (unCLIP section 3.3)."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unclip_pl.cli.options import read_file
from unclip_pl.cli.pictures import enlarge_like, require_files
from unclip_pl.cli.progress import step_bar
from unclip_pl.cli.session import Session, SessionOptions
from unclip_pl.utils.commands import UsageError
from unclip_pl.utils.errors import UserError


class Edit(NamedTuple):
    """One picture, and the captions to go from and to."""

    path: Path
    source: str
    target: str


def edit(
    images: Sequence[Path] = (),
    *,
    from_: str = "a photo",
    to: str | None = None,
    theta: Sequence[str] | None = None,
    file: Path | None = None,
    options: SessionOptions,
) -> None:
    """Change a picture as the difference of two captions says.

    Args:
        images: a picture of any size (its centre square is taken), or a latent that `unclip
            invert` wrote
        from_: what the picture is; "" leaves it out
        to: what it shall be
        theta: how far to go, 0 to 1: numbers, or a range for five of them; by default 0..0.5
        file: a UTF-8 file of edits, one per line: picture, from, to, with tabs between; pictures
            are looked for next to the file
        options: what draws, from which seed and where to
    """
    thetas = [value for word in theta or ("0..0.5",) for value in parse_range(word)]
    edits = [Edit(path, from_, to or "") for path in images]
    if edits and to is None:
        raise UserError("There is no --to: say what the picture shall be.")
    if file:
        edits += read_edits(file)
    check_edits(edits)
    require_files((one.path for one in edits), latents=True)
    session = Session(options)
    import torch

    from unclip_pl.manipulate import text_diff

    steps = torch.tensor(thetas)
    paths = dict.fromkeys(one.path for one in edits)
    latents = {path: session.load_latent(path) for path in paths}
    rows, labels = [], []
    for number, one in enumerate(edits):
        original, latent = latents[one.path]
        sampling = session.inversion_sampling(latent)
        count = len(thetas)
        source = [one.source] * count if one.source.strip() else None
        target = [one.target] * count
        with step_bar(f"{one.path.name}: {one.target}") as callback:
            repeated = latent[[0] * count]
            drawn = text_diff(session.unclip, repeated, source, target, steps, sampling, callback)
        drawn = session.upsample_to_size(drawn, [options.seed] * count)
        name = one.path.stem if len(edits) == 1 else f"{number:02d}-{one.path.stem}"
        settings = f'edit, from "{one.source}" to "{one.target}", {sampling}'
        for value, image in zip(thetas, drawn):
            session.save(image, f"{name}-theta{value:g}", source=one.path.name, unclip=settings)
        rows.append(torch.cat([enlarge_like(original, drawn), drawn]))
        labels.append(f"{one.source} > {one.target}" if source else f"> {one.target}")
    heads = ["original", *(f"theta {value:g}" for value in thetas)]
    session.save_figure("edits", rows, labels, heads)


def parse_range(text: str) -> list[float]:
    """A number, "0.25", as a list of one; a range, "0..0.5", as five numbers from 0 to 0.5."""
    first, dots, last = text.partition("..")
    try:
        start = float(first)
        end = float(last) if dots else start
    except ValueError:
        raise UsageError(
            f"--theta: {text} is neither a number nor a range: write 0.25 or 0..0.5."
        ) from None
    for value in (start, end):
        if not 0 <= value <= 1:
            raise UserError(f"--theta is {value}: give 0 (where it starts) to 1 (all the way).")
    return [start + (end - start) * k / 4 for k in range(5)] if dots else [start]


def read_edits(file: Path) -> list[Edit]:
    """The edits of a file with lines of picture, from and to, with tabs between.

    Raises:
        UserError: the file cannot be read, or a line has not three parts.
    """
    edits = []
    lines = read_file(file, "edits").splitlines()
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        if len(row) != 3:
            raise UserError(
                f"Line {number} of {file} has {len(row)} parts: write picture, from and to with "
                "tabs between."
            )
        picture, source, target = (part.strip() for part in row)
        edits.append(Edit(file.parent / picture, source, target))
    return edits


def check_edits(edits: list[Edit]) -> None:
    """Raise a UserError if there is no edit, or one that goes nowhere."""
    if not edits:
        raise UserError(
            "There is no picture to edit: name one with --from and --to, or a file with one edit "
            "per line (--file)."
        )
    for one in edits:
        if not one.target.strip():
            raise UserError(
                f"The caption to go to is empty for {one.path}: say what the picture shall be."
            )
        if one.source.strip() == one.target.strip():
            raise UserError(
                f'From and to are the same for {one.path} ("{one.target}"), which is no change: '
                "make them differ."
            )
