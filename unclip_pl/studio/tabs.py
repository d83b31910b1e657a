"""The tabs of the page that draw: each is a form, its buttons, and what comes of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr
import torch
import torch.nn.functional as F

from unclip_pl.probe import paper_dimensions, paste_label
from unclip_pl.studio import html
from unclip_pl.studio.album import Album, Print
from unclip_pl.studio.engine import Engine, State, Ticket
from unclip_pl.studio.forms import AROUND, Form
from unclip_pl.studio.inputs import PaintedPicture, Picture
from unclip_pl.studio.picture_files import from_base64, read_picture
from unclip_pl.studio.requests import (
    PCA,
    Create,
    Edit,
    Inpaint,
    Interpolate,
    Typographic,
    Upsample,
    Vary,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

POLL_SECONDS = 0.05
Show = Callable[[Sequence[Print]], str]


class Tab:
    """A form, its buttons and what comes of it. Made inside of Gradio's tab; `wire` gives it life.

    Args:
        engine: what draws.
        form: the settings; those that are needed are there already, others may follow.
        button: what the button says.
        show: how finished pictures are shown.
    """

    def __init__(self, engine: Engine, form: Form, button: str, show: Show = html.pictures) -> None:
        self.engine, self.form, self.show = engine, form, show
        with gr.Row():
            self.button = gr.Button(button, variant="primary", scale=3, min_width=160)
            self.stop = gr.Button("Stop", scale=1, min_width=80)

    def output(self) -> None:
        """Where the pictures come: beside the form, on a phone right below its button."""
        with gr.Column(elem_classes="output"):
            self.status = gr.HTML(html.said("Nothing has been drawn yet."))
            self.live = gr.HTML("", elem_classes="live")

    def wire(self, album: Album, gallery: gr.Gallery) -> None:
        """Let the buttons do what they say; finished pictures go to the gallery as well."""
        name = self.form.kind.__name__

        async def run(request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
            person = str(request.session_hash)
            try:
                asked = await asyncio.to_thread(self.form.request, values)
                ticket = await asyncio.to_thread(self.engine.submit, asked, f"{person}/{name}")
            except UserError as error:
                yield html.failed(str(error)), gr.skip(), gr.skip()
                return
            async for status, live in follow(self.engine, ticket):
                yield status, live, gr.skip()
            if ticket.state is State.DONE:
                prints = await asyncio.to_thread(album.add, person, ticket)
                live = self.show(prints) + html.notes(ticket.notes)
                yield html.said(done(ticket)), live, shown_in_gallery(album.of(person))

        async def stop(request: gr.Request) -> None:
            self.engine.cancel_all(f"{request.session_hash}/{name}")

        triggers = [self.button.click]
        if "captions" in self.form.fields:
            triggers.append(self.form.fields["captions"].submit)
        gr.on(
            triggers,
            run,
            self.form.components(),
            [self.status, self.live, gallery],
            show_progress="hidden",
            api_visibility="private",
        )
        self.stop.click(stop, None, None, queue=False, api_visibility="private")


def shown_in_gallery(prints: Sequence[Print]) -> Any:
    """Pictures in Gradio's gallery, of which none is open: their numbers are new."""
    pictures = [(str(one.path), one.label) for one in prints]
    return gr.Gallery(pictures, selected_index=None, visible=True)


async def follow(engine: Engine, ticket: Ticket) -> AsyncIterator[tuple[Any, Any]]:
    """What to show of a ticket until it ends: (status, pictures), whenever something changes."""
    last: Any = None
    preview = None
    while not ticket.ended:
        place = engine.place(ticket)
        stand = (place, ticket.stage, ticket.step, id(ticket.preview))
        if stand != last:
            last = stand
            live: Any = gr.skip()
            if ticket.preview is not None and ticket.preview is not preview:
                preview = ticket.preview
                live = await asyncio.to_thread(html.previews, preview)
            yield standing(ticket, place), live
        await asyncio.sleep(POLL_SECONDS)
    if ticket.state is State.FAILED:
        yield html.failed(ticket.error), ""
    elif ticket.state is State.CANCELLED:
        yield html.said("Stopped."), ""


def standing(ticket: Ticket, place: int) -> str:
    """Where a ticket is, for people."""
    if place:
        ahead = "next" if place == 1 else f"number {place}"
        return html.progress(f"Waiting: {ahead} in the queue.", 0, 1)
    if not ticket.stage:
        return html.progress("Starting.", 0, 1)
    text = f"{ticket.stage.capitalize()}: step {ticket.step} of {ticket.steps}"
    return html.progress(text, ticket.step, ticket.steps)


def done(ticket: Ticket) -> str:
    """How long a finished ticket took, and with what."""
    took = {stage: seconds for stage, seconds in ticket.seconds.items() if seconds >= 0.05}
    parts = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in took.items())
    return f"Done: {parts}." if parts else "Done."


def two_columns() -> gr.Row:
    """Around a form and its pictures."""
    return gr.Row(elem_classes="form-and-pictures")


def create(engine: Engine) -> Tab:
    """Pictures from captions."""
    form = Form(Create, engine.models)
    with two_columns():
        with gr.Column():
            form.add(
                "captions",
                gr.Textbox(
                    label="Captions, one per line",
                    placeholder="such as: woman firefighter, dark skin tone",
                    lines=2,
                    autofocus=True,
                ),
            )
            tab = Tab(engine, form, "Draw")
        tab.output()
        with gr.Column(elem_classes="settings"):
            form.prior()
            form.count(4, label="Pictures per caption")
            form.seed()
            form.size()
            form.sampling(prior=True, eta=True)
    return tab


def vary(engine: Engine) -> Tab:
    """Variations of a picture."""
    form = Form(Vary, engine.models)
    with two_columns():
        with gr.Column():
            form.add("image", Picture.named("Picture"))
            tab = Tab(engine, form, "Vary")
        tab.output()
        with gr.Column(elem_classes="settings"):
            noise = [("new noise: free variations", False), ("its own noise: close to it", True)]
            around = form.add(AROUND, gr.Radio(noise, value=False, label="Start from"))
            label = "eta: 0 draws the picture again, 1 is furthest from it"
            eta = gr.Slider(0, 1, value=0.5, step=0.05, label=label, visible=False)
            form.add("eta", eta)
            around.change(
                lambda own: gr.update(visible=own),
                around,
                eta,
                show_progress="hidden",
                api_visibility="private",
            )
            form.add("caption", gr.Textbox(label="Caption to draw with (optional)"))
            form.count(4)
            form.seed()
            form.size()
            form.sampling()
    return tab


def interpolate(engine: Engine) -> Tab:
    """The way from one picture to another."""
    form = Form(Interpolate, engine.models)
    with two_columns():
        with gr.Column():
            with gr.Row():
                form.add("image", Picture.named("From", min_width=120))
                form.add("other", Picture.named("To", min_width=120))
            tab = Tab(engine, form, "Interpolate", lambda p: html.frames(p, "Between the pictures"))
        tab.output()
        with gr.Column(elem_classes="settings"):
            form.add("frames", gr.Slider(2, 33, value=9, step=1, label="Frames"))
            choices = [
                ("the pictures' own noise: the ends are the pictures", "inverted"),
                ("one noise, from the seed", "fresh"),
            ]
            form.add("noise", gr.Radio(choices, value="inverted", label="Start from"))
            form.seed()
            form.size()
            form.sampling()
    return tab


def edit(engine: Engine) -> Tab:
    """A picture changed as captions say."""
    form = Form(Edit, engine.models)
    with two_columns():
        with gr.Column():
            form.add("image", Picture.named("Picture"))
            form.add("source", gr.Textbox("a photo", label="From: what the picture shows"))
            form.add("target", gr.Textbox(label="To: what it should show"))
            tab = Tab(engine, form, "Edit", lambda p: html.frames(p, "How far to go"))
        tab.output()
        with gr.Column(elem_classes="settings"):
            form.add(
                "theta",
                gr.Radio(
                    [(f"theta {most:g}", thetas(most)) for most in (0.25, 0.5, 1)],
                    value=thetas(0.5),
                    label="How far at most: theta 0 is the picture itself",
                ),
            )
            form.seed()
            form.size()
            form.sampling()
    return tab


def thetas(most: float) -> str:
    """Nine steps to the largest theta, as a choice holds them."""
    return " ".join(f"{most * k / 8:g}" for k in range(9))


def inpaint(engine: Engine) -> Tab:
    """A part of a picture drawn again."""
    form = Form(Inpaint, engine.models)
    with two_columns():
        with gr.Column():
            form.add("painted", PaintedPicture.named("Paint over what to draw again"))
            form.add(
                "caption",
                gr.Textbox(
                    label="Caption of the whole picture (optional)",
                    placeholder="empty: what CLIP sees in it now",
                ),
            )
            tab = Tab(engine, form, "Inpaint")
        tab.output()
        with gr.Column(elem_classes="settings"):
            form.prior()
            form.count(4)
            form.seed()
            form.size()
            form.sampling(prior=True)
    return tab


def upsample(engine: Engine) -> Tab:
    """A picture drawn larger."""
    form = Form(Upsample, engine.models)
    with two_columns():
        with gr.Column():
            form.add("image", Picture.named("Picture of any size and shape"))
            tab = Tab(engine, form, "Enlarge")
        tab.output()
        with gr.Column(elem_classes="settings"):
            times = [4**k for k in range(1, len(engine.models.sizes))]
            choices = [(f"{factor} times", factor) for factor in times]
            form.add("times", gr.Radio(choices, value=times[0], label="How much larger"))
            form.seed()
    return tab


def pca(engine: Engine) -> Tab:
    """A picture from the first principal components of its embedding."""
    form = Form(PCA, engine.models)
    dim = engine.models.plain.decoder.net_config.embed_dim
    counts = ", ".join(map(str, [*paper_dimensions(dim), dim]))
    with two_columns():
        with gr.Column():
            form.add("image", Picture.named("Picture"))
            tab = Tab(engine, form, "Probe", lambda p: html.frames(p, "Principal components"))
        tab.output()
        with gr.Column(elem_classes="settings"):
            form.add(
                "components",
                gr.Textbox(label="Numbers of principal components (optional)", placeholder=counts),
            )
            form.seed()
            form.size()
            form.sampling()
    return tab


def typographic(engine: Engine) -> Tab:
    """The typographic attack: type on the picture, and see what CLIP makes of it."""
    form = Form(Typographic, engine.models)
    with two_columns():
        with gr.Column():
            image = form.add("image", Picture.named("Picture"))
            form.add(
                "object",
                gr.Textbox(label="What the picture shows", placeholder="such as: red apple"),
            )
            labels = form.add(
                "labels",
                gr.Textbox(
                    label="Labels to paste on it, one per line",
                    placeholder="such as: pizza",
                    lines=2,
                ),
            )
            tab = Tab(engine, form, "Attack")
        tab.output()
        with gr.Column(elem_classes="settings"):
            form.count(2, 4, "Pictures per label")
            form.seed()
            form.size()
            form.sampling()
    gr.on(
        [labels.input, image.change],
        typed,
        [image, labels],
        tab.live,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
    return tab


def typed(image: str | UserError, labels: str) -> Any:
    """The picture with each label on it, while they are typed."""
    lines = [line for line in labels.splitlines() if line.strip()][:4]
    if not image or not lines:
        return gr.skip()
    try:
        if isinstance(image, UserError):
            raise image
        picture = read_picture(from_base64(image))
    except UserError as error:
        return html.failed(str(error))
    side = min(picture.shape[1:])
    picture = F.interpolate(picture[None, :, :side, :side], (256, 256), mode="nearest")[0]
    return html.previews(torch.stack([to_uint8(paste_label(picture, line)) for line in lines]))
