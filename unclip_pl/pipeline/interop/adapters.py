"""The adapters (LoRA) in a checkpoint as a folder of peft's layout: `export_adapters`."""

from pathlib import Path

from unclip_pl.cluster.checkpoint_io import read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import META_FILE, whole_tensors
from unclip_pl.networks.lora import BASE, DOWN, UP
from unclip_pl.pipeline.adapters import Adapters, digest_of, is_adapters, write
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote import is_remote
from unclip_pl.utils.remote_copies import local_path

KINDS = (Decoder, DiffusionPrior, ARPrior, Upsampler256, Upsampler1024)
CARD = """---
library_name: unclip_pl
tags: [unclip, lora]
---
# Adapters of a {stage}, {steps} steps

Made by `unclip export --adapters`. They belong to the weights that `adapter_config.json` names.
"""


def export_adapters(
    checkpoint: str | Path, base: str | Path, out: Path, card: str | None = None
) -> Adapters:
    """Write the adapters of a fine-tune, and nothing of the weights that they adapt.

    The folder stands for the fine-tuned stage wherever a release does, as long as `base` is there.
    peft loads it onto the `net` of the stage in `base`.

    Args:
        checkpoint: of a run with adapters, whose (EMA) weights count.
        base: the release or checkpoint of that run's --init.
        out: a new folder.
        card: its README.md; None: a short one.

    Returns:
        what was written.

    Raises:
        UserError: the checkpoint has no adapters, or they were trained on other weights.
    """
    path = local_path(checkpoint)
    is_release = path.is_dir() and not (path / META_FILE).exists()
    held = {} if is_release else read_checkpoint(path, target=whole_tensors("state_dict"))
    if "lora_scale" not in held:
        raise UserError(
            f"{checkpoint} has no adapters: give a checkpoint of a run with "
            "lightning_config/lora.yaml, or leave --adapters out."
        )
    tensors = held["state_dict"]
    adapters = {name: value for name, value in tensors.items() if name.endswith((DOWN, UP))}
    plain = {
        name.replace(BASE, "."): value for name, value in tensors.items() if name not in adapters
    }
    if is_adapters(local_path(base)):
        raise UserError(
            f"{base} holds adapters as well, and adapters need whole weights: make a release of it "
            "with `unclip export`, and give --adapters that."
        )
    stage = load_stage(base, *KINDS)
    buffers = {name for name, _ in stage.named_buffers()} & plain.keys()
    digest = digest_of(plain, but=buffers)
    same_stage = type(stage).__name__ == held["stage"]
    if not same_stage or digest_of(stage.state_dict(), but=buffers) != digest:
        raise UserError(
            f"The adapters in {checkpoint} were not trained on the weights in {base}: give "
            "--adapters the release or checkpoint of that run's --init."
        )
    made = Adapters(
        str(base) if is_remote(base) else str(Path(base).absolute()),
        digest,
        held["lora_scale"],
        held["stage"],
        held["hyper_parameters"],
        held["global_step"],
        adapters,
        {name: plain[name] for name in sorted(buffers)},
    )
    write(out, made, card or CARD.format(stage=made.stage, steps=made.steps))
    return made
