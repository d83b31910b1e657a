"""A second opinion: small modules of diffusers in the shape of Karlo's decoder give the same output
for the same random weights.
"""

import pytest
import torch
from torch import Tensor, nn

from unclip_pl.networks.blocks import Attention, ResBlock, UNetBlock
from unclip_pl.networks.text import TextConfig, TextContext
from unclip_pl.networks.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

DEPTH, CLIP, CONTEXT, LENGTH = 2, 12, 48, 7
CONFIG = UNetConfig(
    image_size=16,
    width=32,
    mults=(1, 2, 3, 4),
    depth=DEPTH,
    attention=(8, 4, 2),
    head_width=32,
    embed_dim=CLIP,
    context_width=CONTEXT,
)
TEXT = TextConfig(kind="states", states_width=CLIP)


def theirs() -> nn.Module:
    cross, plain = "SimpleCrossAttn", "Resnet"
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        layers_per_block=DEPTH,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=(f"{plain}DownsampleBlock2D", *[f"{cross}DownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*[f"{cross}UpBlock2D"] * 3, f"{plain}UpsampleBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=32,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )


RES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "emb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
HEAD = {
    "conv_in": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}


def fill(ours: nn.Module, source: dict[str, Tensor], *names: str) -> None:
    """One layer of ours from one of theirs, or from several that we keep as one."""
    for kind in ("weight", "bias"):
        getattr(ours, kind).data.copy_(torch.cat([source.pop(f"{name}.{kind}") for name in names]))


def fill_block(
    block: UNetBlock, source: dict[str, Tensor], res1: str, attention: str, res2: str
) -> None:
    for mine, name in ((block.res1, res1), (block.res2, res2)):
        if isinstance(mine, ResBlock):
            for ours, other in RES.items():
                if not isinstance(mine.get_submodule(ours), nn.Identity):
                    fill(mine.get_submodule(ours), source, f"{name}.{other}")
    if isinstance(block.attention, Attention):
        fill(block.attention.norm, source, f"{attention}.group_norm")
        fill(block.attention.qkv, source, *(f"{attention}.to_{x}" for x in "qkv"))
        fill(block.attention.context_kv, source, *(f"{attention}.add_{x}_proj" for x in "kv"))
        fill(block.attention.proj, source, f"{attention}.to_out.0")


def fill_unet(ours: UNet, source: dict[str, Tensor]) -> None:
    for mine, name in HEAD.items():
        fill(ours.get_submodule(mine), source, name)
    for index, block in enumerate(ours.down_blocks):
        level, i = divmod(index, DEPTH + 1)
        name = f"down_blocks.{level}"
        fill_block(
            block,
            source,
            f"{name}.resnets.{i}" if i < DEPTH else f"{name}.downsamplers.0",
            f"{name}.attentions.{i}",
            "",
        )
    fill_block(
        ours.middle_block,
        source,
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
    )
    for index, block in enumerate(ours.up_blocks):
        level, i = divmod(index, DEPTH + 1)
        name = f"up_blocks.{level}"
        fill_block(
            block, source, f"{name}.resnets.{i}", f"{name}.attentions.{i}", f"{name}.upsamplers.0"
        )


def distance(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.fixture
def pair():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = theirs().eval()
    for name, parameter in reference.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
    ours = UNet(CONFIG).eval()
    source = {name: value.detach().clone() for name, value in reference.state_dict().items()}
    fill_unet(ours, source)
    assert not source, f"left over: {sorted(source)}"
    return ours, reference


def projections():
    pytest.importorskip("diffusers.pipelines.deprecated.unclip")
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    return UnCLIPTextProjModel(
        clip_extra_context_tokens=4,
        clip_embeddings_dim=CLIP,
        time_embed_dim=128,
        cross_attention_dim=CONTEXT,
    ).eval()


@torch.no_grad()
def test_unet_and_projections_equal_karlo(pair):
    ours, reference = pair
    project = projections()
    nn.init.normal_(project.text_encoder_hidden_states_norm.weight, mean=1.0, std=0.2)
    text = TextContext(TEXT, CONTEXT, 4 * 32, CLIP).eval()
    source = dict(project.state_dict())
    fill(ours.clip_to_time, source, "clip_image_embeddings_project_to_time_embeddings")
    fill(ours.clip_to_tokens, source, "clip_extra_context_tokens_proj")
    fill(text.encoder.pooled_proj, source, "embedding_proj")
    fill(text.encoder.proj, source, "encoder_hidden_states_proj")
    fill(text.encoder.norm, source, "text_encoder_hidden_states_norm")
    assert set(source) == {"learned_classifier_free_guidance_embeddings"}  # the stage's

    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 871])
    z_i, z_t, states = torch.randn(2, CLIP), torch.randn(2, CLIP), torch.randn(2, LENGTH, CLIP)
    mask = torch.arange(LENGTH) < torch.tensor([[3], [6]])

    context, added = project(
        image_embeddings=z_i,
        prompt_embeds=z_t,
        text_encoder_hidden_states=states,
        do_classifier_free_guidance=False,
    )
    padded = nn.functional.pad(mask, (4, 0), value=True)
    expected = reference(
        x, t, encoder_hidden_states=context, class_labels=added, attention_mask=padded
    ).sample

    caption = text(mask=mask, text_embed=z_t, states=states)
    conditions = {
        "embed": z_i,
        "pooled": caption.pooled,
        "context": caption.context,
        "context_mask": caption.mask,
    }
    encoded = ours.encode_context(**conditions)
    assert distance(encoded.emb, added) < 1e-6
    assert expected.std() > 0.01
    assert distance(ours(x, t, **conditions), expected) < 1e-5
    assert distance(ours(x, t, encoded=encoded), expected) < 1e-5
    last = ours.to(memory_format=torch.channels_last)
    assert distance(last(x, t, **conditions), expected) < 1e-5
    unmasked = reference(x, t, encoder_hidden_states=context, class_labels=added).sample
    everything = text(mask=torch.ones_like(mask), text_embed=z_t, states=states)
    conditions |= {"context": everything.context, "context_mask": None}
    assert distance(ours(x, t, **conditions), unmasked) < 1e-5
    assert distance(unmasked, expected) > 1e-4


@torch.no_grad()
def test_the_comparison_can_fail(pair):
    ours, reference = pair
    x, t, context = torch.randn(1, 3, 16, 16), torch.tensor([500]), torch.randn(1, 4, CONTEXT)
    plain = UNet(UNetConfig(**(vars(CONFIG) | {"embed_dim": 0}))).eval()
    plain.load_state_dict(ours.state_dict(), strict=False)
    expected = reference(
        x, t, encoder_hidden_states=context, class_labels=torch.zeros(1, 128)
    ).sample
    assert distance(plain(x, t, context=context), expected) < 1e-5
    assert distance(plain(x, t + 1, context=context), expected) > 1e-4
    weight = plain.up_blocks[3].attention.context_kv.weight
    weight.copy_(weight.roll(1, 0))
    assert distance(plain(x, t, context=context), expected) > 1e-5


def test_karlo_is_the_size_of_karlo():
    """The shapes of the published decoder, on the meta device, are those of diffusers."""
    big = UNetConfig(width=320, embed_dim=768, context_width=1536)
    with torch.device("meta"):
        net = UNet(big)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    projections = sum(size for name, size in sizes.items() if name.startswith("clip_to_"))
    own = sum(sizes.values()) - projections
    assert projections == 769 * (1280 + 6144)
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(
            sample_size=64,
            in_channels=3,
            out_channels=6,
            layers_per_block=3,
            block_out_channels=(320, 640, 960, 1280),
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            cross_attention_dim=1536,
            attention_head_dim=64,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        )
    assert own == sum(p.numel() for p in reference.parameters())
