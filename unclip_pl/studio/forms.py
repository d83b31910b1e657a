"""Forms of the page: components by the names of a request's fields, and the request of them."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr

from unclip_pl.studio.inputs import Painted
from unclip_pl.studio.models import PRIOR_WORDS, Models
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import SAMPLERS

OWN = "default"
"""In a list of choices, what leaves the choice to the model."""
PRIOR_NAMES = {
    **PRIOR_WORDS,
    "none": "no prior: the caption only",
    "text": "no prior: CLIP's text embedding",
}
NUMBERS: dict[str, type] = {
    **dict.fromkeys(("seed", "num_images", "frames"), int),
    **dict.fromkeys(("steps", "prior_steps", "upsampler_steps"), int),
    **dict.fromkeys(("guidance_scale", "prior_guidance_scale", "eta"), float),
}
"""Fields of numbers."""
PICTURES = ("image", "other", "painted")
"""Fields of pictures."""
AROUND = "around"
"""A field that says whether that of eta counts."""


class Form:
    """The components of a tab, by the names of the fields that they fill."""

    def __init__(self, kind: type, models: Models) -> None:
        self.kind, self.models = kind, models
        self.fields: dict[str, Any] = {}

    def add(self, name: str, component: Any) -> Any:
        """Let a component fill a field; it comes back."""
        self.fields[name] = component
        return component

    def components(self) -> list[Any]:
        """In the order in which `request` takes their values."""
        return list(self.fields.values())

    def request(self, values: Sequence[Any]) -> Any:
        """The request that the components ask for.

        Raises:
            UserError: something is missing or impossible.
        """
        asked: dict[str, Any] = {}
        for name, value in zip(self.fields, values, strict=True):
            if isinstance(value, UserError):
                raise value
            if name in PICTURES and not value:
                raise UserError("There is no picture: drop one here, or send one from below.")
            if isinstance(value, Painted):
                asked |= value._asdict()
            elif not self._left_open(name, value):
                asked[name] = convert(name, str(self.fields[name].label), value)
        if not asked.pop(AROUND, True):
            del asked["eta"]
        missing = [
            field.name
            for field in dataclasses.fields(self.kind)
            if field.default is dataclasses.MISSING and field.name not in asked
        ]
        if missing:
            raise UserError(f'"{self.fields[missing[0]].label}" is empty: fill it in.')
        return self.kind(**asked)

    def _left_open(self, name: str, value: Any) -> bool:
        """Whether a component leaves the choice to the model or to the request's default."""
        if name == "sampler":
            return value == OWN
        return value is None or (value == "" and not getattr(self.kind, name, ""))

    def values(self, settings: dict[str, Any]) -> list[Any]:
        """What the components show for the settings of a picture.

        What is left open is reset; pictures stay as they are.
        """
        settings = {AROUND: "eta" in settings, **settings}
        return [
            gr.skip() if name in PICTURES else shown(name, component, settings.get(name))
            for name, component in self.fields.items()
        ]

    # The components that several tabs have.

    def seed(self) -> None:
        """The seed, with a button for another one."""
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, scale=2)
            another = gr.Button("New seed", min_width=100, scale=1, elem_classes="new-seed")
        self.add("seed", seed)
        another.click(
            new_seed, None, seed, queue=False, show_progress="hidden", api_visibility="private"
        )

    def size(self) -> None:
        """The size of the pictures, where there is a choice."""
        sizes = [(f"{size} pixels", size) for size in self.models.sizes]
        if len(sizes) > 1:
            self.add("size", gr.Radio(sizes, value=self.models.sizes[0], label="Size"))

    def count(self, value: int, most: int = 16, label: str = "Number of pictures") -> None:
        """How many pictures."""
        self.add("num_images", gr.Slider(1, most, value=value, step=1, label=label))

    def prior(self) -> None:
        """Which prior."""
        choices = [(PRIOR_NAMES[name], name) for name in self.models.priors]
        label = "Prior: how the caption becomes an image embedding"
        self.add("prior", gr.Radio(choices, value=choices[0][1], label=label))

    def sampling(self, prior: bool = False, eta: bool = False) -> None:
        """The settings of decoder, prior and upsamplers, folded away."""
        own = self.models.plain.decoder.sampling
        with gr.Accordion("More settings", open=False):
            self.add("sampler", gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler"))
            with gr.Row():
                self.add("steps", number("Decoder steps", own.steps))
                self.add("guidance_scale", number("Decoder guidance scale", own.guidance_scale))
            if eta:
                self.add("eta", number("eta of the sampler ddim, 0 to 1"))
            if prior and self.models.with_prior:
                with gr.Row():
                    self.add("prior_steps", number("Steps of the diffusion prior"))
                    self.add("prior_guidance_scale", number("Prior guidance scale"))
            if len(self.models.sizes) > 1:
                self.add("upsampler_steps", number("Steps of each upsampler"))


def new_seed() -> int:
    """A seed that nobody has chosen."""
    return secrets.randbelow(2**31)


def number(label: str, own: Any = None) -> gr.Textbox:
    """A number that may be left empty, which a `gr.Number` may not; `own`: what it is then."""
    placeholder = OWN if own is None else f"{own} ({OWN})"
    return gr.Textbox(label=label, placeholder=placeholder, max_lines=1, min_width=140)


def shown(name: str, component: Any, value: Any) -> Any:
    """A setting as its component shows it; None: as it was at first."""
    if value is None:
        return component.value
    if isinstance(value, list | tuple):
        separator = {"theta": " ", "components": ", "}.get(name, "\n")
        value = separator.join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    if isinstance(component, gr.Slider) and value > component.maximum:
        return gr.update(value=value, maximum=value)
    if isinstance(component, gr.Radio) and value not in [one for _, one in component.choices]:
        if name != "theta":
            raise UserError(
                f'The settings ask for {value} in "{component.label}", which this studio does not '
                "have: give another picture."
            )
        return gr.update(value=value, choices=[*component.choices, (f"theta {value}", value)])
    return value


def parse(kind: type, label: str, text: str) -> int | float:
    """The number in a text; a UserError where there is none."""
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise UserError(f'"{text}" is no {what}: change "{label}", or leave it empty.') from None


def convert(name: str, label: str, value: Any) -> Any:
    """A component's value as a request has it."""
    if name in NUMBERS:
        return parse(NUMBERS[name], label, value)
    if name in ("captions", "labels"):
        return tuple(line for line in value.splitlines() if line.strip())
    if name == "theta":
        return tuple(map(float, value.split()))
    if name == "components":
        try:
            return tuple(int(part) for part in value.replace(",", " ").split())
        except ValueError:
            raise UserError(
                f'"{value}" are no numbers of components: write such as 1, 10, 100.'
            ) from None
    return value
