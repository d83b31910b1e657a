"""Tokens of captions, as CLIP's tokenizer gives them."""

import torch
from torch import Tensor


def caption_mask(tokens: Tensor, end_token: int | None = None) -> Tensor:
    """True up to and including the end token. (B, L) int64 -> (B, L) bool.

    Where the end token is also the padding, its first position counts.

    Args:
        tokens: of captions.
        end_token: its id; None: the largest id of a caption, as in CLIP's own vocabulary.
    """
    is_end = tokens if end_token is None else (tokens == end_token).int()
    end = is_end.argmax(dim=1, keepdim=True)
    return torch.arange(tokens.shape[1], device=tokens.device) <= end
