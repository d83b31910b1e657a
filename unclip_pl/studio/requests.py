"""What the studio can be asked to draw. Each request is plain values, which JSON can hold.

A picture in a request is its file (PNG, JPEG, WebP, GIF, BMP or TIFF) in base64; a `data:` URL will
do as well. Values that only a model can judge, such as a size, are judged by `drawing.py`.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import repair_text

MOST_PICTURES = 64
"""Of one request."""
MOST_STEPS = 1000
MOST_CHARACTERS = 1000
"""Of one caption; CLIP reads less than that."""
STRICT = {"extra": "forbid"}
"""What the API does with a field that a request does not have."""
Sampler = Literal["ddpm", "ddim", "dpm_solver_pp"]
PriorSampler = Literal["analytic", "ddpm", "ddim", "dpm_solver_pp"]


def require(good: bool, sentence: str) -> None:
    """A UserError with `sentence` unless `good`."""
    if not good:
        raise UserError(sentence)


def between(name: str, value: float | None, least: float, most: float) -> None:
    """A UserError unless `value` is None or a number from `least` to `most`."""
    good = value is None or (math.isfinite(value) and least <= value <= most)
    require(good, f"{name} is {value}: give {least:g} to {most:g}.")


def caption(name: str, text: str, needed: bool = True) -> str:
    """`text` without spaces around it; a UserError where it is too long, or empty if needed."""
    text = repair_text(text).strip()
    require(bool(text) or not needed, f"The {name} is empty: write what the picture should show.")
    require(
        len(text) <= MOST_CHARACTERS,
        f"The {name} has {len(text)} characters: give at most {MOST_CHARACTERS}.",
    )
    return text


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Settings of every request that draws with the decoder; None: the decoder's own."""

    __pydantic_config__ = STRICT

    seed: int = 0
    """Picture k uses seed + k."""
    size: int | None = None
    """Pixels per side; None: the decoder's, the smallest."""
    sampler: Sampler | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    """1: no guidance."""
    upsampler_steps: int | None = None

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, 2**62 - 1)
        between("steps", self.steps, 1, MOST_STEPS)
        between("upsampler_steps", self.upsampler_steps, 1, MOST_STEPS)
        between("guidance_scale", self.guidance_scale, 1, 100)

    def pictures(self) -> int:
        """How many pictures it asks for."""
        raise NotImplementedError

    def _set(self, **values: Any) -> None:
        """Replace values while the request is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_count(self) -> None:
        count = self.pictures()
        require(
            1 <= count <= MOST_PICTURES,
            f"{count} pictures are asked for: ask for 1 to {MOST_PICTURES} at a time.",
        )


@dataclass(frozen=True, kw_only=True)
class PriorSettings:
    """Which prior draws the image embeddings of captions, and how; None: its own."""

    prior: str | None = None
    """"diffusion" or "ar"; "text": CLIP's text embedding instead of an image embedding;
    "none": the caption only. None: the first that the studio has."""
    prior_steps: int | None = None
    prior_sampler: PriorSampler | None = None
    prior_guidance_scale: float | None = None
    prior_temperature: float | None = None
    prior_top_p: float | None = None

    def check_prior(self) -> None:
        """A UserError where a number is impossible."""
        between("prior_steps", self.prior_steps, 1, MOST_STEPS)
        between("prior_guidance_scale", self.prior_guidance_scale, 1, 100)
        between("prior_temperature", self.prior_temperature, 0, 100)
        between("prior_top_p", self.prior_top_p, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Create(PriorSettings, Drawing):
    """Pictures from captions: `num_images` of each."""

    captions: tuple[str, ...]
    num_images: int = 1
    eta: float | None = None
    """Noise of the sampler ddim, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_prior()
        require(bool(self.captions), "There is no caption: write what the picture should show.")
        self._set(captions=tuple(caption("caption", text) for text in self.captions))
        between("num_images", self.num_images, 1, MOST_PICTURES)
        between("eta", self.eta, 0, 1)
        self._check_count()

    def pictures(self) -> int:
        return len(self.captions) * self.num_images

    def rows(self) -> list[tuple[str, int]]:
        """(caption, seed) of each picture."""
        seeds = range(self.seed, self.seed + self.num_images)
        return [(text, seed) for text in self.captions for seed in seeds]

    def settings(self) -> "Create":
        """What must be equal in requests that are drawn together: all but captions and seeds."""
        return dataclasses.replace(self, captions=("-",), num_images=1, seed=0)


@dataclass(frozen=True, kw_only=True)
class Vary(Drawing):
    """Variations of a picture: around itself (`eta`), or all that CLIP sees the same in."""

    image: str
    num_images: int = 4
    eta: float | None = None
    """0 (the picture again) to 1, from its inverted noise; None: from fresh noise."""
    caption: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        between("eta", self.eta, 0, 1)
        self._set(caption=caption("caption", self.caption, needed=False))
        self._check_count()

    def pictures(self) -> int:
        return self.num_images


@dataclass(frozen=True, kw_only=True)
class Interpolate(Drawing):
    """The way from one picture to another, both ends included."""

    image: str
    other: str
    frames: int = 9
    noise: Literal["inverted", "fresh"] = "inverted"
    """x_T between those of both, so that the ends are the pictures; or one noise, of the seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between("frames", self.frames, 2, MOST_PICTURES)

    def pictures(self) -> int:
        return self.frames


@dataclass(frozen=True, kw_only=True)
class Edit(Drawing):
    """A picture changed as the difference of two captions says."""

    image: str
    source: str = "a photo"
    """What the picture shows; empty: left out."""
    target: str
    """What it should show."""
    theta: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5)
    """How far to go, 0 to 1: a picture for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            source=caption("caption to go from", self.source, needed=False),
            target=caption("caption to go to", self.target),
        )
        require(
            self.source != self.target,
            f'From and to are the same ("{self.target}"), which is no change: make them differ.',
        )
        for value in self.theta:
            between("theta", value, 0, 1)
        self._check_count()

    def pictures(self) -> int:
        return len(self.theta)


@dataclass(frozen=True, kw_only=True)
class Inpaint(PriorSettings, Drawing):
    """A part of a picture drawn again, the rest kept."""

    image: str
    mask: str
    """A picture of the same size, white where to draw."""
    caption: str = ""
    """What the whole picture should show; empty: what CLIP sees in it now."""
    num_images: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_prior()
        self._set(caption=caption("caption", self.caption, needed=False))
        self._check_count()

    def pictures(self) -> int:
        return self.num_images


@dataclass(frozen=True, kw_only=True)
class Upsample:
    """A picture of any size and shape, drawn larger by the upsamplers."""

    __pydantic_config__ = STRICT

    image: str
    times: Literal[4, 16] = 4
    seed: int = 0
    upsampler_steps: int | None = None

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, 2**62 - 1)
        between("upsampler_steps", self.upsampler_steps, 1, MOST_STEPS)
        require(self.times in (4, 16), f"times is {self.times}: give 4 or 16.")

    def pictures(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class PCA(Drawing):
    """A picture drawn from the first principal components of its CLIP embedding."""

    image: str
    components: tuple[int, ...] = ()
    """How many: a picture for each; empty: the paper's, scaled to the CLIP, and all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.components) <= MOST_PICTURES,
            f"{len(self.components)} pictures are asked for: ask for at most {MOST_PICTURES}.",
        )

    def pictures(self) -> int:
        return max(1, len(self.components))


@dataclass(frozen=True, kw_only=True)
class Typographic(Drawing):
    """A label pasted over a picture: what CLIP takes it for, and what is drawn from that."""

    image: str
    object: str
    """What the picture shows, as a caption."""
    labels: tuple[str, ...]
    """What to paste: each on its own copy, and each a caption that CLIP may choose."""
    num_images: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        labels = tuple(caption("label", text) for text in self.labels)
        self._set(object=caption("caption of the picture", self.object), labels=labels)
        require(bool(labels), "There is no label: write what to paste on the picture.")
        known = [text.lower() for text in (self.object, *labels)]
        require(
            len(set(known)) == len(known),
            "A caption comes twice, and CLIP is to choose between them: name each once.",
        )
        self._check_count()

    def pictures(self) -> int:
        return (1 + len(self.labels)) * self.num_images


@dataclass(frozen=True, kw_only=True)
class UseWeights:
    """Other weights for all that is drawn from now on; only the page can ask for it."""

    run: Path | None
    """The folder of a training run, whose newest checkpoint is loaded; None: the first weights."""

    def pictures(self) -> int:
        return 0


Request = Create | Vary | Interpolate | Edit | Inpaint | Upsample | PCA | Typographic | UseWeights
KINDS: dict[str, type] = {
    kind.__name__.lower(): kind
    for kind in (Create, Vary, Interpolate, Edit, Inpaint, Upsample, PCA, Typographic)
}
"""By the names under which the API has them."""
PICTURES = ("image", "other", "mask")
"""The fields that hold pictures."""


def request_of(settings: dict[str, Any]) -> Request:
    """The request that `described` describes, with empty pictures.

    Raises:
        UserError: it is none, or asks for what cannot be.
    """
    values = dict(settings)
    kind = KINDS.get(str(values.pop("kind", "")))
    if kind is None:
        raise UserError("The settings in this picture are of no tab of the studio: give another.")
    names = {field.name for field in dataclasses.fields(kind)}
    values |= {name: "" for name in PICTURES if name in names}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"The settings in this picture cannot be used ({where}: {first['msg']}): give another."
        ) from None


def described(request: Request) -> dict[str, Any]:
    """A request as plain values, without its pictures and what was left open."""
    kept = {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        left_open = value is None or value == "" == field.default
        if field.name not in PICTURES and not left_open:
            kept[field.name] = value
    return {"kind": type(request).__name__.lower(), **kept}
