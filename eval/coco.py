"""Zero-shot MS-COCO as in Table 2 of the paper: FID and CLIP score of images of 256 pixels.

One caption of each of --num-captions validation pictures is drawn by each prior at each guidance
scale, and compared with all validation pictures, cut to the same side. Images are kept in
OUT/samples: a run that was stopped goes on with those that are missing, and ranks (of torchrun or
srun) share them.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from eval import report
from eval.captions import Caption, one_per_picture, read_coco
from eval.coco_images import build_points
from eval.commands import (
    Figures,
    add_features_options,
    add_resamples_option,
    choose_features,
    command_parser,
    progress,
    run_command,
    settings_from,
)
from eval.evaluator import compute_distances, on_ranks_device, shared_clip_warnings
from eval.extract import reference_features
from eval.features import Features, clip_config, clip_features, load_features
from eval.metrics import FRECHET, CLIPScore, frechet_key
from eval.source import Model, decoder_path
from eval.stored import ImageSource, StoredImages
from eval.tables import clip_score
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import (
    add_prior_sampling_options,
    add_renamed,
    add_sampling_options,
    positive_int,
)

log = logging.getLogger(__name__)
SIDE = 256
"""Side of the images of the paper's table, in pixels."""


def build_parser() -> argparse.ArgumentParser:
    """Make the parser: the annotations, the pictures, and the models to evaluate on them."""
    parser = command_parser(__doc__, "eval.coco", batch_size=32)
    parser.set_defaults(out=Path("out/coco"))
    parser.add_argument(
        "--annotations", required=True, help="MS-COCO's captions: captions_val2014.json"
    )
    parser.add_argument("--images", required=True, help="the folder of its pictures: val2014/")
    parser.add_argument(
        "--num-captions",
        type=positive_int,
        default=30000,
        help="how many pictures have one of their captions drawn",
    )
    add_renamed(parser, "--count", "--num-captions")
    parser.add_argument(
        "--reference",
        choices=["all", "drawn"],
        default="all",
        help="compare with all pictures, as the paper does, or with those whose captions are drawn",
    )
    parser.add_argument(
        "--decoder",
        "--ckpt",
        default="openmoji",
        help='a checkpoint or release; "openmoji" is the one in the package',
    )
    parser.add_argument(
        "--priors",
        nargs="+",
        default=["diffusion", "ar"],
        metavar="PRIOR",
        help='"diffusion", "ar", those in the package; or checkpoints or releases, any number',
    )
    parser.add_argument(
        "--upsamplers",
        nargs="*",
        default=["256"],
        metavar="UPSAMPLER",
        help='"256", the one in the package; or checkpoints or releases, in order; '
        "nothing: the decoder's own images",
    )
    parser.add_argument(
        "--guidance-scales",
        type=float,
        nargs="+",
        default=[1.25],
        help="of the decoder: the paper's, or several to sweep",
    )
    add_sampling_options(parser, guidance=False)
    add_prior_sampling_options(parser)
    add_features_options(parser)
    parser.add_argument(
        "--score-clip",
        default="ViT-B-32-quickgelu/openai",
        help="the CLIP that scores, not the one that conditions: NAME/TAG of open_clip, "
        "local-dir:/folder, or openmoji (the embedded one)",
    )
    add_resamples_option(parser, default=100)
    return parser


@dataclass
class Selection:
    """What is drawn, and what it is compared with: names of files in `folder`.

    Args:
        captions: to draw.
        pictures: of the captions, in their order.
        reference: the real pictures.
    """

    folder: Path
    captions: Sequence[Caption]
    pictures: Sequence[str]
    reference: Sequence[str]


def select(
    annotations: str, images: str, count: int, reference: str = "all", seed: int = 0
) -> Selection:
    """Select one caption for each of `count` pictures, and the pictures to compare with.

    Args:
        annotations: the file of MS-COCO's captions.
        images: the folder of its pictures.
        count: how many pictures have a caption drawn.
        reference: "all" pictures, or those whose captions are "drawn".
        seed: chooses the pictures and their captions.

    Raises:
        UserError: the annotations name no files, there are fewer pictures, or some are not in the
            folder.
    """
    every, files = read_coco(annotations)
    captions = one_per_picture(every, count, annotations, seed)
    for caption in captions:
        if caption.picture not in files:
            raise UserError(
                f"{annotations} names no file for picture {caption.picture}: "
                'its "images" must have the "id" and "file_name" of each.'
            )
    pictures = [files[cast(int, caption.picture)] for caption in captions]
    real = sorted(files.values()) if reference == "all" else pictures
    folder = Path(images).expanduser()
    missing = [name for name in real if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(real)} pictures of {annotations} are not in {folder}, such as "
            f"{missing[0]}: name the folder that has them with --images."
        )
    return Selection(folder, captions, pictures, real)


def run(arguments: argparse.Namespace) -> Figures:
    """Draw and evaluate each point; rank 0 writes the table."""
    selection = select(
        arguments.annotations,
        arguments.images,
        arguments.num_captions,
        arguments.reference,
        arguments.seed,
    )
    network = load_features(
        choose_features(arguments.features, captions=None), arguments.device, arguments.precision
    )
    clip = FrozenCLIP(clip_config(arguments.score_clip, arguments.precision), arguments.device)
    model = settings_from(Model, arguments, decoder=decoder_path(arguments.decoder))
    points = build_points(arguments, model, selection.captions)
    size = arguments.reference_size or model.size
    notes = size_warnings(model.size, size)
    conditioning = model.unclip.clip.fingerprint()
    notes += shared_clip_warnings(conditioning, network.fingerprint, clip.fingerprint())
    batch_size = arguments.batch_size

    def stored(names: Sequence[str], captions: Sequence[str] | None = None) -> StoredImages:
        return StoredImages(
            str(selection.folder),
            rank(),
            world_size(),
            captions=captions,
            size=size,
            names=names,
        )

    real = reference_features(network, stored(selection.reference), batch_size)
    texts = [caption.text for caption in selection.captions]
    _, real_score = evaluate(stored(selection.pictures, texts), batch_size, None, clip)
    results: list[Figures] = []
    for point in points:
        features, score = evaluate(point.images, batch_size, network, clip)
        distances = compute_distances(
            network, real, features, arguments.resamples, arguments.seed, arguments.device
        )
        place = {"prior": point.prior, "guidance_scale": point.guidance_scale}
        results.append(place | distances | score)
    settings = {
        "annotations": arguments.annotations,
        "captions": len(texts),
        "reference": f"{arguments.reference} ({len(selection.reference)})",
        "reference_size": size,
        "features": network.name,
        "score_clip": str(clip.config),
    }
    if rank() == 0:
        real_note = f"CLIP score of the captions' own pictures: {clip_score(real_score)}."
        lines = [real_note, *notes, *results[0]["notes"]]
        rows = [table_row(figures) for figures in results]
        table = report.markdown(table_headers(network.frechet), rows)
        table += "".join(f"\n{text}\n" for text in lines)
        print(table)
        report.write_report(arguments.out / "coco.md", "Zero-shot MS-COCO", table, {}, settings)
    settings["drawn"] = {point.images.folder.name: point.images.settings for point in points}
    return {"points": results, "real": real_score, "notes": notes, "settings": settings}


def size_warnings(side: int, size: int) -> list[str]:
    """A sentence where sizes keep the figures from being the paper's; it is logged too.

    Args:
        side: of the drawn images, in pixels.
        size: of the real ones.
    """
    if side == size == SIDE:
        return []
    text = (
        f"Images of {side} pixels are compared with real ones of {size}, and the paper's are of "
        f"{SIDE}."
    )
    if rank() == 0:
        log.warning(text)
    return [text]


def evaluate(
    source: ImageSource, batch_size: int, network: Features | None, clip: FrozenCLIP
) -> tuple[Tensor, Figures]:
    """This rank's features (N, D) float32 by `network`, and the CLIP score over all ranks.

    Without a network: features (0, 0).
    """
    metric, scores, rows = on_ranks_device(CLIPScore()), clip_features(clip), []
    for batch in progress(source.batches(batch_size), len(source), "evaluating"):
        if network is not None:
            rows.append(network(batch["images"]).float().cpu())
        text = clip.embed_text(clip.tokenize(batch["captions"])).embed
        metric.update(scores(batch["images"]), text)
    dim = 0 if network is None else network.dim
    return torch.cat(rows) if rows else torch.zeros(0, dim), metric.compute()


def table_headers(frechet: str) -> list[str]:
    """Of the table; the Frechet distance has the key `frechet`."""
    figures = FRECHET[frechet], "KID x 1000", "CLIP score", "precision", "recall"
    return ["prior", "guidance", *figures]


def table_row(figures: Figures) -> list[str]:
    """One point's line of the table."""
    key = frechet_key(figures)
    distance = f"{figures[key]:.2f}"
    if f"{key}_low" in figures:
        distance += f" [{figures[f'{key}_low']:.2f}, {figures[f'{key}_high']:.2f}]"
    return [
        figures["prior"],
        f"{figures['guidance_scale']:g}",
        distance,
        f"{1000 * figures['kid']:.2f} ± {1000 * figures['kid_se']:.2f}",
        clip_score(figures),
        f"{figures['precision']:.3f}",
        f"{figures['recall']:.3f}",
    ]


def main(words: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_command(build_parser(), run, words)


if __name__ == "__main__":
    sys.exit(main())
