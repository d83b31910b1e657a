"""How well images show their captions, by a CLIP: the mean of 100 max(cosine, 0), and how far up an image's own caption stands among all of them."""

import argparse
import logging
import sys
from pathlib import Path

from eval.common import Figures, command, parser, progress, rank, table, world_size
from unclip_pl.errors import UserError

log = logging.getLogger(__name__)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, "eval.clip_score")
    made.add_argument("--images", required=True, help="the images: a folder, or shards as 'data/{00000..00009}.tar'")
    made.add_argument("--captions", type=Path, help="a caption a line, in the order of the files' names; by default KEY.txt beside KEY.png, or the shards' own")
    made.add_argument("--clip", default="openmoji", help="which CLIP scores: openmoji (the embedded one), NAME/TAG of open_clip, local-dir:/folder")
    made.add_argument("--max-bad-rate", type=float, default=0.01, help="largest share of images that may be unreadable")
    return made


def read_captions(path: Path) -> list[str]:
    """The lines of a text file that are not blank; says in the log how many were."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text: save it as UTF-8, one caption a line.") from None
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"{path} has no captions: give one a line.")
    if len(captions) < len(lines):
        log.warning("%s has %d blank lines, which were passed over.", path, len(lines) - len(captions))
    return captions


def run(given: argparse.Namespace) -> Figures:
    """The figures over all ranks; rank 0 prints them as a table."""
    from torch import distributed

    from eval.features import clip_config, clip_features
    from eval.folders import Pictures
    from eval.metrics import CLIPScore, RetrievalRank
    from unclip_pl.clip import FrozenCLIP

    captions = read_captions(given.captions) if given.captions else None
    source = Pictures(given.images, rank(), world_size(), given.max_bad_rate, captions)
    clip = FrozenCLIP(clip_config(given.clip, given.precision), given.device)
    network, metrics = clip_features(clip), (CLIPScore(), RetrievalRank(clip.embed_dim))
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        for metric in metrics:
            metric.to("cuda")
    for batch in progress(source.batches(given.batch_size), len(source), "images"):
        for key, caption in zip(batch["keys"], batch["captions"], strict=True):
            if not caption:
                raise UserError(f"Image {key} of {source.name} has no caption: put it into {key}.txt, or give all of them with --captions.")
        text = clip.embed_text(clip.tokenize(batch["captions"])).embed
        for metric in metrics:
            metric.update(network(batch["images"]), text)
    figures: Figures = {"images": source.name, "clip": str(clip.config)}
    for metric in metrics:
        figures |= metric.compute()
    figures["bad"] = len(source) - figures["n"]
    if rank() == 0:
        print(table(rows(figures)))
    return figures


def rows(figures: Figures) -> list[tuple[str, str]]:
    """The figures for the eye."""
    return [
        ("images", f"{figures['images']} ({figures['n']})"),
        ("CLIP", figures["clip"]),
        ("CLIP score", f"{figures['clip_score']:.3f}  [{figures['clip_score_low']:.3f}, {figures['clip_score_high']:.3f}] of 95 %"),
        ("own caption's rank", f"{figures['rank_mean']:.1f} in the mean, {figures['rank_median']:.0f} in the median, of {figures['captions']}"),
        ("found first, in 5", f"{figures['r1']:.1%}, {figures['r5']:.1%}"),
    ]


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
