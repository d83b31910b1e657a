"""open_clip's text tower: the embedding and the token states of captions in one pass."""

from typing import Any

import torch
from torch import Tensor, nn


def text_pooling(model: Any) -> tuple[str, int]:
    """How the text tower finds its embedding among the states, and the id of the end token.

    Returns the kind of pooling ("argmax", "eos", ...) and the id, which matters only for "eos".
    """
    if hasattr(model, "text"):
        return getattr(model.text, "pool_type", "none"), getattr(model.text, "eos_id", -1)
    return model.text_pool_type, model.text_eos_id


def text_features(model: Any, tokens: Tensor, end_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A model's text embeddings (B, D) and token states after the final norm (B, n, W).

    Args:
        model: open_clip's, with a text tower that `load_model` accepts.
        tokens: (B, L) int64, L being the context length.
        end_B: (B,) int64, the position of the end token in each caption.
        length: of the longest caption. What follows is left out (n = `length`) unless tokens see
            those after them (then n = L).
    """
    text = getattr(model, "text", model)
    if length == text.context_length or text.attn_mask is None:
        output = model.forward_intermediates(
            text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
        )
        return output["text_features"], output["text_intermediates"][-1]
    return _short_text_features(text, tokens[:, :length], end_B)


def _short_text_features(text: Any, tokens: Tensor, end_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same by hand, because open_clip runs captions of the full context length only.

    A caption of 8 tokens would take as long as one of 77.
    """
    length, dtype = tokens.shape[1], text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
    states_BLW = text.ln_final(x)
    embed = states_BLW[torch.arange(len(tokens), device=tokens.device), end_B]
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        return projection(embed), states_BLW
    if projection is not None:
        return embed @ projection, states_BLW
    return embed, states_BLW
