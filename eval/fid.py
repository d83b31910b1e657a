"""How far generated images lie from a reference: FID (the Frechet distance of their features), KID, CMMD, precision and recall."""

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from eval.common import Figures, command, parser, rank, table, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from eval.features import Features


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, "eval.fid")
    made.add_argument("--images", required=True, help="the generated images: a folder, or shards as 'data/{00000..00009}.tar'")
    made.add_argument("--reference", required=True, help="the real ones: a folder or shards; their features are kept in the cache")
    made.add_argument("--features", default="clip", help="clip (the embedded one), inception (clean-fid's), NAME/TAG of open_clip, or local-dir:/folder")
    made.add_argument("--bootstrap", type=int, default=100, help="sets drawn anew for the interval of FID; 0: no interval")
    made.add_argument("--max-bad-rate", type=float, default=0.01, help="largest share of images that may be unreadable")
    return made


def run(given: argparse.Namespace) -> Figures:
    """The figures of both sets, over all ranks; rank 0 prints them as a table."""
    from eval.extract import extract, reference
    from eval.features import named
    from eval.folders import Pictures

    images, real = (Pictures(where, rank(), world_size(), given.max_bad_rate) for where in (given.images, given.reference))
    network = named(given.features, given.device, given.precision)
    features = reference(network, real, given.batch_size), extract(network, images, given.batch_size, "images")
    figures = judge(network, *features, given.bootstrap, given.seed)
    said = {"images": images.name, "reference": real.name, "features": network.name, "dim": network.dim}
    if rank() == 0:
        print(table([(name, str(value)) for name, value in said.items()] + rows(figures)))
    return said | figures | {"bad": len(images) - figures["n_fake"], "bad_reference": len(real) - figures["n_real"]}


def judge(network: "Features", real: "Tensor", fake: "Tensor", bootstrap: int = 100, seed: int = 0) -> Figures:
    """All distances between the features of a reference (N, D) and of generated images (M, D), each rank's share; `cmmd` of CLIP's features alone."""
    import torch
    from torch import distributed

    from eval import metrics

    chosen: list[metrics.TwoSets] = [metrics.FrechetDistance(network.dim), metrics.KernelDistance(network.dim), metrics.PrecisionRecall(network.dim)]
    if network.is_clip:
        chosen.append(metrics.CMMD(network.dim))
    if bootstrap > 0:
        chosen.append(metrics.FrechetSpread(network.dim, bootstrap, seed))
    nccl = distributed.is_initialized() and distributed.get_backend() == "nccl"
    figures: Figures = {}
    for metric in chosen:
        if nccl or torch.cuda.is_available():
            metric.to("cuda")
        metric.update(real, real=True)
        metric.update(fake, real=False)
        figures |= metric.compute()
    return figures | {"said": metrics.of_sizes(network.dim, figures["n_real"], figures["n_fake"])}


def rows(figures: Figures) -> list[tuple[str, str]]:
    """The figures for the eye."""
    spread = f"  [{figures['fid_low']:.4f}, {figures['fid_high']:.4f}] of 95 %" if "fid_low" in figures else ""
    made = [("sizes", f"{figures['n_fake']} images, {figures['n_real']} of reference"), ("FID", f"{figures['fid']:.4f}{spread}")]
    if figures.get("fid_infinity") is not None:
        made.append(("FID, no bias", f"{figures['fid_infinity']:.4f} (extended to sets without end)"))
    made.append(("KID x 1000", f"{1000 * figures['kid']:.4f} +- {1000 * figures['kid_se']:.4f}"))
    if "cmmd" in figures:
        made.append(("CMMD", f"{figures['cmmd']:.4f}"))
    return [*made, ("precision", f"{figures['precision']:.4f}"), ("recall", f"{figures['recall']:.4f}")]


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
