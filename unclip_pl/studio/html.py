"""Pieces of the page that are plain HTML.

Pictures while they are drawn and when they are done, a slider over frames that works in the
browser, and sentences that screen readers read out.
"""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from torch import Tensor

from unclip_pl.studio.album import Print
from unclip_pl.studio.picture_files import as_pil
from unclip_pl.utils.images import png_bytes

STYLE = """
.status { min-height: 1.6em; margin: 0; }
.status progress { width: 100%; height: 0.5em; }
.status.error { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.form-and-pictures { display: grid; grid-template: auto 1fr / minmax(0, 1fr) minmax(0, 1fr); }
.form-and-pictures > .output { grid-area: 1 / 2 / span 2; }
.form-and-pictures > .settings { grid-area: 2 / 1; }
@media (max-width: 700px) { .form-and-pictures { display: flex; } }
.pictures { display: grid; gap: 0.5em;
  grid-template-columns: repeat(auto-fill, minmax(min(12em, 45%), 1fr)); }
.pictures:has(> :nth-child(7)) { grid-template-columns: repeat(auto-fill, minmax(7em, 1fr)); }
.pictures:has(figure:only-child) { grid-template-columns: minmax(7em, 32em); }
.pictures figure, .frames figure { margin: 0; }
.pictures img, .frames img { width: 100%; display: block; background: white;
  border: 1px solid var(--border-color-primary); border-radius: 4px; }
.pictures figcaption, .frames figcaption { font-size: 0.85em; overflow-wrap: anywhere; }
.frames { max-width: 32em; }
.strip { display: flex; margin-top: 0.5em; }
.strip img { min-width: 0; flex: 1; border: 0; border-radius: 0; }
.image-frame img { width: 100%; height: 100%; object-fit: contain; }
.wide { margin: 0; overflow-x: auto; } .wide img { width: 100%; min-width: 46em; }
.frames figure[hidden] { display: none; }
.frames input { width: 100%; accent-color: var(--primary-700); }
.status progress { accent-color: var(--primary-700); }
.notes { font-size: 0.9em; margin: 0.5em 0; padding-left: 1.2em; }
.facts { display: grid; grid-template-columns: auto 1fr; gap: 0.2em 1em; font-size: 0.9em; }
.facts dt { opacity: 0.75; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.plot { display: grid; grid-template-columns: auto 1fr; gap: 0.3em 0.5em; font-size: 0.85em; }
.plot ul { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 0 1.5em; padding: 0; }
.plot ul, .plot li { list-style: none; margin: 0; }
.plot li span { display: inline-block; width: 1em; height: 0.2em; margin: 0.25em 0.4em; }
.plot svg { width: 100%; height: 18em; overflow: hidden; }
.plot polyline { fill: none; stroke-width: 1.5px; vector-effect: non-scaling-stroke; }
.plot line { stroke: var(--border-color-primary); vector-effect: non-scaling-stroke; }
.plot .values { display: flex; flex-direction: column; justify-content: space-between; }
.plot .values { text-align: right; margin: -0.6em 0; }
.plot .steps { grid-column: 2; display: flex; justify-content: space-between; }
#gallery .caption-label { display: none; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(6.5em, 1fr)); }
.new-seed { align-self: end; }
footer { display: none !important; }
"""
FACTS = {"kind": "made in", "captions": "caption", "num_images": "pictures"}
"""What settings are called, where the name of their field does not say it."""
SCRUB = (
    "const all = this.closest('.frames').querySelectorAll('figure');"
    "all.forEach((figure, k) => { figure.hidden = k != this.value; });"
    "this.setAttribute('aria-valuetext', all[this.value].innerText);"
)
"""Of the slider over frames: they are all here, one is shown."""


def said(text: str) -> str:
    """A sentence on how things stand."""
    return f'<p class="status" role="status">{escape(text)}</p>'


def failed(text: str) -> str:
    """A sentence on what went wrong."""
    return f'<p class="status error" role="alert">{escape(text)}</p>'


def progress(text: str, step: int, steps: int) -> str:
    """How far a drawing is."""
    bar = f'<progress value="{step}" max="{max(1, steps)}" aria-label="Progress"></progress>'
    return f'<div class="status" role="status">{escape(text)}{bar}</div>'


def inline(image: Tensor, alt: str) -> str:
    """An image, uint8 (3, H, W), that is part of the page."""
    data = base64.b64encode(png_bytes(as_pil(image))).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def wide(image: Tensor, alt: str) -> str:
    """A picture as wide as there is room, with its name below."""
    return (
        f'<figure class="wide">{inline(image, alt)}<figcaption>{escape(alt)}</figcaption></figure>'
    )


def previews(shown: Tensor) -> str:
    """x0 of pictures that are being drawn, uint8 (B, 3, H, W)."""
    images = [inline(image, f"Picture {k} while it is drawn") for k, image in enumerate(shown, 1)]
    figures = "".join(f"<figure>{image}</figure>" for image in images)
    return f'<div class="pictures drawing">{figures}</div>'


def source(one: Print) -> str:
    """Where a browser finds a picture of the album."""
    return f"gradio_api/file={one.path.as_posix()}"


def figure(one: Print, hidden: bool = False) -> str:
    """A picture with its label."""
    label = escape(one.label)
    return (
        f"<figure{' hidden' if hidden else ''}>"
        f'<img src="{escape(source(one))}" alt="{label}"><figcaption>{label}</figcaption></figure>'
    )


def pictures(prints: Sequence[Print]) -> str:
    """Pictures side by side."""
    return f'<div class="pictures done">{"".join(map(figure, prints))}</div>'


def frames(prints: Sequence[Print], name: str) -> str:
    """Pictures one at a time, under a slider with that name."""
    shown = [figure(one, hidden=k > 0) for k, one in enumerate(prints)]
    return (
        f'<div class="frames done"><label>{escape(name)}'
        f'<input type="range" min="0" max="{len(prints) - 1}" value="0" step="1" '
        f'aria-valuetext="{escape(prints[0].label)}" oninput="{escape(SCRUB)}"></label>'
        f"{''.join(shown)}{strip(prints)}</div>"
    )


def strip(prints: Sequence[Print]) -> str:
    """All pictures small and side by side; screen readers have them from the slider."""
    small = [f'<img src="{escape(source(one))}" alt="">' for one in prints]
    return f'<div class="strip" aria-hidden="true">{"".join(small)}</div>'


def facts(settings: dict[str, Any]) -> str:
    """The settings of a picture, as a list of names and values."""
    rows = []
    for name, value in settings.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        named = FACTS.get(name, name.replace("_", " "))
        rows.append(f"<dt>{escape(named)}</dt><dd>{escape(text)}</dd>")
    return f'<dl class="facts">{"".join(rows)}</dl>'


def notes(sentences: Sequence[str]) -> str:
    """What there is to say of pictures."""
    if not sentences:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(text)}</li>" for text in sentences)}</ul>'
