"""`unclip export`: a release from a checkpoint."""

import argparse
from pathlib import Path

from unclip_pl.cli.options import Command


def add(command: Command) -> None:
    """The command."""
    export = command(
        "export",
        run_export,
        "Make a release (or, of a CLIP stage, an open_clip folder) from a checkpoint: EMA weights, no code in it.",
    )
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--out", type=Path, required=True, help="the new folder")
    export.add_argument(
        "--card", type=Path, help="a Markdown file that becomes the release's README.md"
    )


def run_export(arguments: argparse.Namespace) -> None:
    from unclip_pl.clip.folder import save_clip
    from unclip_pl.pipeline import release
    from unclip_pl.pipeline import unclip as pipeline
    from unclip_pl.stages.ar_prior import ARPrior
    from unclip_pl.stages.clip import CLIP
    from unclip_pl.stages.decoder import Decoder
    from unclip_pl.stages.diffusion_prior import DiffusionPrior
    from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024

    weights = pipeline.read_weights(arguments.checkpoint)
    card = (
        arguments.card.read_text(encoding="utf-8")
        if arguments.card
        else f"# {weights.stage}, {weights.steps} steps\n\nMade by `unclip export`.\n"
    )
    if weights.stage == "CLIP":
        clip = pipeline.load_stage(arguments.checkpoint, CLIP)
        save_clip(clip.net, arguments.out, clip.model_config, clip.preprocess_config)
        (arguments.out / "README.md").write_text(card, encoding="utf-8")
    else:
        kinds = {
            kind.__name__: kind
            for kind in (Decoder, DiffusionPrior, ARPrior, Upsampler256, Upsampler1024)
        }
        stage = pipeline.load_stage(arguments.checkpoint, kinds[weights.stage])
        release.write(
            arguments.out, weights, card, exact=[name for name, _ in stage.named_buffers()]
        )
    size = sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: {weights.stage} after {weights.steps} steps, {size:.1f} MB")
