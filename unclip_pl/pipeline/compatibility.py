"""What must fit together: the stages and their CLIP; captions, embeddings and seeds."""

import logging
from collections.abc import Sequence, Sized

import torch

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.networks.long_text import has_own_tokenizer
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
Prior = DiffusionPrior | ARPrior


def check_same_length(captions: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise a ValueError unless there is one seed per caption, and at least one caption."""
    if len(captions) == len(seeds) == 0:
        raise ValueError("No captions and no seeds were given: give at least one of each.")
    if len(captions) != len(seeds):
        raise ValueError(
            f"{len(captions)} captions and {len(seeds)} seeds were given: give one seed per "
            "caption."
        )


def check_counts(pictures: int, **given: Sized | None) -> None:
    """Raise a ValueError unless pictures are drawn, and one thing of each kind given for each.

    Args:
        pictures: how many are drawn.
        given: things by the name of their kind, such as `captions`; None: there are none.
    """
    if pictures < 1:
        raise ValueError("No seeds were given: give one for each picture, and at least one.")
    for name, things in given.items():
        if things is not None and len(things) != pictures:
            raise ValueError(
                f"{pictures} pictures are asked for, one per seed, and {len(things)} {name} were "
                "given: give one for each picture."
            )


def check_prior(decoder: Decoder, prior: Prior | None) -> None:
    """UserError where there is a prior, and the decoder takes no image embedding."""
    if prior is None or decoder.condition == "image":
        return
    if decoder.condition == "text":
        raise UserError(
            "The decoder was trained on text embeddings and has no use for a prior: leave the "
            'prior out and condition on "text".'
        )
    raise UserError(
        "The decoder reads captions only and has no use for a prior: leave the prior out and draw "
        'with condition "caption" (unclip generate --condition caption).'
    )


def require_embeddings(decoder: Decoder) -> None:
    """UserError for a decoder that draws from captions only."""
    if decoder.condition == "none":
        raise UserError(
            "The decoder reads captions only and takes no embedding of a picture or a text: draw "
            'captions with condition "caption", or use a decoder that was trained on embeddings.'
        )


def cut_note(decoder: Decoder, clip: FrozenCLIP, caption: str) -> str:
    """A sentence without its full stop on what is not read of a long caption; "": all is read."""
    if has_own_tokenizer(decoder.text_config):
        reader, length = "the decoder", decoder.text_config.context_length
        cut = decoder.text.truncated_text(caption)
    else:
        reader, length, cut = "CLIP", clip.context_length, clip.truncated_text(caption)
    if not cut:
        return ""
    cut = cut if len(cut) <= 60 else f"{cut[:57]}..."
    return f'"{caption[:40]}..." is longer than {reader} reads ({length} tokens), cut: "{cut}"'


def shared_clip(
    decoder: Decoder, prior: Prior | None, clip: FrozenCLIP | None, device: torch.device
) -> FrozenCLIP:
    """The CLIP with which both stages were trained, on `device`.

    For a decoder that sees none it is the one in the package, which compares pictures and captions.

    Args:
        decoder: its fingerprint says which CLIP it is.
        prior: must have been trained with the same CLIP; None: there is no prior.
        clip: the CLIP to check; None: it is built from the decoder's fingerprint.
        device: where it goes.

    Raises:
        UserError: a stage does not say which CLIP it is, or was trained with another one.
    """
    stages: dict[str, Stage] = {}
    if decoder.reads_clip:
        stages["decoder"] = decoder
    if prior is not None:
        stages["prior"] = prior
    for name, stage in stages.items():
        fingerprint = stage.clip_fingerprint
        if fingerprint is None:
            raise UserError(
                f"The {name} does not say with which CLIP it was trained: train it with "
                "`lightning fit`, which keeps that."
            )
        if clip is None:
            clip = FrozenCLIP(CLIPConfig.of_fingerprint(fingerprint), device)
        clip.to(device)
        require_same(fingerprint, clip.fingerprint(), f"The {name}")
    return FrozenCLIP(device=device) if clip is None else clip.to(device)


def warn_without_variance(prior: Prior | None) -> None:
    """Log a warning where the analytic sampler has no variances yet."""
    if not isinstance(prior, DiffusionPrior) or prior.sampling.sampler != "analytic":
        return
    if bool(prior.x0_error.isnan().any()):
        log.warning(
            "The prior has no analytic variance, which is estimated when training ends: it draws "
            "with the variance of plain DDPM."
        )
