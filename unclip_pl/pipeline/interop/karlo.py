"""Karlo (Kakao Brain 2022) in diffusers' folder layout, and what both of its layouts share.

A CLIP, a prior, a decoder and an upsampler come out. Its stages are configurations of ours; the
settings below are those of its paper's code and of diffusers' `UnCLIPPipeline`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.interop.files import Tensors, read_json, read_network
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import CondDropoutConfig, Decoder, DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.stages.upsampler import NET, Upsampler256, UpsamplingConfig
from unclip_pl.utils.errors import UserError

PIPELINES = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"
PARAMETRIZATIONS = {"epsilon": "eps", "sample": "x0"}

PRIOR_FIXED = {
    "additional_embeddings": 4,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
UNET_FIXED = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "mid_block_scale_factor": 1,
}
DECODER_FIXED = UNET_FIXED | {
    "in_channels": 3,
    "out_channels": 6,
    "class_embed_type": "identity",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "only_cross_attention": False,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
}
UPSAMPLER_FIXED = UNET_FIXED | {
    "in_channels": 6,
    "out_channels": 3,
    "class_embed_type": None,
    "add_attention": False,
}


Threshold = Literal["static"] | None


@dataclass
class Part:
    """A stage without weights (on the meta device), and where its networks' weights are."""

    name: str
    """Of the folder that will hold its release."""
    stage: Stage
    sources: dict[str, Tensors]
    """"prior"; "decoder" and "text_proj"; "super_res_first" and "super_res_last"."""


def require(given: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """UserError unless the settings of a network that are given are those wanted."""
    for key, value in wanted.items():
        found = given.get(key, value)
        if (list(found) if isinstance(found, (list, tuple)) else found) != value:
            raise UserError(
                f"{where} has {key} {found}, and {value} is needed: it is another model, which "
                "cannot be imported as this one."
            )


def sizes(given: dict[str, Any], *keys: str, where: Path) -> list[Any]:
    """Settings that a network's configuration must name."""
    if missing := [key for key in keys if key not in given]:
        raise UserError(
            f"{where} does not say its {missing[0]}: it is a file of another model, or damaged, so "
            "get it again."
        )
    return [given[key] for key in keys]


def prior_stage(
    net: PriorTransformerConfig, length: int, threshold: float | None, parametrization: str = "x0"
) -> DiffusionPrior:
    """Karlo's prior, without weights: 25 steps of DDPM with guidance 4.

    diffusers keeps the predicted embedding within a `threshold` of 5, Karlo's own code within 10.
    """
    with torch.device("meta"):
        return DiffusionPrior(
            net,
            PriorTextConfig(
                states_width=net.embed_dim, context_length=length, padding="masked", null="empty"
            ),
            DiffusionConfig(parametrization=parametrization, variance="fixed_small"),
            cond_dropout=0.2,
            sampling=PriorSamplingConfig(
                "ddpm", steps=25, guidance_scale=4.0, num_candidates=1, threshold=threshold
            ),
            normalizer="standard",
        )


def decoder_stage(net: UNetConfig, threshold: Threshold = "static") -> Decoder:
    """Karlo's decoder, without weights: 25 steps of DDPM with guidance 8."""
    with torch.device("meta"):
        return Decoder(
            net,
            TextConfig("states", states_width=net.embed_dim, null="empty"),
            DiffusionConfig(variance_bound=None),
            CondDropoutConfig(embed=0.1, text=0.3),
            DecoderSamplingConfig("ddpm", steps=25, guidance_scale=8.0, threshold=threshold),
            normalizer="none",
        )


def upsampler_stage(net: UNetConfig, threshold: Threshold = "static") -> Upsampler256:
    """Karlo's super-resolution, without weights: 7 steps of DDPM, the last by a second network."""
    with torch.device("meta"):
        return Upsampler256(
            net,
            DiffusionConfig(variance="fixed_small"),
            UpsamplingConfig("ddpm", steps=7, threshold=threshold),
            last_net=True,
        )


def read_folder(folder: Path) -> list[Part]:
    """The stages in a folder of diffusers' layout; none of the weights is read yet.

    Raises:
        UserError: it is another pipeline, or parts are missing, damaged or of other shape.
    """
    kind = pipeline_of(folder, "Karlo", PIPELINES)
    parts = [] if kind == PIPELINES[1] else [prior_part(folder, "prior_scheduler")]
    return [*parts, _decoder(folder), _upsampler(folder)]


def pipeline_of(folder: Path, name: str, pipelines: tuple[str, ...]) -> str:
    """Which of diffusers' pipelines a folder holds.

    Raises:
        UserError: none of `pipelines`, of which `name` is one.
    """
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind in pipelines:
        return kind
    wanted = f"{name} is a {' or a '.join(pipelines)}"
    if str(kind).startswith(("Kandinsky", "StableUnCLIP")) and "Prior" not in str(kind):
        raise UserError(
            f"{folder} holds a {kind}, whose decoder draws the latents of an autoencoder, which is "
            f"another network than an unCLIP decoder of pixels; {wanted}: give its folder."
        )
    raise UserError(f"{folder} holds a {kind}, and {wanted}: give its folder.")


def prior_part(folder: Path, scheduler: str) -> Part:
    """The prior in a folder, whose scheduler has a name of its own in each pipeline."""
    config, source = read_network(folder / "prior")
    where = folder / "prior" / "config.json"
    require(config, PRIOR_FIXED, where)
    heads, head_width, depth, embed_dim, length = sizes(
        config,
        *("num_attention_heads", "attention_head_dim", "num_layers"),
        *("embedding_dim", "num_embeddings"),
        where=where,
    )
    settings = _scheduler(folder / scheduler, "fixed_small_log", tuple(PARAMETRIZATIONS))
    net = PriorTransformerConfig(embed_dim, heads * head_width, depth, heads)
    limit = settings.get("clip_sample_range", 1.0) if settings.get("clip_sample", True) else None
    parametrization = PARAMETRIZATIONS[settings["prediction_type"]]
    return Part("prior", prior_stage(net, length, limit, parametrization), {"prior": source})


def _scheduler(folder: Path, variance: str, predictions: tuple[str, ...]) -> dict[str, Any]:
    """The settings of one of the three schedulers, checked."""
    where = folder / "scheduler_config.json"
    settings = {"prediction_type": "epsilon"} | read_json(where)
    wanted = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    require(settings, wanted | {"variance_type": variance}, where)
    if settings["prediction_type"] not in predictions:
        raise UserError(
            f"{where} has prediction_type {settings['prediction_type']}, and "
            f"{' or '.join(predictions)} is needed: it is another model."
        )
    return settings


def _threshold(folder: Path, variance: str) -> Threshold:
    """Whether a decoder's or an upsampler's pictures are kept in [-1, 1] at each step."""
    settings = _scheduler(folder, variance, ("epsilon",))
    require(settings, {"clip_sample_range": 1.0}, folder / "scheduler_config.json")
    return "static" if settings.get("clip_sample", True) else None


def _unet(config: dict[str, Any], cross: str, where: Path) -> dict[str, Any]:
    """Read the fields of a UNetConfig from a network's settings.

    Levels have attention where their blocks are named `cross`.
    """
    side, depth, channels, down, up = sizes(
        config,
        *("sample_size", "layers_per_block", "block_out_channels"),
        *("down_block_types", "up_block_types"),
        where=where,
    )
    attended = [kind == f"{cross}DownBlock2D" for kind in down]
    for key, given, plain in (("down", down, "downsample"), ("up", up[::-1], "upsample")):
        names = (f"{cross}{key.title()}Block2D", f"Resnet{plain.title()}Block2D")
        expected = [names[0] if has else names[1] for has in attended]
        require({f"{key}_block_types": given}, {f"{key}_block_types": expected}, where)
    width = channels[0]
    if any(channel % width for channel in channels):
        raise UserError(
            f"{where} has block_out_channels {channels}, which are no multiples of the first: it "
            "is another model."
        )
    return {
        "image_size": side,
        "width": width,
        "mults": tuple(channel // width for channel in channels),
        "depth": depth,
        "attention": tuple(side // 2**i for i, has in enumerate(attended) if has),
        "dropout": 0.1,
    }


def _decoder(folder: Path) -> Part:
    config, source = read_network(folder / "decoder")
    where = folder / "decoder" / "config.json"
    require(config, DECODER_FIXED, where)
    levels, head_width, context = sizes(
        config, "block_out_channels", "attention_head_dim", "cross_attention_dim", where=where
    )
    fields = _unet(config, "SimpleCrossAttn", where)
    text, text_source = read_network(folder / "text_proj")
    text_where = folder / "text_proj" / "config.json"
    require(text, {"cross_attention_dim": context, "time_embed_dim": 4 * levels[0]}, text_where)
    tokens = text.get("clip_extra_context_tokens", 4)
    embed_dim = text.get("clip_embeddings_dim", 768)
    net = UNetConfig(
        head_width=head_width,
        embed_dim=embed_dim,
        embed_tokens=tokens,
        context_width=context,
        **fields,
    )
    stage = decoder_stage(net, _threshold(folder / "decoder_scheduler", "learned_range"))
    return Part("decoder", stage, {"decoder": source, "text_proj": text_source})


def _upsampler(folder: Path) -> Part:
    sources, nets = {}, []
    for name in ("super_res_first", "super_res_last"):
        config, sources[name] = read_network(folder / name)
        where = folder / name / "config.json"
        require(config, UPSAMPLER_FIXED, where)
        fields = _unet(config, "no attention here: ", where) | NET
        film = config.get("resnet_time_scale_shift", "default") == "scale_shift"
        nets.append(UNetConfig(scale_shift=film, **fields))
    if nets[0] != nets[1]:
        raise UserError(
            f"{folder} has a super_res_last of other sizes than super_res_first: give the folder "
            "as its authors published it."
        )
    threshold = _threshold(folder / "super_res_scheduler", "fixed_small_log")
    return Part("upsampler-256", upsampler_stage(nets[0], threshold), sources)
