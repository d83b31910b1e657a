"""Captions: where a sample has its own, how many have none, and other words for one.

Other words keep a small CLIP from learning captions by heart (prompt templates as in CLIP, Radford
et al. 2021, section 3.1.4). A caption is a name with clauses behind commas ("woman, red hair, dark
skin tone"); what is left out is never put into other words, so all stays true.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unclip_pl.data.budget import BadSample
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import decode_text, repair_text

ENDINGS = ("txt", "caption", "text")
"""Of files that hold a caption and nothing else."""
FIELDS = ("caption", "text", "prompt", "description", "captions", "texts")
"""Of KEY.json, in letters of any case; of a list the first."""
TEMPLATES = (
    "a drawing of {}", "an emoji of {}", "a picture of {}", "an icon of {}", "a cartoon of {}",
    "a sticker of {}", "clip art of {}", "{} emoji", "{} icon", "emoji: {}", "drawing: {}",
    "this is {}",
)  # fmt: skip
ADJECTIVES = re.compile(
    r"\b(?:light blue|black|white|red|orange|yellow|green|blue|purple|brown|pink|grey"
    r"|small|large|big|old) (?=\S)"
)


def augment_caption(caption: str, rng: random.Random) -> str:
    """One way of saying `caption`: perhaps a skin tone or an adjective less, its clauses in another
    order, in a template, in other case.

    The same `rng` state gives the same words. The result is never empty, at most four words longer,
    and in a fifth to a third of cases the caption as it is.
    """
    clauses = [clause.strip() for clause in caption.split(",") if clause.strip()]
    if not clauses:
        return "a drawing"
    if len(clauses) > 1 and rng.random() < 0.15:
        clauses = _without_tone(clauses)
    if rng.random() < 0.1:
        clauses[0] = _without_adjective(clauses[0], rng)
    if len(clauses) > 1 and rng.random() < 0.3:
        rng.shuffle(clauses)
    said = ", ".join(clauses)
    if rng.random() < 0.6:
        said = rng.choice(TEMPLATES).format(said)
    draw = rng.random()
    if draw < 0.3:
        return said.lower()
    return said[0].upper() + said[1:] if draw < 0.45 else said


def _without_tone(clauses: list[str]) -> list[str]:
    return [clause for clause in clauses if not clause.endswith(" skin tone")] or clauses


def _without_adjective(clause: str, rng: random.Random) -> str:
    found = list(ADJECTIVES.finditer(clause))
    if not found:
        return clause
    start, end = rng.choice(found).span()
    return clause[:start] + clause[end:]


def caption_of(files: Mapping[str, bytes]) -> str:
    """The caption among the files of a sample, by ending: the first of `ENDINGS` that is not empty,
    else the first of `FIELDS` in its .json, else "": img2dataset writes images without captions.

    Raises:
        BadSample: it would have to be in the .json, which cannot be read.
    """
    for ending in ENDINGS:
        if text := decode_text(files.get(ending, b"")).strip():
            return text
    if not files.get("json"):
        return ""
    try:
        fields = json.loads(decode_text(files["json"]))
    except (ValueError, RecursionError):
        if any(ending in files for ending in ENDINGS):
            return ""
        raise BadSample("its .json cannot be read") from None
    if isinstance(fields, str):
        return repair_text(fields).strip()
    if not isinstance(fields, dict):
        return ""
    small = {name.lower(): value for name, value in fields.items()}
    found = (_first(small.get(name)) for name in FIELDS)
    return next((text for text in found if text), "")


def _first(value: Any) -> str:
    """A caption, or the first of several."""
    value = value[0] if isinstance(value, list) and value else value
    return repair_text(value).strip() if isinstance(value, str) else ""


@dataclass
class Captionless:
    """Counts the samples that have no caption, and the endings of their files."""

    seen: int = 0
    missing: int = 0
    endings: set[str] = field(default_factory=set)

    def add(self, samples: Iterable[Mapping[str, Any]]) -> "Captionless":
        """Look at samples as `raw_samples` gives them."""
        for sample in samples:
            self.seen += 1
            if not sample["caption"]:
                self.missing += 1
                self.endings |= set(sample["endings"])
        return self

    def __str__(self) -> str:
        seen = f" (endings seen: {', '.join(sorted(self.endings))})" if self.endings else ""
        return f"{self.missing} of {self.seen} samples have no caption{seen}"

    def require(self, max_rate: float) -> None:
        """Raise a UserError where they are too many; among fewer than 100 samples one passes."""
        if self.missing > max_rate * max(self.seen, 100):
            raise UserError(
                f'{self}: write them as KEY.txt, KEY.caption, or "caption" or "text" in '
                f"KEY.json, or raise data.loader.max_bad_rate ({max_rate:g})."
            )
