"""`unclip export`: a release from a checkpoint, or a folder of diffusers from several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from unclip_pl.cli.options import Folder
from unclip_pl.pipeline.locate import refuse_run, what_else
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.outputs import require_new, require_writable
from unclip_pl.utils.remote import is_remote

Precision = Literal["fp16", "fp32"]


def export(
    checkpoint: Sequence[str],
    *,
    out: Folder,
    card: Path | None = None,
    to: Literal["diffusers"] | None = None,
    adapters: str | None = None,
    precision: Precision = "fp16",
) -> None:
    """Make a release (or, of a CLIP stage, an open_clip folder) from a checkpoint.

    It has the EMA weights and no code. Or make a folder of diffusers from several.

    Args:
        checkpoint: or a release; with --to diffusers one of each stage: prior, decoder, upsampler
        out: the new folder
        card: a Markdown file that becomes the release's README.md
        to: a folder for diffusers' unCLIP pipelines instead
        adapters: only the adapters (LoRA), as peft keeps them; the value is what --init gave that
            run
        precision: of the weights; with --to diffusers
    """
    require_new(out)
    require_writable(out.parent)
    for path in [*checkpoint, *([adapters] if adapters else [])]:
        if is_remote(path):
            continue
        if not Path(path).exists():
            raise UserError(f"There is no {path}: {what_else(Path(path))}.")
        refuse_run(path)
    text = card.read_text(encoding="utf-8") if card else None
    if to and adapters:
        raise UserError("--adapters and --to diffusers are two kinds of export: leave one out.")
    if to:
        if card:
            raise UserError(
                "--card is for a release, and --to diffusers writes none: leave it out."
            )
        to_diffusers(checkpoint, out, precision)
        return
    if len(checkpoint) > 1 or precision != "fp16":
        raise UserError(
            "A release (or a folder of adapters) is made of one checkpoint, without --precision: "
            "give one, or add --to diffusers."
        )
    if adapters:
        to_adapters(checkpoint[0], adapters, out, text)
    else:
        to_release(checkpoint[0], out, text)


def to_adapters(checkpoint: str, base: str, out: Path, card: str | None) -> None:
    """The adapters in a checkpoint, without the weights that they adapt."""
    from unclip_pl.pipeline.interop.adapters import export_adapters

    made = export_adapters(checkpoint, base, out, card)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: adapters of a {made.stage} after {made.steps} steps, {size:.1f} MB")


def to_diffusers(checkpoints: Sequence[str], out: Path, precision: Precision) -> None:
    """Several stages as one folder of diffusers."""
    from unclip_pl.pipeline.interop.exporting import export_diffusers

    notes = export_diffusers([*checkpoints], out, precision=precision)
    files = [file for file in out.rglob("*") if file.is_file()]
    print(f"{out}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    for note in notes:
        print(note)


def to_release(checkpoint: str, out: Path, card: str | None) -> None:
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
    card = card or f"{FRONT_MATTER}{title}\n\nMade by `unclip export`.\n"
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
