"""The README.md of what was imported: what it is, where from, under which licence."""

import re
from pathlib import Path

KARLO = "Karlo v1 alpha (Kakao Brain, https://github.com/kakaobrain/karlo)"
SIBLING = "the folder `clip` next to this one."
DRAWS = {
    "prior": "Draws a CLIP image embedding for a caption: 25 steps of DDPM, guidance 4.",
    "decoder": "Draws a picture of 64 x 64 from an embedding and a caption: 25 steps of DDPM, "
    "guidance 8. Karlo's slower setting is 50 steps.",
    "upsampler-256": "Draws a picture of 64 x 64 again at 256 x 256: 7 steps of DDPM, of which a "
    "second network, tuned for sharp edges, draws the last.",
}


def licence_of(folder: Path) -> str | None:
    """The licence that the front matter of a folder's README.md names."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    found = re.search(r"^license: *(\S.*)$", front[1], re.MULTILINE) if front else None
    return found[1].strip() if found else None


def karlo_card(folder: Path, part: str) -> str:
    """README.md of one release of Karlo, with the front matter that model hubs read."""
    return _card(
        folder,
        licence_of(folder),
        part,
        "karlo",
        DRAWS[part],
        f"{KARLO}, or weights of its shape",
        "Karlo v1 alpha was published under CreativeML Open RAIL-M, which restricts some uses.",
        SIBLING,
    )


def kandinsky_card(folder: Path, part: str) -> str:
    """README.md of Kandinsky's prior, with the front matter that model hubs read."""
    return _card(
        folder,
        licence_of(folder),
        part,
        "kandinsky-prior",
        DRAWS[part],
        "the prior of Kandinsky (https://github.com/ai-forever/Kandinsky-2), or weights of its "
        "shape. Its decoder is another network than those of this project",
        "Kandinsky 2.2 was published under Apache 2.0.",
        SIBLING,
    )


def glide_card(weights: Path) -> str:
    """README.md of GLIDE's base model, with the front matter that model hubs read."""
    return _card(
        weights,
        None,  # a README.md beside them may be the tokenizer's
        "decoder",
        "glide",
        "Draws a picture of 64 x 64 from a caption only: 100 steps of DDPM, guidance 3.",
        "GLIDE (filtered), base model (OpenAI, https://github.com/openai/glide-text2im), or "
        "weights of its shape",
        "Its authors published it for research, and do not recommend it for commercial use.",
        "none. Its tokenizer is part of model.safetensors (text.encoder.merges).",
    )


def _card(
    folder: Path,
    licence: str | None,
    part: str,
    command: str,
    draws: str,
    model: str,
    published: str,
    clip: str,
) -> str:
    lines = [
        "---",
        "library_name: unclip_pl",
        *([f"license: {licence}"] if licence else []),
        f"tags: [unclip, {command.partition('-')[0]}]",
        "---",
        f"# {part} of {folder.name}",
        "",
        f"Imported from {folder.name} by `unclip import {command}`. {draws}",
        "",
        f"- Model: {model}.",
        f"- Licence of the weights: {licence or 'see where they were published'}. {published}",
        f"- CLIP: {clip}",
    ]
    return "\n".join(lines) + "\n"
