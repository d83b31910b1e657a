"""The tab of training runs: their losses and pictures, live, and the newest checkpoint of each."""

from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from unclip_pl.studio import html
from unclip_pl.studio.picture_files import read_picture
from unclip_pl.studio.runs import Run, Runs
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

SECONDS = 5
"""Between two looks at a run."""


def training(folder: Path) -> None:
    """The tab, for the runs of a folder."""
    runs = Runs(folder)
    names = runs.names()
    with gr.Row():
        chosen = gr.Dropdown(names, value=names[0] if names else None, label="Run")
        curves = gr.Dropdown([], multiselect=True, label="Curves")
    status = gr.HTML(html.said("" if names else "There are no runs yet."))
    plot = gr.LinePlot(
        frame([], None),
        x="step",
        y="value",
        color="curve",
        title="What was logged",
        height=320,
    )
    pictures = gr.HTML("", elem_classes="run-pictures")
    outputs = [chosen, curves, status, plot, pictures]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def look(name: str | None, asked: list[str]) -> list[Any]:
        there = runs.names()
        name = name if name in there else (there[0] if there else None)
        if name is None:
            return [gr.update(choices=[]), *[gr.skip()] * 4]
        try:
            run = runs.read(name)
        except UserError as error:
            return [gr.update(choices=there), gr.skip(), html.failed(str(error)), *[gr.skip()] * 2]
        asked = [tag for tag in asked if tag in run.curves] or losses(run)
        return [
            gr.update(choices=there, value=name),
            gr.update(choices=list(run.curves), value=asked),
            html.said(standing(run)),
            frame(asked, run),
            shown(run),
        ]

    inputs = [chosen, curves]
    gr.Timer(SECONDS).tick(look, inputs, outputs, **quiet)
    gr.on([chosen.input, curves.input], look, inputs, outputs, **quiet)


def losses(run: Run) -> list[str]:
    """The curves that are shown at first."""
    return [tag for tag in run.curves if "loss" in tag][:6] or list(run.curves)[:6]


def frame(tags: list[str], run: Run | None) -> pd.DataFrame:
    """Curves as Gradio plots them."""
    curves = {} if run is None else run.curves
    rows = [(step, value, tag) for tag in tags for step, value in curves[tag]]
    return pd.DataFrame(rows, columns=["step", "value", "curve"])


def standing(run: Run) -> str:
    """How far a run is, and what to try."""
    if run.checkpoint is None:
        return f"{run.name}: step {run.step}, no checkpoint yet."
    return f"{run.name}: step {run.step}. Newest checkpoint: {run.checkpoint}"


def shown(run: Run) -> str:
    """The pictures of the newest validation."""
    if run.picture is None:
        return html.said("No pictures yet: they come with each validation.")
    try:
        image = read_picture(run.picture.read_bytes())
    except (UserError, OSError):  # it is written at this moment
        return html.said("The newest pictures cannot be read yet.")
    return html.wide(to_uint8(image), f"Pictures of {run.name}, {run.picture.stem}")
