"""Captions longer than CLIP's, for a stage with a text encoder of its own.

CLIP's tokenizer cuts a caption at its context length (77). A stage whose text context is longer
(256 in Table 3) reads the raw caption tokenised once more, `text_tokens` of a batch; z_t and CLIP's
token states still come from CLIP's own `tokens`. A stage with a tokenizer of its own (GLIDE's)
makes `text_tokens` itself.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

VOCABULARY = 49408
"""Ids of the tokenizer of `text_tokens`, open_clip's BPE, whose largest is the end token."""
OWN_ENCODER = ("transformer", "tokens")
"""Kinds of text that embed tokens themselves."""


def own_length(text: Any, clip_length: int) -> int | None:
    """How many `text_tokens` the data must give a stage; None: none.

    CLIP's `tokens` fill its context then, or it has a tokenizer of its own.

    Args:
        text: the stage's text config, or None.
        clip_length: context length of the CLIP.
    """
    if text is None or text.kind not in OWN_ENCODER or has_own_tokenizer(text):
        return None
    if text.context_length <= clip_length:
        return None
    return text.context_length


def has_own_tokenizer(text: Any) -> bool:
    """Whether a stage with this text config reads no tokens of CLIP's vocabulary."""
    return getattr(text, "tokenizer", "clip") != "clip"


def caption_of(batch: Mapping[str, Any], text: Any) -> dict[str, Tensor | None]:
    """`tokens`, `mask` and `states` of a batch as the networks take them.

    Args:
        batch: its `text_tokens` (B, L) are read in place of `tokens` and `text_mask`, if it has any
            and `text` embeds tokens itself.
        text: the stage's text config.
    """
    own = batch.get("text_tokens") if text.kind in OWN_ENCODER else None
    reads_clip = own is None and not has_own_tokenizer(text)
    return {
        "tokens": batch.get("tokens") if reads_clip else own,
        "mask": batch.get("text_mask") if reads_clip else None,  # up to the end token
        "states": batch.get("text_states"),
    }
