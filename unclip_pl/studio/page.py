"""The page in the browser: tabs over the engine, and below them everybody's own pictures."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr

from unclip_pl.studio import html, tabs
from unclip_pl.studio.album import Album
from unclip_pl.studio.engine import Engine
from unclip_pl.studio.inputs import DroppedFile
from unclip_pl.studio.picture_files import MOST_BYTES
from unclip_pl.studio.restore import picked, wire_restoring
from unclip_pl.studio.tabs import Tab
from unclip_pl.studio.training import training
from unclip_pl.utils.errors import UserError

FONT = ("system-ui", "sans-serif")
"""Of whoever looks: none is loaded."""
UPLOADS_KEPT = (600, 2 * 60 * 60)
"""Seconds between two looks for old uploads, and for which they are kept."""
HINT = "Pictures that you draw come here. Choose one to see its settings and to send it to a tab."
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
FROM_EMBEDDINGS = "Vary", "Interpolate", "Edit", "Components", "Typography"
"""Tabs that a decoder of captions only has no use for."""
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
    with gr.Blocks(
        title="unCLIP studio", analytics_enabled=False, fill_width=True, delete_cache=UPLOADS_KEPT
    ) as blocks:
        gr.Markdown("# unCLIP studio")
        made: dict[str, Tab] = {}
        with gr.Tabs() as all_tabs:
            for name, make in TABS.items():
                if name == "Upsample" and len(engine.models.sizes) == 1:
                    continue  # there are no upsamplers
                if name in FROM_EMBEDDINGS and not engine.models.takes_embeddings:
                    continue
                with gr.Tab(name, id=name):
                    made[name] = make(engine)
            if runs is not None:
                with gr.Tab("Training", id="Training") as tab:
                    training(engine, runs, tab)
        gr.Markdown("## Your pictures")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                said = gr.HTML(html.said(HINT))
                gallery = gr.Gallery(
                    label="Your pictures",
                    show_label=False,
                    columns=6,
                    height=360,
                    object_fit="contain",
                    interactive=False,
                    visible=False,  # until there is one
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
            with gr.Column(min_width=300):
                chosen = gr.State(None)  # the path of a picture
                with gr.Column(visible=False) as details:
                    settings = gr.HTML("", elem_classes="chosen")
                    targets = [said for said, (tab, _) in TARGETS.items() if tab in made]
                    target = gr.Dropdown(targets, value=targets[0], label="Send the picture to")
                    with gr.Row():
                        send = gr.Button("Send", min_width=80)
                        restore = gr.Button("Use its settings", min_width=140)
                dropped = DroppedFile(
                    label="Drop a PNG to use its settings",
                    file_types=[".png"],
                    type="binary",
                    height=170,
                )
        # what `delete_cache` leaves alone, however old it is
        gallery.keep_in_cache = album  # type: ignore[assignment]
        for tab in made.values():
            tab.wire(album, gallery)
        wire_gallery(album, gallery, chosen, said, settings, details)
        wire_sending(album, made, all_tabs, chosen, target, send, said)
        wire_restoring(album, made, all_tabs, chosen, restore, dropped, said)

        async def leave(request: gr.Request) -> None:
            person = str(request.session_hash)
            for tab in made.values():
                engine.cancel_all(f"{person}/{tab.form.kind.__name__}")
            await asyncio.to_thread(album.forget, person)

        blocks.unload(leave)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def wire_gallery(
    album: Album, gallery: Any, chosen: Any, said: Any, settings: Any, details: Any
) -> None:
    """Choosing a picture shows its settings, and what can be done with it."""

    def choose(event: gr.SelectData, request: gr.Request) -> list[Any]:
        prints = album.of(str(request.session_hash))
        if event.index >= len(prints):
            text = html.failed("This picture is gone: choose another.")
            return [None, text, "", gr.update(visible=False)]
        one = prints[event.index]
        shown = html.facts(one.settings)
        return [str(one.path), html.said(one.label), shown, gr.update(visible=True)]

    gallery.select(
        choose,
        None,
        [chosen, said, settings, details],
        show_progress="hidden",
        api_visibility="private",
    )


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
