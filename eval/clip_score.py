"""How well images show their captions, as a CLIP sees them.

Figures are the mean of 100 max(cosine, 0), and the rank of an image's own caption among all
captions.

The images are those of a folder or of shards (--images), or drawn by a model (--decoder). Captions
of a folder: --captions FILE.txt with a caption per line, in the order of the files' names, or
KEY.txt next to KEY.png.
"""

import argparse
import logging
import sys

from eval.commands import Figures, aligned, command_parser, progress, run_command
from eval.evaluator import (
    add_score_clip_option,
    choose_score_clip,
    on_ranks_device,
    shared_clip_warnings,
)
from eval.features import clip_config, clip_features
from eval.metrics import CLIPScore, RetrievalRank
from eval.source import add_source_options, conditioning_clip, drawn_settings, open_source
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import add_renamed


def build_parser() -> argparse.ArgumentParser:
    """Make the parser: which images, which captions, and which CLIP scores them."""
    parser = command_parser(__doc__, "eval.clip_score")
    add_source_options(parser)
    add_score_clip_option(parser)
    add_renamed(parser, "--clip", "--score-clip")
    return parser


def run(arguments: argparse.Namespace) -> Figures:
    """The figures over all ranks; rank 0 prints them as a table."""
    source = open_source(arguments)
    conditioning = conditioning_clip(source)
    name = choose_score_clip(arguments.score_clip, conditioning)
    clip = FrozenCLIP(clip_config(name, arguments.precision), arguments.device)
    network = clip_features(clip)
    notes = shared_clip_warnings(conditioning, scores=network.fingerprint)
    metrics = [on_ranks_device(CLIPScore()), on_ranks_device(RetrievalRank(clip.embed_dim))]
    for batch in progress(source.batches(arguments.batch_size), len(source), "images"):
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
        print("\n".join([aligned(rows(figures)), *notes]))
    return figures | {"notes": notes, "drawn": drawn_settings(source)}


def rows(figures: Figures) -> list[tuple[str, str]]:
    """The lines of the printed table."""
    low, high = figures["clip_score_low"], figures["clip_score_high"]
    mean, median = figures["rank_mean"], figures["rank_median"]
    return [
        ("images", f"{figures['images']} ({figures['n']})"),
        ("CLIP", figures["clip"]),
        ("CLIP score", f"{figures['clip_score']:.3f}  [{low:.3f}, {high:.3f}] of 95 %"),
        ("own caption's rank", f"mean {mean:.1f}, median {median:.0f}, of {figures['captions']}"),
        ("found first, in 5", f"{figures['r1']:.1%}, {figures['r5']:.1%}"),
    ]


def main(words: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_command(build_parser(), run, words)


if __name__ == "__main__":
    sys.exit(main())
