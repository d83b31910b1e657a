"""`python -m eval.coco`: zero-shot MS-COCO as in Table 2 of the paper."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from torch import Tensor

from eval import report
from eval.captions import Caption, one_per_picture, read_coco
from eval.coco_images import Point, build_points, load_priors
from eval.commands import (
    FeatureOptions,
    Figures,
    ReportOptions,
    Resamples,
    choose_features,
    clip_name,
    progress,
    run_command,
)
from eval.evaluator import compute_distances, on_ranks_device, shared_clip_warnings
from eval.extract import reference_features
from eval.features import Features, clip_config, clip_features, load_features
from eval.floor import floor_or_note, gather_stored
from eval.metrics import FRECHET, CLIPScore, frechet_key
from eval.source import Model
from eval.stored import ImageSource, StoredImages
from eval.tables import FLOOR_TITLE, clip_score, floor_cells
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.pipeline.locate import require_weights
from unclip_pl.utils.commands import Option
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count, PriorSamplingOptions, SamplingOptions

log = logging.getLogger(__name__)
SIDE = 256
"""Side of the images of the paper's table, in pixels."""


@dataclass(frozen=True)
class SelectionOptions:
    """What is drawn, and what it is compared with.

    Args:
        annotations: MS-COCO's captions: captions_val2014.json
        images: the folder of its pictures: val2014/
        num_captions: how many pictures have one of their captions drawn
        reference: compare with all pictures, as the paper does, or with those whose captions are
            drawn
        floor: more real pictures, a folder or shards, for the figures of real ones against real
            ones: train2014/
    """

    annotations: str
    images: str
    num_captions: Annotated[Count, Option(alias="--count")] = 30000
    reference: Literal["all", "drawn"] = "all"
    floor: str | None = None


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """What draws.

    Args:
        decoder: a checkpoint or release; "openmoji" is the one in the package
        priors: "diffusion", "ar", those in the package; or checkpoints or releases, any number
        upsamplers: "256", the one in the package; or checkpoints or releases, in order; nothing:
            the decoder's own images
        guidance_scales: of the decoder: the paper's, or several to sweep
    """

    decoder: Annotated[str, Option(alias="--ckpt")] = "openmoji"
    priors: Sequence[str] = ("diffusion", "ar")
    upsamplers: Annotated[Sequence[str], Option(may_be_empty=True)] = ("256",)
    guidance_scales: Sequence[float] = (1.25,)
    sampling: SamplingOptions
    prior_sampling: PriorSamplingOptions

    def points(
        self, model: Model, captions: Sequence[Caption], options: ReportOptions
    ) -> list[Point]:
        """The images of each prior at each guidance scale."""
        samplings = [
            self.sampling.of(model.unclip.decoder, guidance_scale=scale)
            for scale in sorted({*self.guidance_scales})
        ]
        priors = load_priors(self.priors, self.prior_sampling, model)
        return build_points(priors, samplings, captions, model, options)


DEFAULTS = ReportOptions(out=Path("out/coco"))


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


def run(
    *,
    selected: SelectionOptions,
    drawing: DrawingOptions,
    judging: FeatureOptions,
    score_clip: Annotated[str, clip_name] = "ViT-B-32-quickgelu/openai",
    resamples: Resamples = 100,
    options: ReportOptions = DEFAULTS,
) -> Figures:
    """Zero-shot MS-COCO as in Table 2 of the paper: FID and CLIP score of images of 256 pixels.

    One caption of each of --num-captions validation pictures is drawn by each prior at each
    guidance scale, and compared with all validation pictures, cut to the same side. Images are
    kept in OUT/samples: a run that was stopped goes on with those that are missing, and ranks (of
    torchrun or srun) share them.

    Args:
        score_clip: the CLIP that scores, not the one that conditions: NAME/TAG of open_clip,
            local-dir:/folder, or openmoji (the embedded one)
        resamples: random halves of the sets, for the interval of the Frechet distance; 0: no
            interval
        selected: what is drawn, and what it is compared with
        drawing: what is drawn and how
        judging: how images are compared with real ones
        options: where and how it runs
    """
    require_weights(drawing.decoder, None, drawing.upsamplers)
    for prior in drawing.priors:
        require_weights(prior=prior)
    selection = select(
        selected.annotations,
        selected.images,
        selected.num_captions,
        selected.reference,
        options.seed,
    )
    if selected.floor is not None:
        StoredImages(selected.floor)  # refuses a folder without images
    network = load_features(
        choose_features(judging.features, captions=None), options.device, options.precision
    )
    clip = FrozenCLIP(clip_config(score_clip, options.precision), options.device)
    model = Model.of(options, drawing.decoder, upsamplers=drawing.upsamplers)
    points = drawing.points(model, selection.captions, options)
    size = judging.reference_size or model.size
    notes = size_warnings(model.size, size)
    conditioning = model.unclip.clip.fingerprint()
    notes += shared_clip_warnings(conditioning, network.fingerprint, clip.fingerprint())
    batch_size = options.batch_size

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
    others = None
    if selected.floor is not None:
        more = StoredImages(selected.floor, rank(), world_size(), size=size)
        others = gather_stored(network, more, options)
    texts = [caption.text for caption in selection.captions]
    _, real_score = evaluate(stored(selection.pictures, texts), batch_size, None, clip)
    results: list[Figures] = []
    for point in points:
        rows, score = evaluate(point.images, batch_size, network, clip)
        distances = compute_distances(network, real, rows, resamples, options.seed, options.device)
        place = {"prior": point.prior, "guidance_scale": point.guidance_scale}
        results.append(place | distances | score)
    sizes = len(texts), len(selection.reference)
    floor, missing = floor_or_note(others, *sizes, network.frechet, options.seed)
    notes += missing
    settings = {
        "annotations": selected.annotations,
        "captions": len(texts),
        "reference": f"{selected.reference} ({len(selection.reference)})",
        "reference_size": size,
        "floor": selected.floor,
        "features": network.name,
        "score_clip": str(clip.config),
    } | what_drew(points)
    if rank() == 0:
        real_note = f"CLIP score of the captions' own pictures: {clip_score(real_score)}."
        lines = [real_note, *notes, *results[0]["notes"]]
        lines_of_points = [table_row(figures) for figures in results]
        if floor is not None:
            cells = floor_cells(floor, network.frechet)
            lines_of_points.append([FLOOR_TITLE, "-", *cells, "-", "-", "-"])
        table = report.markdown(table_headers(network.frechet), lines_of_points)
        table += "".join(f"\n{text}\n" for text in lines)
        print(table)
        out, title = options.open_out(), "Zero-shot MS-COCO"
        report.write_report(out, "coco.md", title, table, {}, settings)
    settings["drawn"] = {point.images.folder.name: point.images.settings for point in points}
    return {
        "points": results,
        "real": real_score,
        "floor": None if floor is None else asdict(floor),
        "notes": notes,
        "settings": settings,
    }


def what_drew(points: Sequence[Point]) -> Figures:
    """Weights with their digests, and settings: of each prior, and those that all points share."""
    drawn = points[0].images.settings
    sampling = {
        name: value for name, value in drawn["sampling"].items() if name != "guidance_scale"
    }
    shared = {name: drawn[name] for name in ("decoder", "upsamplers", "precision", "seed")}
    priors = {
        f"prior {point.prior}": point.images.settings["prior"]
        | point.images.settings["prior_sampling"]
        for point in points
    }
    more = {"decoder's sampling": sampling, **points[0].images.about}
    return shared | more | priors


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
    return run_command(run, "eval.coco", words)


if __name__ == "__main__":
    sys.exit(main())
