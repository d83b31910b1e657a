"""Which of their tensors make which of ours: Karlo's names in diffusers and in its own files.

GLIDE's names are those of Karlo's own files. `Names` has our tensor's name and theirs, several of
which are joined along the first axis. Karlo's and GLIDE's own files keep queries, keys and values
of a head together; `fill` takes them apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.interop.files import Tensors
from unclip_pl.utils.errors import UserError

Names = dict[str, tuple[str, ...]]
Layout = Literal["diffusers", "karlo"]

TIME = {
    "0": ("time_embedding.linear_1", "time_embed.0"),
    "2": ("time_embedding.linear_2", "time_embed.2"),
}
PRIOR = {
    "text_proj": ("encoder_hidden_states_proj", "text_enc_proj"),
    "text_embed_proj": ("embedding_proj", "text_emb_proj"),
    "proj_in": ("proj_in", "clip_img_proj"),
    "transformer.norm": ("norm_out", "final_ln"),
    "proj_out": ("proj_to_clip_embeddings", "out_proj"),
}
PRIOR_BLOCK = {
    "norm1": ("norm1", "ln_1"),
    "qkv": ("attn1.to_q attn1.to_k attn1.to_v", "attn.c_qkv"),
    "proj": ("attn1.to_out.0", "attn.c_proj"),
    "norm2": ("norm3", "ln_2"),
    "mlp.0": ("ff.net.0.proj", "mlp.c_fc"),
    "mlp.2": ("ff.net.2", "mlp.c_proj"),
}
TEXT_PROJ = {
    "net.clip_to_time": ("clip_image_embeddings_project_to_time_embeddings", "clip_emb"),
    "net.clip_to_tokens": ("clip_extra_context_tokens_proj", "clip_tok_proj"),
    "text.encoder.pooled_proj": ("embedding_proj", "text_feat_proj"),
    "text.encoder.proj": ("encoder_hidden_states_proj", "text_seq_proj.0"),
    "text.encoder.norm": ("text_encoder_hidden_states_norm", "text_seq_proj.1"),
}
GLIDE_TEXT = {  # diffusers has no such network
    "transformer.norm": ("", "final_ln"),
    "pooled_proj": ("", "transformer_proj"),
}
UNET = {
    "conv_in": ("conv_in", "input_blocks.0.0"),
    "norm_out": ("conv_norm_out", "out.0"),
    "conv_out": ("conv_out", "out.2"),
}
RES = {
    "norm1": ("norm1", "in_layers.0"),
    "conv1": ("conv1", "in_layers.2"),
    "emb_proj": ("time_emb_proj", "emb_layers.1"),
    "norm2": ("norm2", "out_layers.0"),
    "conv2": ("conv2", "out_layers.3"),
    "shortcut": ("conv_shortcut", "skip_connection"),
}
ATTENTION = {
    "norm": ("group_norm", "norm"),
    "qkv": ("to_q to_k to_v", "qkv"),
    "context_kv": ("add_k_proj add_v_proj", "encoder_kv"),
    "proj": ("to_out.0", "proj_out"),
}
MIXED = {"qkv": 3, "context_kv": 2}
"""Our layers that Karlo's own files mix by heads, and how many things they mix."""
Table = Mapping[str, tuple[str, str]]


def _rows(table: Table, layout: Layout, ours: str = "", theirs: str = "") -> Names:
    """Weights and biases of the layers in a table, behind the prefixes of their block."""
    found: Names = {}
    for name, columns in table.items():
        others = columns[layout == "karlo"].split()
        for kind in ("weight", "bias"):
            found[f"{ours}{name}.{kind}"] = tuple(f"{theirs}{other}.{kind}" for other in others)
    return found


def prior_names(depth: int, layout: Layout) -> Names:
    """Of a `DiffusionPrior`; Karlo's own layout has mean and std in another file, so not here."""
    own = layout == "karlo"
    found = _rows(PRIOR, layout, "net.") | _rows(TIME, layout, "net.time_embed.")
    for i in range(depth):
        theirs = f"transformer.resblocks.{i}." if own else f"transformer_blocks.{i}."
        found |= _rows(PRIOR_BLOCK, layout, f"net.transformer.blocks.{i}.", theirs)
    found["net.query"] = ("prd_emb" if own else "prd_embedding",)
    found["net.position_embedding"] = ("positional_embedding",)
    if not own:
        found |= {"normalizer.mean": ("clip_mean",), "normalizer.std": ("clip_std",)}
    return found


def text_proj_names(layout: Layout) -> Names:
    """Of the parts of a `Decoder` that diffusers keeps in a network of their own, text_proj."""
    null = "cf_param" if layout == "karlo" else "learned_classifier_free_guidance_embeddings"
    return _rows(TEXT_PROJ, layout) | {"null_embed": (null,)}


def glide_names(config: UNetConfig, depth: int) -> Names:
    """Of a `Decoder` with GLIDE's text encoder; its U-Net has the names of Karlo's own files."""
    ours, found = "text.encoder.", unet_names(config, "karlo")
    for i in range(depth):
        block = f"{ours}transformer.blocks.{i}."
        found |= _rows(PRIOR_BLOCK, "karlo", block, f"transformer.resblocks.{i}.")
    found |= _rows(GLIDE_TEXT, "karlo", ours)
    found[f"{ours}token_embedding.weight"] = ("token_embedding.weight",)
    found[f"{ours}position_embedding"] = ("positional_embedding",)
    found[f"{ours}padding_embedding"] = ("padding_embedding",)
    return found


def unet_names(config: UNetConfig, layout: Layout, ours: str = "net.") -> Names:
    """Of a U-Net; layers that some block lacks (shortcut, attention) are named as well."""
    found = _rows(UNET, layout, ours) | _rows(TIME, layout, f"{ours}time_embed.")
    for block, part, theirs in _blocks(config, layout):
        table = ATTENTION if part == "attention" else RES
        found |= _rows(table, layout, f"{ours}{block}.{part}.", f"{theirs}.")
    return found


def _blocks(config: UNetConfig, layout: Layout) -> Iterator[tuple[str, str, str]]:
    """(our block, its part, their name of that part) of all blocks."""
    own, depth, levels = layout == "karlo", config.depth, len(config.mults)
    attended = [side in config.attention for side in config.sides]
    index = 0
    for level in range(levels):
        theirs = f"down_blocks.{level}"
        for i in range(depth + (level < levels - 1)):
            block, place = f"down_blocks.{index}", f"input_blocks.{index + 1}"
            res = f"resnets.{i}" if i < depth else "downsamplers.0"
            yield block, "res1", f"{place}.0" if own else f"{theirs}.{res}"
            if i < depth:
                yield block, "attention", f"{place}.1" if own else f"{theirs}.attentions.{i}"
            index += 1
    middle = "middle_block" if own else "mid_block"
    yield "middle_block", "res1", f"{middle}.0" if own else f"{middle}.resnets.0"
    yield "middle_block", "attention", f"{middle}.1" if own else f"{middle}.attentions.0"
    second = 2 if config.middle_attention else 1
    yield "middle_block", "res2", f"{middle}.{second}" if own else f"{middle}.resnets.1"
    for index in range(levels * (depth + 1)):
        level, i = divmod(index, depth + 1)
        block, place, theirs = f"up_blocks.{index}", f"output_blocks.{index}", f"up_blocks.{level}"
        yield block, "res1", f"{place}.0" if own else f"{theirs}.resnets.{i}"
        yield block, "attention", f"{place}.1" if own else f"{theirs}.attentions.{i}"
        last = 2 if attended[levels - 1 - level] else 1
        yield block, "res2", f"{place}.{last}" if own else f"{theirs}.upsamplers.0"


def fill(
    ours: Mapping[str, Tensor], names: Names, source: Tensors, head_width: int | None = None
) -> dict[str, Tensor]:
    """Our tensors from theirs, in the type of their files.

    Args:
        ours: tensors of our module by name; only their shapes count (meta device).
        names: from the functions above; those that are not in `ours` are left out.
        source: theirs.
        head_width: of Karlo's own files, in which (heads, q k v, head_width) is one axis.

    Returns:
        the tensors of `ours` that `names` has.

    Raises:
        UserError: a tensor is missing or has another shape, or there are more than `names` has.
    """
    wanted = {name: theirs for name, theirs in names.items() if name in ours}
    read = {theirs for group in wanted.values() for theirs in group}
    if more := sorted(source.names - read):
        raise UserError(
            f"{source.where} has tensors that this model does not ({', '.join(more[:2])}): it is "
            "another model, so give the files as their authors published them."
        )
    found = {}
    for name, theirs in wanted.items():
        value = joined([source[other] for other in theirs])
        shape = ours[name].shape
        if value is None or not same_but_ones(value.shape, shape):
            sizes = " and ".join(str(tuple(source[other].shape)) for other in theirs)
            raise UserError(
                f"{source.where} has {theirs[0]} of shape {sizes}, which gives no {tuple(shape)}: "
                "it is another model, or of other sizes than its settings say."
            )
        layer = f".{name}".rsplit(".", 2)[-2]
        if head_width is not None and (count := MIXED.get(layer)):
            value = value.unflatten(0, (-1, count, head_width)).transpose(0, 1).flatten(0, 2)
        found[name] = value.reshape(shape).contiguous()
    return found


def joined(parts: list[Tensor]) -> Tensor | None:
    """Tensors one below the other; None where their shapes do not allow it."""
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def same_but_ones(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes differ in axes of length 1 only."""
    return [side for side in a if side != 1] == [side for side in b if side != 1]
