"""`unclip import`: releases of ours from the weights of other projects."""

from pathlib import Path
from typing import Literal

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.outputs import require_new, require_writable


def karlo(
    folder: Path,
    *,
    clip: str | None = None,
    clip_weights: str | None = None,
    out: Path,
    precision: Literal["fp16", "fp32"] = "fp16",
) -> None:
    """Karlo: a CLIP, a prior, a decoder and an upsampler to 256 pixels.

    They come from diffusers' folder or from Karlo's own .ckpt and .th files, to draw with and to
    train on from.

    Args:
        folder: with model_index.json, or with the .ckpt files
        clip: the CLIP of the weights, where the folder has none whole: an open_clip name
            (ViT-L-14-quickgelu) or local-dir:/folder
        clip_weights: with an open_clip name: a tag (openai) or a file
        out: the new folder
        precision: of the releases; fp32 keeps float32 weights to the bit
    """
    if clip_weights and not clip:
        raise UserError("--clip-weights are those of --clip: name that as well.")
    check_places(folder, out)
    from unclip_pl.clip.config import CLIPConfig
    from unclip_pl.pipeline.interop.importing import import_karlo

    config = CLIPConfig(clip, clip_weights) if clip else None
    report(import_karlo(folder, out, config, precision))


def kandinsky_prior(
    folder: Path, *, out: Path, precision: Literal["fp16", "fp32"] = "fp16"
) -> None:
    """The prior of Kandinsky 2.2 (or 2.1) and its CLIP, from diffusers' folder.

    Captions become embeddings of ViT-bigG/14. Kandinsky's decoder is another network and is not
    imported.

    Args:
        folder: with model_index.json
        out: the new folder
        precision: of the releases; fp32 keeps float32 weights to the bit
    """
    check_places(folder, out)
    from unclip_pl.pipeline.interop.importing import import_kandinsky_prior

    report(import_kandinsky_prior(folder, out, precision))


def glide(
    weights: Path,
    *,
    tokenizer: Path | None = None,
    out: Path,
    precision: Literal["fp16", "fp32"] = "fp16",
) -> None:
    """GLIDE's base model: a decoder of 64 pixels that reads captions only.

    Draw with it by `unclip generate --condition caption`. GLIDE's upsampler and inpainting models
    are other networks and are not imported.

    Args:
        weights: base.pt, or a folder with it
        tokenizer: a folder with vocab.json and merges.txt of GPT-2, or encoder.json.gz and
            vocab.bpe.gz of GLIDE; by default the folder of the weights
        out: the new folder
        precision: of the release; fp32 keeps float32 weights to the bit
    """
    require_new(out)
    require_writable(out.parent)
    if not weights.exists():
        raise UserError(f"There is no {weights}: give GLIDE's base.pt, or a folder with it.")
    from unclip_pl.pipeline.interop.importing import import_glide

    report([import_glide(weights, out, tokenizer, precision)])


def check_places(folder: Path, out: Path) -> None:
    """Raise a UserError where there is nothing to read, or nothing can be written."""
    require_new(out)
    require_writable(out.parent)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give the folder with the model's files.")


def report(written: list[Path]) -> None:
    """Print the folders that were written and their sizes."""
    for folder in written:
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        print(f"{folder}: {size:.1f} MB")
