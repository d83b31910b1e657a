"""Whether a DataModule gives what a stage is built for; each check raises one sentence."""

from typing import Any

from torch import Tensor

from unclip_pl.networks.long_text import (
    VOCABULARY,
    has_own_tokenizer,
    reads_ids,
    text_tokens_length,
)
from unclip_pl.utils.errors import UserError


def empty_caption(clip: Any) -> tuple[Tensor, Tensor]:
    """What a `FrozenCLIP` gives for "": states (2, W) of SOT and EOT, and the embedding (D,)."""
    features = clip.embed_text(clip.tokenize([""]))
    return features.states[0, :2], features.embed[0]


def check_clip(data: Any, embed_dim: int, text: Any) -> None:
    """Check the widths of the data's CLIP.

    Args:
        data: the DataModule.
        embed_dim: of the stage's network.
        text: the stage's text config.

    Raises:
        UserError: the CLIP has embeddings or token states of another width, or the data give no
            token states.
    """
    clip = data.clip
    if clip.embed_dim != embed_dim:
        raise UserError(
            f"The CLIP of the data gives embeddings of {clip.embed_dim} numbers and "
            f"model.net.embed_dim is {embed_dim}: set it to {clip.embed_dim}."
        )
    if text.kind == "states" and not data.text_states:
        raise UserError(
            'model.text.kind is "states", for which the data must give CLIP\'s token states: set '
            "data.text_states to true."
        )
    if text.kind == "states" and clip.states_width != text.states_width:
        raise UserError(
            f"The CLIP of the data has token states of {clip.states_width} numbers and "
            f"model.text.states_width is {text.states_width}: set it to {clip.states_width}."
        )


def check_captions(data: Any) -> None:
    """UserError where the data lack captions, for a stage that reads them.

    A DataModule that says that it reads captions has checked them itself.
    """
    if not getattr(data, "reads_captions", True):
        data.require_captions()


def check_length(data: Any, text: Any) -> None:
    """UserError where the data's CLIP has longer captions than the text config has positions."""
    if (length := data.clip.context_length) > text.context_length:
        raise UserError(
            f"The CLIP of the data has captions of {length} tokens and model.text.context_length "
            f"is {text.context_length}: set it to {length}."
        )


def check_tokens(data: Any, text: Any) -> None:
    """Check the token ids of a stage: CLIP's, or `text_tokens` where its context is longer.

    Raises:
        UserError: the text config has no embedding for some ids; or the DataModule gives no
            `text_tokens` (see `long_text`) to fill its context, or some that the stage does not
            read.
    """
    clip_length = data.clip.context_length
    data_length = getattr(data, "text_length", None)
    needed = text_tokens_length(text, clip_length)
    if reads_ids(text):
        tokenizer, ids = "tokenizer of whole captions", VOCABULARY
        if needed is None:
            tokenizer, ids = "CLIP of the data", data.clip.vocab_size
        if text.vocab_size < ids:
            raise UserError(
                f"model.text.vocab_size is {text.vocab_size}, and the {tokenizer} has {ids} ids: "
                "set it to that."
            )
    if needed == data_length:
        return
    if needed is None:
        reads = f"reads the CLIP's own {clip_length} tokens"
        if has_own_tokenizer(text):
            reads = "tokenises captions itself"
        raise UserError(
            f"data.text_length is {data_length}, and the stage {reads}: set it to null."
        )
    raise UserError(
        f"model.text.context_length is {needed}, and the CLIP of the data has captions of "
        f"{clip_length} tokens: set data.text_length to {needed}, so that the data tokenise whole "
        "captions for the stage as well."
    )
