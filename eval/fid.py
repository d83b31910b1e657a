"""How far generated images lie from a reference: the Frechet distance of their features (FID:
Inception's), KID, CMMD, precision and recall.

The images are those of a folder or of shards (--images), or drawn by a model (--ckpt) for captions.
"""

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from eval.common import Figures, add_features, command, features_of, parser, table
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from eval.features import Features
    from eval.folders import Pictures, Source


def arguments() -> argparse.ArgumentParser:
    from eval.source import add_arguments

    made = parser(__doc__, "eval.fid")
    add_arguments(made)
    made.add_argument(
        "--reference",
        help="the real images: a folder or shards; with --ckpt by default those of the captions' "
        "shards",
    )
    add_features(made)
    made.add_argument(
        "--bootstrap",
        type=int,
        default=100,
        help="halves of the sets that are drawn for the interval of the Frechet distance; 0: no "
        "interval",
    )
    return made


def run(given: argparse.Namespace) -> Figures:
    """The figures of both sets, over all ranks; rank 0 prints them as a table."""
    from eval.extract import extract, reference
    from eval.features import named
    from eval.source import open_source

    source = open_source(given)
    real = reference_of(given, source)
    network = named(features_of(given), given.device, given.precision)
    features = (
        reference(network, real, given.batch_size),
        extract(network, source, given.batch_size, "images"),
    )
    figures = judge(network, *features, given.bootstrap, given.seed, given.device)
    said = {
        "images": source.name,
        "reference": real.name,
        "reference_size": real.size,
        "features": network.name,
        "dim": network.dim,
    }
    if rank() == 0:
        print(table([(name, str(value)) for name, value in said.items()] + rows(figures)))
    return (
        said
        | figures
        | {"bad": len(source) - figures["n_fake"], "bad_reference": len(real) - figures["n_real"]}
    )


def reference_of(given: argparse.Namespace, source: "Source") -> "Pictures":
    """The real images, cut to --reference-size or to the side of what is judged.

    They are those that are named, else those that belong to the captions.
    """
    from eval.folders import Pictures
    from eval.source import Drawn
    from unclip_pl.data.openmoji import openmoji_shards
    from unclip_pl.data.openmoji_drawings import STYLES

    where = given.reference
    if where is None and isinstance(source, Drawn):
        captions = given.captions or "openmoji"
        if captions in STYLES:
            where = str(openmoji_shards(source.size, name=captions) / "val-*.tar")
        elif not captions.endswith((".txt", ".json")):
            where = captions
    if where is None:
        raise UserError(
            "There is nothing to compare the images with: name the real ones with --reference, a "
            "folder or shards."
        )
    judged = source.size if isinstance(source, Drawn) else getattr(source, "side", None)
    size = given.reference_size or judged
    return Pictures(where, rank(), world_size(), given.max_bad_rate, size=size)


def judge(
    network: "Features",
    real: "Tensor",
    fake: "Tensor",
    bootstrap: int = 100,
    seed: int = 0,
    device: str = "cpu",
) -> Figures:
    """All distances between the features of a reference (N, D) and of generated images (M, D), each
    rank's share.

    `cmmd` is of CLIP's features only. `device` computes; where ranks meet by NCCL it must be a GPU.
    """
    from eval import metrics

    chosen: list[metrics.TwoSets] = [
        metrics.FrechetDistance(network.dim, network.frechet),
        metrics.KernelDistance(network.dim),
        metrics.PrecisionRecall(network.dim),
    ]
    if network.is_clip:
        chosen.append(metrics.CMMD(network.dim))
    if bootstrap > 0:
        chosen.append(metrics.FrechetSpread(network.dim, bootstrap, seed, network.frechet))
    figures: Figures = {}
    for metric in chosen:
        metric.to(device if device.startswith("cuda") else "cpu")  # others have no float64
        metric.update(real, real=True)
        metric.update(fake, real=False)
        figures |= metric.compute()
    return figures | {"said": metrics.of_sizes(network.dim, figures["n_real"], figures["n_fake"])}


def rows(figures: Figures) -> list[tuple[str, str]]:
    """The figures for the eye."""
    from eval.metrics import FRECHET, frechet_key

    key = frechet_key(figures)
    value, title = f"{figures[key]:.4f}", FRECHET[key]
    if f"{key}_low" in figures:
        value += f"  [{figures[f'{key}_low']:.4f}, {figures[f'{key}_high']:.4f}] of 95 %"
    made = [
        ("sizes", f"{figures['n_fake']} images, {figures['n_real']} of reference"),
        (title, value),
    ]
    if figures.get(f"{key}_infinity") is not None:
        made.append(
            (
                f"{title}, no bias",
                f"{figures[f'{key}_infinity']:.4f} (extended to sets without end)",
            )
        )
    made.append(("KID x 1000", f"{1000 * figures['kid']:.4f} +- {1000 * figures['kid_se']:.4f}"))
    if "cmmd" in figures:
        made.append(("CMMD", f"{figures['cmmd']:.4f}"))
    return [
        *made,
        ("precision", f"{figures['precision']:.4f}"),
        ("recall", f"{figures['recall']:.4f}"),
    ]


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
