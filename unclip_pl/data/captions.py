"""Captions: where to find that of a sample, how many samples have none, and how to vary one.

Varied captions keep a small CLIP from learning them by heart (prompt templates as in CLIP, Radford
et al. 2021, section 3.1.4). A caption is a name followed by clauses after commas ("woman, red hair,
dark skin tone"). Clauses are left out but never replaced, so the caption stays true.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unclip_pl.data.bad_samples import BadSample
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import decode_text, repair_text

CAPTION_ENDINGS = ("txt", "caption", "text")
"""Endings of files that hold a caption and nothing else."""
CAPTION_FIELDS = ("caption", "text", "prompt", "description", "captions", "texts")
"""Fields of KEY.json that may hold a caption, in upper or lower case; of a list the first."""
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
    """Make a variant of `caption` for training.

    It may lose a skin tone or an adjective. Its clauses may come in another order, in a template,
    in upper or lower case.

    The same state of `rng` gives the same words. The result is never empty, at most four words
    longer, and in a fifth to a third of cases it is the caption itself.
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
    variant = ", ".join(clauses)
    if rng.random() < 0.6:
        variant = rng.choice(TEMPLATES).format(variant)
    draw = rng.random()
    if draw < 0.3:
        return variant.lower()
    if draw < 0.45:
        return variant[0].upper() + variant[1:]
    return variant


def _without_tone(clauses: list[str]) -> list[str]:
    return [clause for clause in clauses if not clause.endswith(" skin tone")] or clauses


def _without_adjective(clause: str, rng: random.Random) -> str:
    adjectives = list(ADJECTIVES.finditer(clause))
    if not adjectives:
        return clause
    start, end = rng.choice(adjectives).span()
    return clause[:start] + clause[end:]


def caption_of(files: Mapping[str, bytes]) -> str:
    """The caption among the files of a sample, by ending.

    It is the first of `CAPTION_ENDINGS` that is not empty, else the first of `CAPTION_FIELDS` in
    the .json, else "": img2dataset writes images without captions.

    Raises:
        BadSample: it would have to be in the .json, which cannot be read.
    """
    for ending in CAPTION_ENDINGS:
        if text := decode_text(files.get(ending, b"")).strip():
            return text
    if not files.get("json"):
        return ""
    try:
        fields = json.loads(decode_text(files["json"]))
    except (ValueError, RecursionError):
        if any(ending in files for ending in CAPTION_ENDINGS):
            return ""
        raise BadSample("its .json cannot be read") from None
    if isinstance(fields, str):
        return repair_text(fields).strip()
    if not isinstance(fields, dict):
        return ""
    small = {name.lower(): value for name, value in fields.items()}
    captions = (_first(small.get(name)) for name in CAPTION_FIELDS)
    return next((caption for caption in captions if caption), "")


def _first(value: Any) -> str:
    """A caption, or the first of several."""
    value = value[0] if isinstance(value, list) and value else value
    return repair_text(value).strip() if isinstance(value, str) else ""


@dataclass
class MissingCaptions:
    """Counts the samples that have no caption, and notes the endings of their files."""

    seen: int = 0
    missing: int = 0
    endings: set[str] = field(default_factory=set)

    def add(self, samples: Iterable[Mapping[str, Any]]) -> "MissingCaptions":
        """Count samples as `raw_samples` yields them."""
        for sample in samples:
            self.seen += 1
            if not sample["caption"]:
                self.missing += 1
                self.endings |= set(sample["endings"])
        return self

    def __str__(self) -> str:
        endings = f" (endings seen: {', '.join(sorted(self.endings))})" if self.endings else ""
        return f"{self.missing} of {self.seen} samples have no caption{endings}"

    def require(self, max_rate: float) -> None:
        """Raise a UserError where more than this share of the samples, from 0 to 1, have none.

        Among fewer than 100 samples one may lack its caption.
        """
        if self.missing > max_rate * max(self.seen, 100):
            raise UserError(
                f'{self}: write them as KEY.txt, KEY.caption, or "caption" or "text" in '
                f"KEY.json, or raise data.loader.max_bad_rate ({max_rate:g})."
            )
