"""The page in the browser: tabs over the engine, and below them everybody's own pictures."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr

from unclip_pl.studio import html, tabs
from unclip_pl.studio.album import Album, Print
from unclip_pl.studio.engine import Engine
from unclip_pl.studio.picture_files import MOST_BYTES, settings_in
from unclip_pl.studio.tabs import Tab
from unclip_pl.studio.training import training
from unclip_pl.utils.errors import UserError

FONT = ("system-ui", "sans-serif")
"""Of whoever looks: none is loaded."""
TABS: dict[str, Callable[[Engine], Tab]] = {
    "Create": tabs.create,
    "Vary": tabs.vary,
    "Interpolate": tabs.interpolate,
    "Edit": tabs.edit,
    "Inpaint": tabs.inpaint,
    "Upsample": tabs.upsample,
    "Components": tabs.pca,
    "Typography": tabs.typographic,
}
TARGETS = {
    "Vary": ("Vary", "image"),
    "Interpolate, from": ("Interpolate", "image"),
    "Interpolate, to": ("Interpolate", "other"),
    "Edit": ("Edit", "image"),
    "Inpaint": ("Inpaint", "painted"),
    "Upsample": ("Upsample", "image"),
    "Components": ("Components", "image"),
    "Typography": ("Typography", "image"),
}
"""Where a picture can be sent: by what is said, the tab and the field of its form."""


def page(engine: Engine, album: Album, runs: Path | None = None) -> gr.Blocks:
    """The page.

    Args:
        engine: what draws.
        album: keeps the pictures.
        runs: a folder of training runs to show in a tab; None: there is no such tab.
    """
    with gr.Blocks(title="unCLIP studio", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown("# unCLIP studio")
        made: dict[str, Tab] = {}
        with gr.Tabs() as all_tabs:
            for name, make in TABS.items():
                if name == "Upsample" and len(engine.models.sizes) == 1:
                    continue  # there are no upsamplers
                with gr.Tab(name, id=name):
                    made[name] = make(engine)
            if runs is not None:
                with gr.Tab("Training", id="Training"):
                    training(runs)
        gr.Markdown("## Your pictures")
        with gr.Row():
            with gr.Column(scale=2):
                gallery = gr.Gallery(
                    label="Your pictures",
                    show_label=False,
                    columns=6,
                    height=360,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
            with gr.Column():
                chosen = gr.State(None)  # the path of a picture
                said = gr.HTML(html.said("Choose a picture to see its settings and to send it on."))
                settings = gr.JSON(label="Settings", visible=False)
                targets = [said for said, (tab, _) in TARGETS.items() if tab in made]
                target = gr.Dropdown(targets, value=targets[0], label="Send the picture to")
                with gr.Row():
                    send = gr.Button("Send")
                    restore = gr.Button("Use its settings")
                dropped = gr.File(
                    label="Or drop a PNG that was made here, to use its settings",
                    file_types=[".png"],
                    type="binary",
                    height=180,
                )
        for tab in made.values():
            tab.wire(album, gallery)
        wire_gallery(album, gallery, chosen, said, settings)
        wire_sending(album, made, all_tabs, chosen, target, send, said)
        wire_restoring(album, made["Create"], all_tabs, chosen, restore, dropped, said)

        async def leave(request: gr.Request) -> None:
            person = str(request.session_hash)
            for tab in made.values():
                engine.cancel_all(f"{person}/{tab.form.kind.__name__}")
            await asyncio.to_thread(album.forget, person)

        blocks.unload(leave)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def wire_gallery(album: Album, gallery: Any, chosen: Any, said: Any, settings: Any) -> None:
    """Choosing a picture shows its settings."""

    def choose(event: gr.SelectData, request: gr.Request) -> tuple[Any, str, Any]:
        prints = album.of(str(request.session_hash))
        if event.index >= len(prints):
            return None, html.failed("This picture is gone: choose another."), gr.skip()
        one = prints[event.index]
        return str(one.path), html.said(one.label), gr.update(value=one.settings, visible=True)

    gallery.select(
        choose, None, [chosen, said, settings], show_progress="hidden", api_visibility="private"
    )


def picked(album: Album, request: gr.Request, path: str | None) -> Print:
    """The chosen picture; a UserError where there is none."""
    for one in album.of(str(request.session_hash)):
        if str(one.path) == path:
            return one
    raise UserError("No picture is chosen: choose one of yours.")


def wire_sending(
    album: Album,
    made: dict[str, Tab],
    all_tabs: Any,
    chosen: Any,
    target: Any,
    send: Any,
    said: Any,
) -> None:
    """Sending puts the chosen picture into a field of another tab, and opens it."""
    names = [name for name, (tab, _) in TARGETS.items() if tab in made]
    fields = [made[TARGETS[name][0]].form.fields[TARGETS[name][1]] for name in names]

    def sent(request: gr.Request, path: str | None, where: str) -> list[Any]:
        try:
            one = picked(album, request, path)
        except UserError as error:
            return [html.failed(str(error)), gr.skip(), *[gr.skip() for _ in names]]
        tab, _ = TARGETS[where]
        values = [str(one.path) if name == where else gr.skip() for name in names]
        return [html.said(f"Sent to {where}."), gr.Tabs(selected=tab), *values]

    send.click(
        sent,
        [chosen, target],
        [said, all_tabs, *fields],
        show_progress="hidden",
        api_visibility="private",
    )


def wire_restoring(
    album: Album, create: Tab, all_tabs: Any, chosen: Any, restore: Any, dropped: Any, said: Any
) -> None:
    """The settings of a picture fill the form from which it came, if that is of captions."""
    form = create.form

    def filled(settings: dict[str, Any]) -> list[Any]:
        if settings.get("kind") != "create":
            raise UserError(
                f'These are settings of "{settings.get("kind")}", which begins with a picture: '
                "send the picture there instead."
            )
        values = form.values(settings)
        return [html.said("The settings are in Create."), gr.Tabs(selected="Create"), *values]

    def refused(error: UserError) -> list[Any]:
        return [html.failed(str(error)), gr.skip(), *[gr.skip() for _ in form.fields]]

    def of_chosen(request: gr.Request, path: str | None) -> list[Any]:
        try:
            return filled(picked(album, request, path).settings)
        except UserError as error:
            return refused(error)

    def of_file(data: bytes | None) -> list[Any]:
        try:
            return refused(UserError("")) if data is None else filled(settings_in(data))
        except UserError as error:
            return refused(error)

    outputs = [said, all_tabs, *form.components()]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    restore.click(of_chosen, chosen, outputs, **quiet)
    dropped.upload(of_file, dropped, outputs, **quiet)


def mount(app: Any, blocks: gr.Blocks) -> None:
    """Put the page at / of an application."""
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace")),
        css=html.STYLE,
    )
