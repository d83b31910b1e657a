"""`unclip export`: a release from a checkpoint."""

import argparse
from pathlib import Path

from unclip_pl.cli.options import AddCommand


def add(command: AddCommand) -> None:
    parser = command(
        "export",
        run,
        "Make a release (or, of a CLIP stage, an open_clip folder) from a checkpoint: EMA weights, "
        "no code in it.",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument(
        "--card", type=Path, help="a Markdown file that becomes the release's README.md"
    )


def run(arguments: argparse.Namespace) -> None:
    from unclip_pl.clip.folder import save_clip
    from unclip_pl.pipeline import release
    from unclip_pl.pipeline.weights import load_stage, read_weights
    from unclip_pl.stages.ar_prior import ARPrior
    from unclip_pl.stages.clip import CLIP
    from unclip_pl.stages.decoder import Decoder
    from unclip_pl.stages.diffusion_prior import DiffusionPrior
    from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024

    weights = read_weights(arguments.checkpoint)
    card = f"# {weights.stage}, {weights.steps} steps\n\nMade by `unclip export`.\n"
    if arguments.card:
        card = arguments.card.read_text(encoding="utf-8")
    if weights.stage == "CLIP":
        clip = load_stage(arguments.checkpoint, CLIP)
        save_clip(clip.net, arguments.out, clip.model_config, clip.preprocess_config)
        (arguments.out / "README.md").write_text(card, encoding="utf-8")
    else:
        kinds = (Decoder, DiffusionPrior, ARPrior, Upsampler256, Upsampler1024)
        stage = load_stage(arguments.checkpoint, *kinds)
        buffers = [name for name, _ in stage.named_buffers()]
        release.write(arguments.out, weights, card, exact=buffers)
    size = sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: {weights.stage} after {weights.steps} steps, {size:.1f} MB")
