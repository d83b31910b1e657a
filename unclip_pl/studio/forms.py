"""Forms of the page: components by the names of a request's fields, and the request of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gradio as gr

from unclip_pl.studio.inputs import Painted
from unclip_pl.studio.models import Models
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import SAMPLERS

OWN = "the model's own"
"""In a list of choices, what leaves the choice to the model."""
PRIOR_NAMES = {
    "diffusion": "diffusion",
    "ar": "autoregressive",
    "none": "none: the caption only",
    "text": "none: CLIP's text embedding",
}
NUMBERS: dict[str, type] = {
    **dict.fromkeys(("seed", "num_images", "frames"), int),
    **dict.fromkeys(("steps", "prior_steps", "upsampler_steps"), int),
    **dict.fromkeys(("guidance_scale", "prior_guidance_scale", "eta"), float),
}
"""Fields of numbers."""


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
            if name in ("image", "other", "painted") and not value:
                raise UserError("There is no picture: drop one here, or send one from below.")
            if isinstance(value, Painted):
                asked |= value._asdict()
            elif value not in (None, "", OWN):
                asked[name] = convert(name, str(self.fields[name].label), value)
        missing = [
            field.name
            for field in dataclasses.fields(self.kind)
            if field.default is dataclasses.MISSING and field.name not in asked
        ]
        if missing:
            raise UserError(f'"{self.fields[missing[0]].label}" is empty: fill it in.')
        return self.kind(**asked)

    def values(self, settings: dict[str, Any]) -> list[Any]:
        """What the components show for the settings of a picture; what is left open is reset."""
        shown = []
        for name, component in self.fields.items():
            value = settings.get(name, component.value)
            shown.append("\n".join(value) if isinstance(value, list | tuple) else value)
        return shown

    # The components that several tabs have.

    def seed(self) -> None:
        """The seed, and the size of the pictures."""
        self.add("seed", gr.Number(0, label="Seed", precision=0, minimum=0))
        sizes = [(f"{size} pixels", size) for size in self.models.sizes]
        self.add("size", gr.Radio(sizes, value=self.models.sizes[0], label="Size"))

    def count(self, value: int, most: int = 16) -> None:
        """How many pictures."""
        slider = gr.Slider(1, most, value=value, step=1, label="Number of pictures")
        self.add("num_images", slider)

    def prior(self) -> None:
        """Which prior."""
        choices = [(PRIOR_NAMES[name], name) for name in self.models.priors]
        self.add("prior", gr.Radio(choices, value=choices[0][1], label="Prior"))

    def sampling(self, prior: bool = False, eta: bool = False) -> None:
        """The settings of decoder, prior and upsamplers, folded away."""
        own = self.models.plain.decoder.sampling
        with gr.Accordion("More settings", open=False):
            self.add("sampler", gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler"))
            self.add("steps", number(f"Steps of the decoder (its own: {own.steps})"))
            label = f"Guidance of the decoder (its own: {own.guidance_scale:g}; 1: none)"
            self.add("guidance_scale", number(label))
            if eta:
                self.add("eta", number("eta: noise of the sampler ddim, 0 to 1"))
            if prior and self.models.with_prior:
                self.add("prior_steps", number("Steps of a diffusion prior"))
                self.add("prior_guidance_scale", number("Guidance of the prior (1: none)"))
            if len(self.models.sizes) > 1:
                self.add("upsampler_steps", number("Steps of each upsampler"))


def number(label: str) -> gr.Textbox:
    """A number that may be left empty, which a `gr.Number` may not."""
    return gr.Textbox(label=label, placeholder=OWN, max_lines=1)


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
