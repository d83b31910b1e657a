"""How well images show their captions, by a CLIP: the mean of 100 max(cosine, 0), and how far up an
image's own caption stands among all of them.

The images are those of a folder or of shards (--images), or drawn by a model (--ckpt). Captions of
a folder: --captions FILE.txt with a caption a line, in the order of the files' names, or KEY.txt
beside KEY.png.
"""

import argparse
import logging
import sys

from eval.common import Figures, command, parser, progress, table
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)


def arguments() -> argparse.ArgumentParser:
    from eval.source import add_arguments

    made = parser(__doc__, "eval.clip_score")
    add_arguments(made)
    made.add_argument(
        "--clip",
        help="the CLIP that scores, not the one that conditions: openmoji-judge (the default for "
        "the embedded data), NAME/TAG of open_clip, or local-dir:/folder",
    )
    return made


def run(given: argparse.Namespace) -> Figures:
    """The figures over all ranks; rank 0 prints them as a table."""
    from torch import distributed

    from eval.features import clip_config, clip_features
    from eval.judge import same_clip, score_clip
    from eval.metrics import CLIPScore, RetrievalRank
    from eval.source import open_source
    from unclip_pl.clip.frozen import FrozenCLIP

    source = open_source(given)
    conditions = getattr(source, "clip", None)
    theirs = None if conditions is None else conditions.fingerprint()
    name = score_clip(given.clip, theirs, "--clip")
    clip = FrozenCLIP(clip_config(name, given.precision), given.device)
    if theirs is not None and same_clip(theirs, clip.fingerprint()) and rank() == 0:
        log.warning(
            "The images were drawn from embeddings of the CLIP %s, and the same CLIP scores them: "
            "it may give a score that no person would "
            "(GLIDE, section 5.2). Name another one with --clip.", clip.config,
        )  # fmt: skip
    network, metrics = clip_features(clip), (CLIPScore(), RetrievalRank(clip.embed_dim))
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        for metric in metrics:
            metric.to("cuda")
    for batch in progress(source.batches(given.batch_size), len(source), "images"):
        for key, caption in zip(batch["keys"], batch["captions"], strict=True):
            if not caption:
                raise UserError(
                    f"Image {key} of {source.name} has no caption: put it into {key}.txt, or give "
                    "all of them with --captions."
                )
        text = clip.embed_text(clip.tokenize(batch["captions"])).embed
        images = network(batch["images"])
        for metric in metrics:
            metric.update(images, text)
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
        (
            "CLIP score",
            f"{figures['clip_score']:.3f}  [{figures['clip_score_low']:.3f}, "
            f"{figures['clip_score_high']:.3f}] of 95 %",
        ),
        (
            "own caption's rank",
            f"{figures['rank_mean']:.1f} in the mean, {figures['rank_median']:.0f} in the median, "
            f"of {figures['captions']}",
        ),
        ("found first, in 5", f"{figures['r1']:.1%}, {figures['r5']:.1%}"),
    ]


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
