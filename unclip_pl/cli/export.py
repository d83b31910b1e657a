"""`unclip export`: a release from a checkpoint, or a folder of diffusers from several."""

import argparse
from pathlib import Path

from unclip_pl.cli.options import AddCommand
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote_copies import local_folder, path_or_url


def add(command: AddCommand) -> None:
    parser = command(
        "export",
        run,
        "Make a release (or, of a CLIP stage, an open_clip folder) from a checkpoint: EMA weights, "
        "no code in it. Or a folder of diffusers from several.",
    )
    parser.add_argument(
        "checkpoint",
        type=path_or_url,
        nargs="+",
        help="or a release; with --to diffusers one of each stage: prior, decoder, upsampler",
    )
    parser.add_argument("--out", type=local_folder, required=True, help="the new folder")
    parser.add_argument(
        "--card", type=Path, help="a Markdown file that becomes the release's README.md"
    )
    parser.add_argument(
        "--to", choices=["diffusers"], help="a folder for diffusers' unCLIP pipelines instead"
    )
    parser.add_argument(
        "--adapters",
        metavar="BASE",
        type=path_or_url,
        help="only the adapters (LoRA), as peft keeps them; BASE is what --init gave that run",
    )
    parser.add_argument(
        "--precision",
        choices=["fp16", "fp32"],
        default="fp16",
        help="of the weights; with --to diffusers",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.to and arguments.adapters:
        raise UserError("--adapters and --to diffusers are two kinds of export: leave one out.")
    if arguments.to:
        to_diffusers(arguments)
        return
    if len(arguments.checkpoint) > 1 or arguments.precision != "fp16":
        raise UserError(
            "A release (or a folder of adapters) is made of one checkpoint, without --precision: "
            "give one, or add --to diffusers."
        )
    if arguments.adapters:
        to_adapters(arguments)
        return
    to_release(arguments.checkpoint[0], arguments.out, arguments.card)


def to_adapters(arguments: argparse.Namespace) -> None:
    """The adapters in a checkpoint, without the weights that they adapt."""
    from unclip_pl.pipeline.interop.adapters import export_adapters

    card = arguments.card.read_text(encoding="utf-8") if arguments.card else None
    (checkpoint,) = arguments.checkpoint
    made = export_adapters(checkpoint, arguments.adapters, arguments.out, card)
    size = sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: adapters of a {made.stage} after {made.steps} steps, {size:.1f} MB")


def to_diffusers(arguments: argparse.Namespace) -> None:
    """Several stages as one folder of diffusers."""
    from unclip_pl.pipeline.interop.exporting import export_diffusers

    if arguments.card:
        raise UserError("--card is for a release, and --to diffusers writes none: leave it out.")
    notes = export_diffusers(arguments.checkpoint, arguments.out, precision=arguments.precision)
    files = [file for file in arguments.out.rglob("*") if file.is_file()]
    print(f"{arguments.out}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    for note in notes:
        print(note)


def to_release(checkpoint: Path | str, out: Path, card_file: Path | None) -> None:
    """One checkpoint as a release."""
    from unclip_pl.clip.folder import save_clip
    from unclip_pl.pipeline import release
    from unclip_pl.pipeline.hub import FRONT_MATTER
    from unclip_pl.pipeline.weights import load_stage, read_weights
    from unclip_pl.stages.ar_prior import ARPrior
    from unclip_pl.stages.clip import CLIP
    from unclip_pl.stages.decoder import Decoder
    from unclip_pl.stages.diffusion_prior import DiffusionPrior
    from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024

    weights = read_weights(checkpoint)
    title = f"# {weights.stage}, {weights.steps} steps"
    card = f"{FRONT_MATTER}{title}\n\nMade by `unclip export`.\n"
    if card_file:
        card = card_file.read_text(encoding="utf-8")
    if weights.stage == "CLIP":
        clip = load_stage(checkpoint, CLIP)
        save_clip(clip.net, out, clip.model_config, clip.preprocess_config)
        (out / "README.md").write_text(card, encoding="utf-8")
    else:
        kinds = (Decoder, DiffusionPrior, ARPrior, Upsampler256, Upsampler1024)
        stage = load_stage(checkpoint, *kinds)
        buffers = [name for name, _ in stage.named_buffers()]
        release.write(out, weights, card, exact=buffers)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: {weights.stage} after {weights.steps} steps, {size:.1f} MB")
