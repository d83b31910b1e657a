"""`unclip import`: releases of ours from the weights of other projects."""

import argparse
from pathlib import Path

from unclip_pl.cli.options import AddCommand


def add(command: AddCommand) -> None:
    """The commands of `unclip import`."""
    karlo = command(
        "karlo",
        run_karlo,
        "Karlo, from diffusers' folder or from its own .ckpt and .th files: a CLIP, a prior, a "
        "decoder and an upsampler to 256 pixels, to draw with and to train on from.",
    )
    karlo.add_argument("folder", type=Path, help="with model_index.json, or with the .ckpt files")
    karlo.add_argument(
        "--clip",
        help="the CLIP of the weights, where the folder has none whole: an open_clip name "
        "(ViT-L-14-quickgelu) or local-dir:/folder",
    )
    karlo.add_argument("--clip-weights", help="with an open_clip name: a tag (openai) or a file")
    kandinsky = command(
        "kandinsky-prior",
        run_kandinsky_prior,
        "The prior of Kandinsky 2.2 (or 2.1) from diffusers' folder, and its CLIP: captions to "
        "embeddings of ViT-bigG/14. Kandinsky's decoder is another network and is not imported.",
    )
    kandinsky.add_argument("folder", type=Path, help="with model_index.json")
    for parser in (karlo, kandinsky):
        parser.add_argument("--out", type=Path, required=True, help="the new folder")
        parser.add_argument(
            "--precision",
            choices=["fp16", "fp32"],
            default="fp16",
            help="of the releases; fp32 keeps float32 weights to the bit",
        )


def run_karlo(arguments: argparse.Namespace) -> None:
    from unclip_pl.clip.config import CLIPConfig
    from unclip_pl.pipeline.interop.importing import import_karlo
    from unclip_pl.utils.errors import UserError

    if arguments.clip_weights and not arguments.clip:
        raise UserError("--clip-weights are those of --clip: name that as well.")
    clip = CLIPConfig(arguments.clip, arguments.clip_weights) if arguments.clip else None
    report(import_karlo(arguments.folder, arguments.out, clip, arguments.precision))


def run_kandinsky_prior(arguments: argparse.Namespace) -> None:
    from unclip_pl.pipeline.interop.importing import import_kandinsky_prior

    report(import_kandinsky_prior(arguments.folder, arguments.out, arguments.precision))


def report(written: list[Path]) -> None:
    """Print the folders that were written and their sizes."""
    for folder in written:
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        print(f"{folder}: {size:.1f} MB")
