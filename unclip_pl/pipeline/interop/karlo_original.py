"""Karlo in its own files: three `.ckpt`, and a `.th` with the mean and std of the embeddings.

They come without settings. Sizes are read from the weights. What the weights do not show (pictures
of 64 and 256 pixels, heads of 64 channels) is that of the published model.
"""

from functools import partial
from pathlib import Path

from torch import Tensor

from unclip_pl.networks.prior import PriorTransformerConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.interop.files import Tensors, read_pickle, unpickle
from unclip_pl.pipeline.interop.karlo import (
    Part,
    decoder_stage,
    prior_stage,
    upsampler_stage,
)
from unclip_pl.stages.upsampler import NET
from unclip_pl.utils.errors import UserError

FILES = {"prior": "prior*.ckpt", "decoder": "decoder*.ckpt", "super-resolution": "*sr*.ckpt"}
STATISTICS = "*stats*.th"
CLIP = "ViT-L-14.pt"
HEAD_WIDTH = 64
THRESHOLD = 10.0
STEP_TOKENS = 4
"""Tokens of the prior that follow the caption's."""


def is_original(folder: Path) -> bool:
    """Whether a folder has files of Karlo's own layout."""
    return any(file for pattern in FILES.values() for file in folder.glob(pattern))


def read_files(folder: Path) -> list[Part]:
    """The stages in a folder of Karlo's own files.

    Raises:
        UserError: a file is missing, damaged, holds code, or is of another model.
    """
    prior, decoder, upsampler = (_checkpoint(folder, what) for what in FILES)
    first, last = (upsampler.below(f"model_{name}.") for name in ("first_steps", "last_step"))
    nets = [unet_config(net, 256) for net in (first, last)]
    if nets[0] != nets[1]:
        raise UserError(
            f"{upsampler.where} has a model_last_step of other sizes than model_first_steps: get "
            "the file again."
        )
    net = UNetConfig(scale_shift=False, **(nets[0] | NET))
    return [
        _prior(prior.below("model."), folder),
        _decoder(decoder.below("model.")),
        Part(
            "upsampler-256",
            upsampler_stage(net),
            {"super_res_first": first, "super_res_last": last},
        ),
    ]


def _only(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(
            f"{folder} must have one file {pattern}, Karlo's {what}, and has {names}: put just "
            "that one there."
        )
    return found[0]


def _checkpoint(folder: Path, what: str) -> Tensors:
    return read_pickle(_only(folder, FILES[what], what), key="state_dict")


def count(source: Tensors, prefix: str) -> int:
    """How many numbered things there are behind a prefix: 2 for "a.0.x" and "a.1.x"."""
    behind = (name.removeprefix(prefix) for name in source.names if name.startswith(prefix))
    return len({rest.split(".", 1)[0] for rest in behind})


def _prior(source: Tensors, folder: Path) -> Part:
    file = _only(folder, STATISTICS, "statistics")
    held = unpickle(file)
    pair = isinstance(held, (tuple, list)) and len(held) == 2
    if not pair or not all(isinstance(value, Tensor) for value in held):
        raise UserError(f"{file} does not hold a mean and a std: get the file again.")
    width, embed_dim = source["clip_img_proj.weight"].shape
    length = source["positional_embedding"].shape[-2] - STEP_TOKENS
    depth = count(source, "transformer.resblocks.")
    net = PriorTransformerConfig(embed_dim, width, depth, heads_of(width, source))
    statistics: dict[str, Tensor] = dict(zip(("mean", "std"), held))
    found = {name: partial(_given, value) for name, value in statistics.items()}
    return Part(
        "prior",
        prior_stage(net, length, THRESHOLD),
        {"prior": source, "statistics": Tensors(str(file), found)},
    )


def _given(value: Tensor) -> Tensor:
    return value


def heads_of(width: int, source: Tensors) -> int:
    """How many heads a Transformer of this width has. UserError where 64 does not divide it."""
    if width % HEAD_WIDTH:
        raise UserError(
            f"{source.where} has a width of {width}, which heads of {HEAD_WIDTH} do not divide: it "
            "is another model."
        )
    return width // HEAD_WIDTH


def unet_config(source: Tensors, side: int) -> dict:
    """Fields of a UNetConfig for pictures of `side` pixels, off the names and shapes."""
    width = source["input_blocks.0.0.weight"].shape[0]
    blocks = count(source, "output_blocks.")
    rises = [
        block
        for block in range(blocks)
        if {f"output_blocks.{block}.{part}.in_layers.2.weight" for part in (1, 2)} & source.names
    ]
    levels = len(rises) + 1
    if blocks % levels or not blocks:
        raise UserError(
            f"{source.where} has {blocks} output_blocks on {levels} levels, which is no network "
            "of Karlo: get the file again."
        )
    firsts = [1 + level * (blocks // levels) for level in range(levels)]
    outs = [source[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts]
    attended = [f"input_blocks.{i}.1.qkv.weight" in source.names for i in firsts]
    return {
        "image_size": side,
        "width": width,
        "mults": tuple(out // width for out in outs),
        "depth": blocks // levels - 1,
        "attention": tuple(side // 2**i for i, has in enumerate(attended) if has),
        "dropout": 0.1,
    }


def _decoder(source: Tensors) -> Part:
    context = source["text_seq_proj.0.weight"].shape[0]
    net = UNetConfig(
        head_width=HEAD_WIDTH,
        embed_dim=source["clip_emb.weight"].shape[1],
        embed_tokens=source["clip_tok_proj.weight"].shape[0] // context,
        context_width=context,
        **unet_config(source, 64),
    )
    return Part("decoder", decoder_stage(net), {"decoder": source})
