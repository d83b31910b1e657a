"""`python -m eval.clip_score`: how well images show their captions."""

import logging
import sys

from eval.commands import Figures, RunOptions, aligned, progress, run_command
from eval.evaluator import (
    ScoreClip,
    choose_score_clip,
    on_ranks_device,
    shared_clip_warnings,
)
from eval.features import clip_config, clip_features
from eval.metrics import CLIPScore, RetrievalRank
from eval.source import (
    DEFAULT_CAPTIONS,
    SourceOptions,
    conditioning_clip,
    drawn_settings,
    open_source,
)
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError


def run(*, source: SourceOptions, score_clip: ScoreClip = None, options: RunOptions) -> Figures:
    """How well images show their captions, by a CLIP.

    The mean of 100 max(cosine, 0), and the rank of an image's own caption among all of them. The
    images are those of a folder or of shards (--images), or drawn by a model (--decoder). Captions
    of a folder: --captions FILE.txt with a caption per line, in the order of the files' names, or
    KEY.txt next to KEY.png.

    Args:
        score_clip: the CLIP that scores, not the one that conditions: openmoji-judge (the default
            for images from the embedded CLIP's embeddings or for the captions openmoji), NAME/TAG
            of open_clip, or local-dir:/folder
        source: which images are evaluated
        options: where and how it runs
    """
    images = open_source(source, options)
    conditioning = conditioning_clip(images)
    captions = source.captions or (None if source.images else DEFAULT_CAPTIONS)
    name = choose_score_clip(score_clip, conditioning, captions)
    clip = FrozenCLIP(clip_config(name, options.precision), options.device)
    network = clip_features(clip)
    notes = shared_clip_warnings(conditioning, scores=network.fingerprint)
    metrics = [on_ranks_device(CLIPScore()), on_ranks_device(RetrievalRank(clip.embed_dim))]
    for batch in progress(images.batches(options.batch_size), len(images), "images"):
        for key, caption in zip(batch["keys"], batch["captions"], strict=True):
            if not caption:
                raise UserError(
                    f"Image {key} of {images.name} has no caption: put it into {key}.txt, or give "
                    "all of them with --captions."
                )
        text = clip.embed_text(clip.tokenize(batch["captions"])).embed
        seen = network(batch["images"])
        for metric in metrics:
            metric.update(seen, text)
    figures: Figures = {"images": images.name, "clip": str(clip.config)}
    if captions:
        figures["captions_from"] = captions
    for metric in metrics:
        figures |= metric.compute()
    figures["bad"] = len(images) - figures["n"]
    if rank() == 0:
        print("\n".join([aligned(rows(figures)), *notes]))
    return figures | {"notes": notes, "drawn": drawn_settings(images)}


def rows(figures: Figures) -> list[tuple[str, str]]:
    """The lines of the printed table."""
    low, high = figures["clip_score_low"], figures["clip_score_high"]
    mean, median = figures["rank_mean"], figures["rank_median"]
    return [
        ("images", f"{figures['images']} ({figures['n']})"),
        *([("captions from", figures["captions_from"])] if "captions_from" in figures else []),
        ("CLIP", figures["clip"]),
        ("CLIP score", f"{figures['clip_score']:.3f}  [{low:.3f}, {high:.3f}] of 95 %"),
        ("own caption's rank", f"mean {mean:.1f}, median {median:.0f}, of {figures['captions']}"),
        ("found first, in 5", f"{figures['r1']:.1%}, {figures['r5']:.1%}"),
    ]


def main(words: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_command(run, "eval.clip_score", words)


if __name__ == "__main__":
    sys.exit(main())
