"""The same networks in Karlo's own files: names and layouts the other way round than the importer
reads them, written down from Karlo's modules."""

from pathlib import Path

import torch
from torch import Tensor

HEAD = 64
RES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RES |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
KINDS = "weight", "bias"


def by_heads(*parts: Tensor) -> Tensor:
    """Rows of q, k and v of the first head, then those of the second ..."""
    heads = [part.unflatten(0, (-1, HEAD)) for part in parts]
    return torch.stack(heads, 1).flatten(0, 2)


def prior(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"positional_embedding": theirs["positional_embedding"]}
    found["prd_emb"] = theirs["prd_embedding"]
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"clip_img_proj": "proj_in", "text_emb_proj": "embedding_proj", "final_ln": "norm_out"}
    names |= {"text_enc_proj": "encoder_hidden_states_proj", "out_proj": "proj_to_clip_embeddings"}
    depth = len({name.split(".")[1] for name in theirs if name.startswith("transformer_blocks")})
    for i in range(depth):
        mine, block = f"transformer.resblocks.{i}", f"transformer_blocks.{i}"
        names |= {f"{mine}.ln_1": f"{block}.norm1", f"{mine}.ln_2": f"{block}.norm3"}
        names |= {f"{mine}.mlp.c_fc": f"{block}.ff.net.0.proj"}
        names |= {f"{mine}.mlp.c_proj": f"{block}.ff.net.2"}
        names |= {f"{mine}.attn.c_proj": f"{block}.attn1.to_out.0"}
        for kind in KINDS:
            qkv = (theirs[f"{block}.attn1.to_{x}.{kind}"] for x in "qkv")
            found[f"{mine}.attn.c_qkv.{kind}"] = by_heads(*qkv)
    return found | {
        f"{a}.{kind}": theirs[f"{b}.{kind}"] for a, b in names.items() for kind in KINDS
    }


def unet(theirs: dict[str, Tensor], levels: int = 4) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def layer(mine: str, other: str) -> None:
        for kind in KINDS:
            if f"{other}.{kind}" in theirs:
                found[f"{mine}.{kind}"] = theirs[f"{other}.{kind}"]

    def res(mine: str, other: str) -> None:
        for b, a in RES.items():
            layer(f"{mine}.{a}", f"{other}.{b}")

    def attention(mine: str, other: str) -> bool:
        if f"{other}.to_q.weight" not in theirs:
            return False
        layer(f"{mine}.norm", f"{other}.group_norm")
        for kind in KINDS:
            end = (..., None) if kind == "weight" else ...  # Conv1d of width 1
            qkv = (theirs[f"{other}.to_{x}.{kind}"] for x in "qkv")
            kv = (theirs[f"{other}.add_{x}_proj.{kind}"] for x in "kv")
            found[f"{mine}.qkv.{kind}"] = by_heads(*qkv)[end]
            found[f"{mine}.encoder_kv.{kind}"] = by_heads(*kv)[end]
            found[f"{mine}.proj_out.{kind}"] = theirs[f"{other}.to_out.0.{kind}"][end]
        return True

    layer("input_blocks.0.0", "conv_in")
    layer("time_embed.0", "time_embedding.linear_1")
    layer("time_embed.2", "time_embedding.linear_2")
    layer("out.0", "conv_norm_out")
    layer("out.2", "conv_out")
    place = 1
    for level in range(levels):
        i = 0
        while f"down_blocks.{level}.resnets.{i}.conv1.weight" in theirs:
            res(f"input_blocks.{place}.0", f"down_blocks.{level}.resnets.{i}")
            attention(f"input_blocks.{place}.1", f"down_blocks.{level}.attentions.{i}")
            place, i = place + 1, i + 1
        if f"down_blocks.{level}.downsamplers.0.conv1.weight" in theirs:
            res(f"input_blocks.{place}.0", f"down_blocks.{level}.downsamplers.0")
            place += 1
    res("middle_block.0", "mid_block.resnets.0")
    second = 2 if attention("middle_block.1", "mid_block.attentions.0") else 1
    res(f"middle_block.{second}", "mid_block.resnets.1")
    place = 0
    for level in range(levels):
        i = 0
        while f"up_blocks.{level}.resnets.{i}.conv1.weight" in theirs:
            res(f"output_blocks.{place}.0", f"up_blocks.{level}.resnets.{i}")
            has = attention(f"output_blocks.{place}.1", f"up_blocks.{level}.attentions.{i}")
            place, i = place + 1, i + 1
        res(f"output_blocks.{place - 1}.{2 if has else 1}", f"up_blocks.{level}.upsamplers.0")
    return found


def text_proj(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"text_seq_proj.0": "encoder_hidden_states_proj", "text_feat_proj": "embedding_proj"}
    names |= {"text_seq_proj.1": "text_encoder_hidden_states_norm"}
    names |= {"clip_tok_proj": "clip_extra_context_tokens_proj"}
    names |= {"clip_emb": "clip_image_embeddings_project_to_time_embeddings"}
    found = {f"{a}.{kind}": theirs[f"{b}.{kind}"] for a, b in names.items() for kind in KINDS}
    return found | {"cf_param": theirs["learned_classifier_free_guidance_embeddings"]}


def behind(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.clone() for name, tensor in tensors.items()}


def save(folder: Path, pipeline) -> Path:
    """Karlo's four files of a diffusers pipeline."""
    state = {
        name: getattr(pipeline, name).state_dict()
        for name in ("prior", "text_proj", "decoder", "super_res_first", "super_res_last")
    }
    folder.mkdir(parents=True)
    decoder = behind("model", unet(state["decoder"]) | text_proj(state["text_proj"]))
    upsampler = behind("model_first_steps", unet(state["super_res_first"]))
    upsampler |= behind("model_last_step", unet(state["super_res_last"]))
    files = {
        "prior-ckpt-step=01000000-of-01000000.ckpt": behind("model", prior(state["prior"])),
        "decoder-ckpt-step=01000000-of-01000000.ckpt": decoder,
        "improved-sr-ckpt-step=1.2M.ckpt": upsampler,
    }
    for name, tensors in files.items():
        torch.save({"state_dict": tensors}, folder / name)
    statistics = (state["prior"]["clip_mean"][0], state["prior"]["clip_std"][0])
    torch.save(statistics, folder / "ViT-L-14_stats.th")
    return folder
