"""`stages/karlo`: configurations of Karlo's size, in which imported weights train on."""

import pytest
import torch

from tests.interop.same_stage import require_same_stage
from unclip_pl.cli.configs import find_configs
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.networks.prior import PriorTransformerConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.interop.karlo import decoder_stage, prior_stage, upsampler_stage
from unclip_pl.stages.upsampler import NET

IMPORTED = {
    "diffusion_prior": lambda: prior_stage(PriorTransformerConfig(768, 2048, 20, 32), 77, 5.0),
    "decoder": lambda: decoder_stage(UNetConfig(width=320, embed_dim=768, context_width=1536)),
    "upsampler_256": lambda: upsampler_stage(
        UNetConfig(image_size=256, width=320, scale_shift=False, **NET)
    ),
}
COUNTS = {  # of diffusers' modules of Karlo's size, without the prior's mean and std
    "diffusion_prior": 1_022_028_544,
    "decoder": 893_318_086,
    "upsampler_256": 2 * 691_579_523,
}


def configured(name: str):
    clip = [] if name.startswith("upsampler") else ["-c", "lightning_config/clip/ViT-L-14.yaml"]
    words = ["-c", "lightning_config/default.yaml", "-c", f"stages/{name}.yaml", *clip]
    words += ["-c", f"stages/karlo/{name}.yaml", "--trainer.accelerator", "cpu"]
    with torch.device("meta"):
        return build_cli(find_configs(words), run=False).model


@pytest.mark.parametrize("name", COUNTS)
def test_they_are_karlos_size_and_take_imported_weights(name):
    stage, imported = configured(name), IMPORTED[name]()
    assert sum(parameter.numel() for parameter in stage.parameters()) == COUNTS[name]
    require_same_stage(stage, imported)
