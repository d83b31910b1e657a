"""How far generated images are from a reference.

Figures are the Frechet distance of their features (FID with Inception's features), KID, CMMD,
precision and recall.

The images are those of a folder or of shards (--images), or drawn by a model (--decoder) for
captions.
"""

import argparse
import logging
import sys

from eval.commands import (
    Figures,
    add_features_options,
    add_resamples_option,
    aligned,
    choose_features,
    command_parser,
    run_command,
)
from eval.evaluator import compute_distances, shared_clip_warnings
from eval.extract import extract_features, reference_features
from eval.features import load_features
from eval.generated import GeneratedImages
from eval.metrics import FRECHET, frechet_key
from eval.source import (
    DEFAULT_CAPTIONS,
    add_source_options,
    conditioning_clip,
    drawn_settings,
    open_source,
)
from eval.stored import ImageSource, StoredImages
from unclip_pl.data.openmoji import openmoji_shards
from unclip_pl.data.openmoji_drawings import STYLES
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Make the parser: which images, which reference, and which features."""
    parser = command_parser(__doc__, "eval.fid")
    add_source_options(parser)
    parser.add_argument(
        "--reference",
        help="the real images: a folder or shards; with --decoder by default those of the "
        "captions' shards",
    )
    add_features_options(parser)
    add_resamples_option(parser, default=100)
    return parser


def run(arguments: argparse.Namespace) -> Figures:
    """The figures of both sets, over all ranks; rank 0 prints them as a table."""
    source = open_source(arguments)
    real = open_reference(arguments, source)
    captions = None if arguments.images else arguments.captions or DEFAULT_CAPTIONS
    network = load_features(
        choose_features(arguments.features, captions), arguments.device, arguments.precision
    )
    notes = shared_clip_warnings(conditioning_clip(source), features=network.fingerprint)
    figures = compute_distances(
        network,
        reference_features(network, real, arguments.batch_size),
        extract_features(network, source, arguments.batch_size, "images"),
        arguments.resamples,
        arguments.seed,
        arguments.device,
    )
    settings = {
        "images": source.name,
        "reference": real.name,
        "reference_size": real.size,
        "features": network.name,
        "dim": network.dim,
    }
    notes += figures["notes"]
    if rank() == 0:
        lines = [(name, str(value)) for name, value in settings.items()] + rows(figures)
        print("\n".join([aligned(lines), *notes]))
    bad = {
        "bad": len(source) - figures["n_fake"],
        "bad_reference": len(real) - figures["n_real"],
    }
    return settings | figures | bad | {"notes": notes, "drawn": drawn_settings(source)}


def open_reference(arguments: argparse.Namespace, source: ImageSource) -> StoredImages:
    """The real images: those of --reference, else those that belong to the captions.

    They are cut to --reference-size, else to the side of the images that are evaluated.
    """
    path = arguments.reference
    if path is None and isinstance(source, GeneratedImages):
        captions = arguments.captions or DEFAULT_CAPTIONS
        if captions in STYLES:
            path = str(openmoji_shards(source.size, name=captions) / "val-*.tar")
        elif not captions.endswith((".txt", ".json")):
            path = captions
    if path is None:
        raise UserError(
            "There is nothing to compare the images with: name the real ones with --reference, a "
            "folder or shards."
        )
    if isinstance(source, GeneratedImages):
        side: int | None = source.size
    else:
        side = getattr(source, "side", None)
    size = arguments.reference_size or side
    return StoredImages(path, rank(), world_size(), arguments.max_bad_rate, size=size)


def rows(figures: Figures) -> list[tuple[str, str]]:
    """The lines of the printed table."""
    key = frechet_key(figures)
    title, value = FRECHET[key], f"{figures[key]:.4f}"
    if f"{key}_low" in figures:
        value += f"  [{figures[f'{key}_low']:.4f}, {figures[f'{key}_high']:.4f}] of 95 %"
    lines = [
        ("sizes", f"{figures['n_fake']} images, {figures['n_real']} of reference"),
        (title, value),
    ]
    infinity = figures.get(f"{key}_infinity")
    if infinity is not None:
        lines.append((f"{title}, no bias", f"{infinity:.4f} (extrapolated to infinite sets)"))
    lines.append(("KID x 1000", f"{1000 * figures['kid']:.4f} +- {1000 * figures['kid_se']:.4f}"))
    for name, title in {"cmmd": "CMMD", "precision": "precision", "recall": "recall"}.items():
        if name in figures:
            lines.append((title, f"{figures[name]:.4f}"))
    return lines


def main(words: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_command(build_parser(), run, words)


if __name__ == "__main__":
    sys.exit(main())
