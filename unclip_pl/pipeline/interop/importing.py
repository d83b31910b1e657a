"""Releases of ours from others' weights: `import_karlo`, `import_kandinsky_prior`, ..."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.fingerprint import Fingerprint
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.pipeline import release
from unclip_pl.pipeline.hub import SIBLING_CLIP, copy_clip, model_card, write_parts
from unclip_pl.pipeline.interop import glide, kandinsky, karlo, karlo_original
from unclip_pl.pipeline.interop.cards import glide_card, kandinsky_card, karlo_card
from unclip_pl.pipeline.interop.files import sensible
from unclip_pl.pipeline.interop.karlo import Part
from unclip_pl.pipeline.interop.keys import (
    Layout,
    Names,
    fill,
    glide_names,
    prior_names,
    text_proj_names,
    unet_names,
)
from unclip_pl.pipeline.interop.towers import convert_towers, require_same_text_tower
from unclip_pl.pipeline.release import Release
from unclip_pl.stages.base import Stage
from unclip_pl.stages.data_checks import empty_caption
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder
from unclip_pl.utils.outputs import require_new

Precision = Literal["fp16", "fp32"]


def import_karlo(
    folder: Path, out: Path, clip: CLIPConfig | None = None, precision: Precision = "fp16"
) -> list[Path]:
    """Write `clip`, `prior`, `decoder` and `upsampler-256` below `out`, all of them or nothing.

    One network is in memory at a time, in the type of its files.

    Args:
        folder: of diffusers' layout (model_index.json), or with Karlo's own `.ckpt` and `.th`.
        out: a new folder. Without a prior in `folder` (image variations) it has none either.
        clip: the CLIP of the weights, which is copied to `out`; None: that of `folder`.
        precision: of the releases: "fp32" keeps float32 weights to the bit.

    Returns:
        the folders of the CLIP and the releases.

    Raises:
        UserError: one sentence says what is missing, damaged, or of another model.
    """
    _check_places(folder, out)
    original = not (folder / "model_index.json").exists() and karlo_original.is_original(folder)
    with sensible(str(folder)):
        parts = karlo_original.read_files(folder) if original else karlo.read_folder(folder)
    layout: Layout = "karlo" if original else "diffusers"
    with atomic_folder(out) as temporary:
        _write_clip(folder, temporary / "clip", clip)
        _write_parts(parts, layout, temporary, precision, partial(karlo_card, folder))
        names = [part.name for part in parts]
        write_parts(temporary, names, model_card(out.name, names))
    return [out / name for name in ("clip", *(part.name for part in parts))]


def import_kandinsky_prior(folder: Path, out: Path, precision: Precision = "fp16") -> list[Path]:
    """Write `clip` and `prior` of Kandinsky below `out`, both or nothing.

    Args:
        folder: of diffusers' layout, with prior, scheduler, text_encoder and image_encoder.
        out: a new folder.
        precision: of the release: "fp32" keeps float32 weights to the bit.

    Returns:
        the folders of the CLIP and the prior.

    Raises:
        UserError: one sentence says what is missing, damaged, or of another model.
    """
    _check_places(folder, out)
    with sensible(str(folder)):
        parts = kandinsky.read_folder(folder)
    with atomic_folder(out) as temporary:
        convert_towers(folder / "text_encoder", folder / "image_encoder", temporary / "clip")
        _write_parts(parts, "diffusers", temporary, precision, partial(kandinsky_card, folder))
    return [out / "clip", out / "prior"]


def import_glide(
    weights: Path, out: Path, tokenizer: Path | None = None, precision: Precision = "fp16"
) -> Path:
    """Write GLIDE's base model as a release of a decoder that reads captions only, or nothing.

    Args:
        weights: base.pt, or a folder with it.
        out: a new folder.
        tokenizer: a folder with GPT-2's tokenizer, or GLIDE's copy of it; None: that of `weights`.
        precision: of the release: "fp32" keeps float32 weights to the bit.

    Returns:
        the release's folder.

    Raises:
        UserError: one sentence says what is missing, damaged, or of another model.
    """
    require_new(out)
    if not weights.exists():
        raise UserError(f"There is no {weights}: give GLIDE's base.pt, or a folder with it.")
    with sensible(str(weights)):
        part, merges = glide.read(weights, tokenizer)
    stage, source = part.stage, part.sources["decoder"]
    assert isinstance(stage, Decoder)
    names = glide_names(stage.net_config, stage.text_config.depth)
    tensors = fill(stage.state_dict(), names, source, karlo_original.HEAD_WIDTH)
    tensors["text.encoder.merges"] = merges
    _save(stage, tensors, None, out, precision, glide_card(weights))
    return out


def _check_places(folder: Path, out: Path) -> None:
    require_new(out)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give the folder with the model's files.")


def _write_parts(
    parts: list[Part],
    layout: Layout,
    out: Path,
    precision: Precision,
    card: Callable[[str], str],
) -> None:
    """Write the releases below `out`, which has the CLIP; `card` makes the card of a part."""
    frozen = FrozenCLIP(CLIPConfig(model=f"local-dir:{out / 'clip'}"))
    _check_widths(frozen, parts)
    fingerprint = frozen.fingerprint()
    fingerprint["config"]["model"] = SIBLING_CLIP
    null = empty_caption(frozen)
    del frozen
    for part in parts:
        _write(part, layout, out, (fingerprint, null), precision, card(part.name))


def _write_clip(folder: Path, out: Path, clip: CLIPConfig | None) -> None:
    """The CLIP, as an open_clip folder: that of `folder`, or a copy of `clip`."""
    text = folder / "text_encoder"
    if clip is None and (folder / "image_encoder").is_dir():
        convert_towers(text, folder / "image_encoder", out)
        return
    own = folder / karlo_original.CLIP
    if clip is None and own.is_file():
        clip = CLIPConfig("ViT-L-14-quickgelu", str(own))
    if clip is None:
        raise UserError(
            f"{folder} has no image_encoder, so its CLIP cannot be made from it: name the CLIP "
            "(--clip ViT-L-14-quickgelu --clip-weights openai), or put the image_encoder of "
            "Karlo's image variations there."
        )
    frozen = FrozenCLIP(clip)
    if text.is_dir():
        require_same_text_tower(text, frozen.model, str(clip))
    copy_clip(frozen, out)


def _check_widths(clip: FrozenCLIP, parts: list[Part]) -> None:
    """UserError where the CLIP cannot be that of the weights."""
    for part in parts:
        stage = part.stage
        if not isinstance(stage, (DiffusionPrior, Decoder)):
            continue
        widths = stage.net_config.embed_dim, stage.text_config.states_width
        if widths != (clip.embed_dim, clip.states_width):
            raise UserError(
                f"The {part.name} takes embeddings of {widths[0]} and token states of {widths[1]} "
                f"numbers, and the CLIP gives {clip.embed_dim} and {clip.states_width}: give the "
                "CLIP that the weights were trained with (--clip)."
            )


def names_of(part: Part, layout: Layout) -> list[tuple[str, Names]]:
    """(source, names of the tensors in it) of a stage."""
    stage = part.stage
    if isinstance(stage, DiffusionPrior):
        found = [("prior", prior_names(stage.net_config.depth, layout))]
        if layout == "karlo":
            statistics: Names = {"normalizer.mean": ("mean",), "normalizer.std": ("std",)}
            found.append(("statistics", statistics))
        return found
    net = unet_names(stage.net_config, layout)  # type: ignore[arg-type]  # both others have one
    if isinstance(stage, Decoder):
        if layout == "karlo":
            return [("decoder", net | text_proj_names(layout))]
        return [("decoder", net), ("text_proj", text_proj_names(layout))]
    last = unet_names(stage.net_config, layout, "last_net.")  # type: ignore[arg-type]
    return [("super_res_first", net), ("super_res_last", last)]


def _write(
    part: Part,
    layout: Layout,
    out: Path,
    clip: tuple[Fingerprint, tuple[Tensor, Tensor]],
    precision: Precision,
    text: str,
) -> None:
    """One release below `out`."""
    stage, (fingerprint, (states, embed)) = part.stage, clip
    ours = stage.state_dict()
    head_width = karlo_original.HEAD_WIDTH if layout == "karlo" else None
    tensors: dict[str, Tensor] = {}
    for source, names in names_of(part, layout):
        tensors |= fill(ours, names, part.sources[source], head_width)
    if isinstance(stage, DiffusionPrior):
        tensors |= {"x0_error": torch.full(ours["x0_error"].shape, torch.nan)}
        tensors |= {"net.empty_states": states, "net.empty_text_embed": embed}
    elif isinstance(stage, Decoder):
        tensors |= {"text.encoder.null_states": states, "text.encoder.null_text_embed": embed}
    sees_clip = isinstance(stage, (DiffusionPrior, Decoder))
    _save(stage, tensors, fingerprint if sees_clip else None, out / part.name, precision, text)


def _save(
    stage: Stage,
    tensors: dict[str, Tensor],
    fingerprint: Fingerprint | None,
    out: Path,
    precision: Precision,
    text: str,
) -> None:
    """A release of a stage with these tensors, which are all that it has."""
    ours = stage.state_dict()
    tensors = tensors | {"skipped_steps": torch.zeros((), dtype=torch.int64)}
    assert tensors.keys() == ours.keys(), tensors.keys() ^ ours.keys()
    exact = set(tensors) if precision == "fp32" else {name for name, _ in stage.named_buffers()}
    for name in exact & tensors.keys():
        if tensors[name].is_floating_point():
            tensors[name] = tensors[name].float()
    made = Release(type(stage).__name__, dict(stage.hparams), fingerprint, tensors)
    release.write(out, made, text, exact=exact)
