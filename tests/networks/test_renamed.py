"""Weights written under older names of parameters load under those of today."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.networks.test_compilation import STAGES
from unclip_pl.networks.renamed import rename
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.settings import as_config

# a few of each stage, as version 0.1.0's first releases had them
OLD = {
    "Decoder": {
        "net.time.0.weight": "net.time_embed.0.weight",
        "net.embed_time.bias": "net.clip_to_time.bias",
        "net.embed_context.weight": "net.clip_to_tokens.weight",
        "net.enter.weight": "net.conv_in.weight",
        "net.down.0.block.conv1.weight": "net.down_blocks.0.res1.conv1.weight",
        "net.down.0.block.time.weight": "net.down_blocks.0.res1.emb_proj.weight",
        "net.down.0.attention.context.bias": "net.down_blocks.0.attention.context_kv.bias",
        "net.middle.last.shortcut.weight": "net.middle_block.res2.shortcut.weight",
        "net.norm.weight": "net.norm_out.weight",
        "net.exit.bias": "net.conv_out.bias",
        "text.encoder.project.weight": "text.encoder.proj.weight",
        "text.encoder.pool.weight": "text.encoder.pooled_proj.weight",
        "text.encoder.null_embed": "text.encoder.null_text_embed",
        "null_embed": "null_embed",
        "text.encoder.transformer.norm.bias": "text.encoder.transformer.norm.bias",
    },
    "DiffusionPrior": {
        "net.encode.weight": "net.text_proj.weight",
        "net.embed.weight": "net.text_embed_proj.weight",
        "net.time.2.bias": "net.time_embed.2.bias",
        "net.enter.weight": "net.proj_in.weight",
        "net.exit.weight": "net.proj_out.weight",
        "net.position": "net.position_embedding",
        "net.null_embed": "net.null_text_embed",
        "net.null_text": "net.null_text",
    },
    "ARPrior": {
        "net.padding": "net.padding_embedding",
        "net.embed.weight": "net.text_embed_proj.weight",
        "net.positions": "net.position_embedding",
        "net.null_embed": "net.null_text_embed",
        "net.text.encoder.project.bias": "net.text.encoder.proj.bias",
    },
}


@pytest.mark.parametrize("stage", OLD)
def test_old_names_become_those_of_today(stage):
    assert rename(stage, dict.fromkeys(OLD[stage], 0)) == dict.fromkeys(OLD[stage].values(), 0)


@pytest.mark.parametrize("name", STAGES)
def test_names_of_today_stay(name):
    stage = STAGES[name]()
    state = stage.state_dict()
    assert list(rename(type(stage).__name__, state)) == list(state)


@pytest.mark.parametrize(("old", "kind"), [(True, "full"), (False, "none")])
def test_checkpointing_was_a_bool(old, kind):
    assert as_config(UNetConfig, {"mults": [1, 2], "checkpointing": old}).checkpointing == kind


def test_the_order_of_parameters_is_that_of_older_optimiser_states():
    children = [name for name, _ in STAGES["decoder"]().net.named_children()]
    first = ["time_embed", "clip_to_time", "clip_to_tokens", "conv_in"]
    assert children == [*first, "down_blocks", "up_blocks", "middle_block", "norm_out", "conv_out"]


def test_a_release_of_the_first_format_loads(tmp_path):
    stage = STAGES["decoder"]()
    settings = dict(stage.hparams)
    release.write(
        tmp_path / "new",
        release.Release("Decoder", settings, None, stage.state_dict()),
        "card",
        exact=stage.state_dict(),
    )
    folder = tmp_path / "new"
    back = {new: old for old, new in OLD["Decoder"].items()}
    tensors = load_file(folder / "model.safetensors")
    assert sum(name in back for name in tensors) > 10
    save_file({back.get(k, k): v for k, v in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["format"] = 1
    config["hyper_parameters"]["net"]["checkpointing"] = True
    (folder / "config.json").write_text(json.dumps(config))

    again = load_stage(folder, Decoder)
    assert again.net_config.checkpointing == "full"
    for ours, theirs in zip(again.state_dict().values(), stage.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
