"""The tab of training runs: their losses and pictures, live, and the newest checkpoint of each."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from unclip_pl.studio import html
from unclip_pl.studio.engine import Engine, State
from unclip_pl.studio.picture_files import read_picture
from unclip_pl.studio.plot import plot
from unclip_pl.studio.requests import UseWeights
from unclip_pl.studio.runs import Run, Runs
from unclip_pl.studio.tabs import follow
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

SECONDS = 5
"""Between two looks at a run."""


def training(engine: Engine, folder: Path, tab: gr.Tab) -> None:
    """What is in the tab, for the runs of a folder; they are read when it is opened, and again."""
    runs = Runs(folder)
    names = runs.names()
    with gr.Row():
        first = names[0] if names else None
        chosen = gr.Dropdown(names, value=first, label="Run", min_width=240)
        curves = gr.Dropdown([], multiselect=True, label="Curves", min_width=240, scale=2)
    status = gr.HTML(html.said("Reading the runs." if names else "There are no runs yet."))
    weights = gr.HTML(html.said(engine.models.standing()))
    with gr.Row():
        use = gr.Button("Draw with its newest checkpoint", min_width=240)
        back = gr.Button("Draw with the first weights again", min_width=240)
    loading = gr.HTML("")
    lines = gr.HTML("")
    pictures = gr.HTML("", elem_classes="run-pictures")
    outputs = [chosen, curves, status, lines, pictures, weights]
    wire_weights(engine, runs, chosen, use, back, loading, weights)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def look(name: str | None, asked: list[str]) -> list[Any]:
        there = runs.names()
        name = name if name in there else (there[0] if there else None)
        if name is None:
            return [gr.update(choices=[]), *[gr.skip()] * 5]
        try:
            run = runs.read(name)
        except UserError as error:
            return [gr.update(choices=there), gr.skip(), html.failed(str(error)), *[gr.skip()] * 3]
        asked = [tag for tag in asked if tag in run.curves] or losses(run)
        return [
            gr.update(choices=there, value=name),
            gr.update(choices=list(run.curves), value=asked),
            html.said(standing(run)),
            plot({tag: run.curves[tag] for tag in asked}),
            shown(run),
            html.said(engine.models.standing()),
        ]

    inputs = [chosen, curves]
    gr.Timer(SECONDS).tick(look, inputs, outputs, **quiet)
    tab.select(look, inputs, outputs, **quiet)
    gr.on([chosen.input, curves.input], look, inputs, outputs, **quiet)


def wire_weights(
    engine: Engine, runs: Runs, chosen: Any, use: Any, back: Any, loading: Any, weights: Any
) -> None:
    """The buttons load weights for everybody, through the queue."""

    async def load(request: gr.Request, run: str | None) -> AsyncIterator[tuple[Any, Any]]:
        owner = f"{request.session_hash}/{UseWeights.__name__}"
        try:
            folder = None if run is None else await asyncio.to_thread(runs.folder_of, run)
            ticket = engine.submit(UseWeights(run=folder), owner)
        except UserError as error:
            yield html.failed(str(error)), gr.skip()
            return
        async for status, _ in follow(engine, ticket):
            yield status, gr.skip()
        if ticket.state is State.DONE:
            yield "", html.said(ticket.notes[0])

    async def newest(request: gr.Request, name: str | None) -> AsyncIterator[tuple[Any, Any]]:
        async for shown in load(request, name or ""):
            yield shown

    async def first(request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        async for shown in load(request, None):
            yield shown

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    use.click(newest, chosen, [loading, weights], **quiet)
    back.click(first, None, [loading, weights], **quiet)


def losses(run: Run) -> list[str]:
    """The curves that are shown at first."""
    return [tag for tag in run.curves if tag.endswith("loss")] or list(run.curves)[:6]


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
