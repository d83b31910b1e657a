"""`python -m eval.fid`: how far generated images lie from a reference."""

import logging
import sys
from dataclasses import asdict

from eval.commands import (
    FeatureOptions,
    Figures,
    Resamples,
    RunOptions,
    aligned,
    choose_features,
    run_command,
)
from eval.evaluator import compute_distances, shared_clip_warnings
from eval.extract import extract_features, reference_features
from eval.features import load_features
from eval.floor import floor_or_note, gather_stored
from eval.generated import GeneratedImages
from eval.metrics import FRECHET, frechet_key
from eval.source import (
    DEFAULT_CAPTIONS,
    SourceOptions,
    conditioning_clip,
    drawn_settings,
    open_source,
)
from eval.stored import ImageSource, StoredImages
from eval.tables import FLOOR_TITLE, floor_cells
from unclip_pl.data.openmoji import openmoji_shards
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError


def run(
    *,
    source: SourceOptions,
    reference: str | None = None,
    floor: str | None = None,
    judging: FeatureOptions,
    resamples: Resamples = 100,
    options: RunOptions,
) -> Figures:
    """How far generated images lie from a reference.

    The Frechet distance of their features (FID with Inception's features), KID, CMMD, precision
    and recall. The images are those of a folder or of shards (--images), or drawn by a model
    (--decoder) for captions.

    Args:
        reference: the real images: a folder or shards; with --decoder by default those of the
            captions' shards
        floor: more real images, a folder or shards, for the figures of real ones against real ones
        resamples: random halves of the sets, for the interval of the Frechet distance; 0: no
            interval
        source: which images are evaluated
        judging: how images are compared with real ones
        options: where and how it runs
    """
    captions = None if source.images else source.captions or DEFAULT_CAPTIONS
    require_reference(reference, captions, source)
    if floor is not None:
        StoredImages(floor, max_bad_rate=source.max_bad_rate)  # refuses a folder without images
    images = open_source(source, options)
    real = open_reference(reference, judging.reference_size, source, images)
    network = load_features(
        choose_features(judging.features, captions), options.device, options.precision
    )
    notes = shared_clip_warnings(conditioning_clip(images), features=network.fingerprint)
    others = None
    if floor is not None:
        more = StoredImages(floor, rank(), world_size(), source.max_bad_rate, size=real.size)
        others = gather_stored(network, more, options)
    figures = compute_distances(
        network,
        reference_features(network, real, options.batch_size),
        extract_features(network, images, options.batch_size, "images"),
        resamples,
        options.seed,
        options.device,
    )
    sizes = figures["n_fake"], figures["n_real"]
    real_floor, missing = floor_or_note(others, *sizes, network.frechet, options.seed)
    notes += missing
    settings = {
        "images": images.name,
        **({"captions_from": captions} if captions else {}),
        "reference": real.name,
        "reference_size": real.size,
        "features": network.name,
        "dim": network.dim,
    }
    notes += figures["notes"]
    if rank() == 0:
        lines = [(name, str(value)) for name, value in settings.items()] + rows(figures)
        if real_floor is not None:
            cells = ", KID x 1000 ".join(floor_cells(real_floor, network.frechet))
            lines.append((FLOOR_TITLE, cells))
        print("\n".join([aligned(lines), *notes]))
    bad = {
        "bad": len(images) - figures["n_fake"],
        "bad_reference": len(real) - figures["n_real"],
    }
    return {
        **settings,
        **figures,
        **bad,
        "floor": None if real_floor is None else asdict(real_floor),
        "notes": notes,
        "drawn": drawn_settings(images),
    }


def require_reference(path: str | None, captions: str | None, source: SourceOptions) -> None:
    """UserError where there are no real images, before anything is loaded or drawn.

    Args:
        path: of --reference.
        captions: what is drawn; None: --images are evaluated.
        source: the options.
    """
    if path is not None:
        StoredImages(path, max_bad_rate=source.max_bad_rate)
    elif captions is None or captions.endswith((".txt", ".json")):
        raise UserError(
            "There is nothing to compare the images with: name the real ones with --reference, a "
            "folder or shards."
        )


def open_reference(
    path: str | None, size: int | None, source: SourceOptions, images: ImageSource
) -> StoredImages:
    """The real images: those of --reference, else those that belong to the captions.

    They are cut to --reference-size, else to the side of the images that are evaluated.
    """
    if path is None and isinstance(images, GeneratedImages):
        captions = source.captions or DEFAULT_CAPTIONS
        if captions == "openmoji":
            path = str(openmoji_shards(images.size) / "val-*.tar")
        elif not captions.endswith((".txt", ".json")):
            path = captions
    assert path is not None  # see `require_reference`
    if isinstance(images, GeneratedImages):
        side: int | None = images.size
    else:
        side = getattr(images, "side", None)
    return StoredImages(path, rank(), world_size(), source.max_bad_rate, size=size or side)


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
    return run_command(run, "eval.fid", words)


if __name__ == "__main__":
    sys.exit(main())
