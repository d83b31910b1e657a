"""Which tokens of a batch a stage reads: CLIP's `tokens`, or `text_tokens` for longer captions.

CLIP's tokenizer cuts a caption at its context length (77). A stage with a longer text context (256
in Table 3) reads `text_tokens`: the same caption, tokenised again and cut later. z_t and CLIP's
token states still come from `tokens`. A stage with its own tokenizer (GLIDE's) makes `text_tokens`
itself.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

VOCABULARY = 49408
"""Ids of the tokenizer of `text_tokens`, open_clip's BPE, whose largest is the end token."""
KINDS_WITH_TOKENS = ("transformer", "tokens")
"""Kinds of text that read token ids, and not CLIP's token states."""


def text_tokens_length(text: Any, clip_length: int) -> int | None:
    """How many `text_tokens` the data must give; None: the stage does not read them from the data.

    Args:
        text: the stage's text config.
        clip_length: context length of the CLIP.
    """
    is_longer = reads_ids(text) and text.context_length > clip_length
    return text.context_length if is_longer else None


def reads_ids(text: Any) -> bool:
    """Whether a stage with this text config reads token ids from the data."""
    return text.kind in KINDS_WITH_TOKENS and not has_own_tokenizer(text)


def has_own_tokenizer(text: Any) -> bool:
    """Whether a stage with this text config reads no tokens of CLIP's vocabulary."""
    return getattr(text, "tokenizer", "clip") != "clip"


def caption_inputs(batch: Mapping[str, Any], text: Any) -> dict[str, Tensor | None]:
    """`tokens`, `mask` and `states` of a batch as the networks take them.

    Args:
        batch: if it has `text_tokens` (B, L) and the stage reads token ids, these replace `tokens`
            and `text_mask`.
        text: the stage's text config.
    """
    own = batch.get("text_tokens") if text.kind in KINDS_WITH_TOKENS else None
    reads_clip = own is None and not has_own_tokenizer(text)
    return {
        "tokens": batch.get("tokens") if reads_clip else own,
        "mask": batch.get("text_mask") if reads_clip else None,  # up to the end token
        "states": batch.get("text_states"),
    }
