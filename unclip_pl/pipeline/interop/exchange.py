"""diffusers' unCLIP modules: their settings for a stage of ours, or which of ours is in the way."""

from typing import Any

from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler256
from unclip_pl.utils.errors import UserError

Settings = dict[str, Any]
Exchangeable = DiffusionPrior | Decoder | Upsampler256
PREDICTIONS = {"eps": "epsilon", "x0": "sample"}


def check(stage: Stage) -> Exchangeable:
    """The stage, if diffusers has modules for it.

    Raises:
        UserError: it has none; the sentence names the setting that is in the way.
    """
    kind = type(stage).__name__
    if isinstance(stage, DiffusionPrior):
        rules = _of_prior(stage)
    elif isinstance(stage, Decoder):
        rules = _of_decoder(stage)
    elif isinstance(stage, Upsampler256):
        rules = _of_upsampler(stage)
    else:
        raise UserError(
            f"diffusers has no counterpart of {kind}: it knows a diffusion prior, a decoder and an "
            "upsampler to 256 pixels, so export one of those."
        )
    for name, given, wanted in rules:
        if given not in wanted:
            raise UserError(
                f"The {kind} has model.{name} {given}, which diffusers' modules cannot "
                f"hold: they need {' or '.join(map(str, wanted))}, so train one with that."
            )
    return stage


Rule = tuple[str, Any, tuple]


def _of_process(config: DiffusionConfig, predictions: tuple, variance: str) -> list[Rule]:
    return [
        ("diffusion.schedule", config.schedule, ("cosine",)),
        ("diffusion.timesteps", config.timesteps, (1000,)),
        ("diffusion.parametrization", config.parametrization, predictions),
        ("diffusion.variance", config.variance, (variance,)),
    ]


def _of_prior(stage: DiffusionPrior) -> list[Rule]:
    text = stage.text_config
    return [
        ("text.kind", text.kind, ("states",)),
        ("text.padding", text.padding, ("masked",)),
        ("text.null", text.null, ("empty",)),
        ("text.states_width", text.states_width, (stage.net_config.embed_dim,)),
        ("normalizer", stage.normalizer.mode, ("standard", "none")),
        *_of_process(stage.process.config, ("x0", "eps"), "fixed_small"),
    ]


def _of_decoder(stage: Decoder) -> list[Rule]:
    net, text = stage.net_config, stage.text_config
    return [
        ("condition", stage.condition, ("image",)),
        ("text.kind", text.kind, ("states",)),
        ("text.null", text.null, ("empty",)),
        ("text.pooled", text.pooled, (True,)),
        ("text.states_width", text.states_width, (net.embed_dim,)),
        ("normalizer", stage.normalizer.mode, ("none",)),
        *_of_process(stage.process.config, ("eps",), "learned_range"),
        ("diffusion.variance_bound", stage.process.config.variance_bound, (None,)),
        ("net.patch_size", net.patch_size, (1,)),
        ("net.thumbnail", net.thumbnail, (0,)),
        ("net.embed_tokens", net.embed_tokens, (net.embed_tokens or 4,)),
        ("net.scale_shift", net.scale_shift, (True,)),
        ("net.middle_attention", net.middle_attention, (True,)),
    ]


def _of_upsampler(stage: Upsampler256) -> list[Rule]:
    return [
        *_of_process(stage.process.config, ("eps",), "fixed_small"),
        ("residual_std", stage.residual_std, (0.0,)),
        ("clamp_condition", stage.clamp_condition, (False,)),
        ("net.patch_size", stage.net_config.patch_size, (1,)),
    ]


def scheduler(stage: Exchangeable) -> Settings:
    """scheduler_config.json of diffusers' UnCLIPScheduler."""
    config, threshold = stage.process.config, stage.sampling.threshold
    learned = config.variance == "learned_range"
    return {
        "_class_name": "UnCLIPScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": threshold is not None,
        "clip_sample_range": threshold if isinstance(threshold, float) else 1.0,
        "num_train_timesteps": config.timesteps,
        "prediction_type": PREDICTIONS[config.parametrization],
        "variance_type": "learned_range" if learned else "fixed_small_log",
    }


def prior_settings(stage: DiffusionPrior) -> Settings:
    """config.json of diffusers' PriorTransformer."""
    net = stage.net_config
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": net.heads,
        "attention_head_dim": net.width // net.heads,
        "num_layers": net.depth,
        "embedding_dim": net.embed_dim,
        "num_embeddings": stage.text_config.context_length,
        "additional_embeddings": 4,
        "added_emb_type": "prd",
        "encoder_hid_proj_type": "linear",
        "time_embed_act_fn": "silu",
        "dropout": 0.0,
    }


def text_proj_settings(stage: Decoder) -> Settings:
    """config.json of diffusers' UnCLIPTextProjModel."""
    net = stage.net_config
    return {
        "_class_name": "UnCLIPTextProjModel",
        "clip_embeddings_dim": net.embed_dim,
        "clip_extra_context_tokens": net.embed_tokens,
        "cross_attention_dim": net.context_width,
        "time_embed_dim": 4 * net.width,
    }


def _unet_settings(net: UNetConfig, cross: str) -> Settings:
    attended = [side in net.attention for side in net.sides]
    down = [f"{cross}DownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attended]
    up = [f"{cross}UpBlock2D" if has else "ResnetUpsampleBlock2D" for has in attended[::-1]]
    return {
        "sample_size": net.image_size,
        "in_channels": net.in_channels + net.low_res_channels,
        "out_channels": net.out_channels,
        "layers_per_block": net.depth,
        "block_out_channels": list(net.channels),
        "down_block_types": down,
        "up_block_types": up,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
    }


def decoder_settings(stage: Decoder) -> Settings:
    """config.json of diffusers' UNet2DConditionModel."""
    return _unet_settings(stage.net_config, "SimpleCrossAttn") | {
        "_class_name": "UNet2DConditionModel",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": stage.net_config.context_width,
        "attention_head_dim": stage.net_config.head_width,
        "class_embed_type": "identity",
    }


def upsampler_settings(stage: Upsampler256) -> Settings:
    """config.json of diffusers' UNet2DModel."""
    return _unet_settings(stage.net_config, "") | {
        "_class_name": "UNet2DModel",
        "add_attention": False,
    }
