"""Captions said in other words, so that a small CLIP cannot learn them by heart (prompt templates as in CLIP, Radford et al. 2021, section 3.1.4).

A caption is a name with clauses behind commas ("woman, red hair, dark skin tone"); what is left out is never put into other words, so all stays true.
"""

import random
import re

TEMPLATES = (
    "a drawing of {}", "an emoji of {}", "a picture of {}", "an icon of {}", "a cartoon of {}", "a sticker of {}", "clip art of {}",
    "{} emoji", "{} icon", "emoji: {}", "drawing: {}", "this is {}",
)  # fmt: skip
ADJECTIVES = re.compile(r"\b(?:light blue|black|white|red|orange|yellow|green|blue|purple|brown|pink|grey|small|large|big|old) (?=\S)")


def augment_caption(caption: str, rng: random.Random) -> str:
    """One way of saying `caption`: perhaps a skin tone or an adjective less, its clauses in another order, in a template, in other case.

    The same `rng` state gives the same words. The result is never empty, at most four words longer, and in a fifth to a third of cases the caption as it is.
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
