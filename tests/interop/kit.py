"""Small Karlos with random weights, as diffusers makes, saves and draws with them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unclip_pl.clip.loading import import_open_clip

diffusers = pytest.importorskip("diffusers", reason="diffusers draws the pictures to compare with")
transformers = pytest.importorskip("transformers", reason="its CLIP towers are needed")
deprecated = pytest.importorskip(
    "diffusers.pipelines.deprecated.unclip", reason="this diffusers has no UnCLIPPipeline any more"
)
from diffusers import (  # noqa: E402
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

WIDTHS = {"narrow": (32, 32), "heads of 64": (64, 64), "wide": (96, 32)}
"""Channels of the U-Nets' finest level, and of a head, of three small Karlos."""


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that let everything show: norms and biases are not what they are at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or "embedding" in name:
                parameter.copy_(0.1 * noise)
            elif name.endswith("clip_std"):
                parameter.copy_(0.5 + 0.1 * noise.abs())
            else:
                parameter.copy_(noise * (0.3 * parameter[0].numel() ** -0.5))
    return module.eval()


def tokenizer():
    """CLIP's tokenizer with Karlo's padding, from the vocabulary that open_clip brings."""
    bpe = import_open_clip().SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): number for token, number in bpe.encoder.items()}
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.get)
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token="!", model_max_length=77
    )


def towers(dim: int, act: str = "quick_gelu", seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """A text and a vision tower, rounded to float16 as published ones are."""
    shared = {"intermediate_size": 3 * dim, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared |= {"hidden_size": dim, "projection_dim": dim, "hidden_act": act}
    text = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(pad_token_id=0, eos_token_id=49407, **shared)
    )
    vision = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(image_size=28, patch_size=14, **shared)
    )
    made = randomise(text, seed), randomise(vision, seed + 1)
    return tuple(tower.half().float() for tower in made)


def networks(width: int, head: int, dim: int, side: int = 16, seed: int = 10) -> dict:
    """Karlo's five networks, small."""
    channels = tuple(width * mult for mult in (1, 2, 3, 4))
    cross, plain = "SimpleCrossAttn", "Resnet"
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=head, num_layers=2, embedding_dim=dim
    )
    text_proj = deprecated.UnCLIPTextProjModel(
        clip_embeddings_dim=dim, time_embed_dim=4 * width, cross_attention_dim=48
    )
    decoder = UNet2DConditionModel(
        sample_size=side,
        in_channels=3,
        out_channels=6,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=(f"{plain}DownsampleBlock2D", *[f"{cross}DownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*[f"{cross}UpBlock2D"] * 3, f"{plain}UpsampleBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=head,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )

    def super_res() -> nn.Module:
        return UNet2DModel(
            sample_size=4 * side,
            in_channels=6,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(width, 2 * width, 2 * width, width),
            down_block_types=["ResnetDownsampleBlock2D"] * 4,
            up_block_types=["ResnetUpsampleBlock2D"] * 4,
            add_attention=False,
        )

    found = {"prior": prior, "text_proj": text_proj, "decoder": decoder}
    found |= {"super_res_first": super_res(), "super_res_last": super_res()}
    return {name: randomise(net, seed + i) for i, (name, net) in enumerate(found.items())}


def schedulers() -> dict:
    """With Karlo's settings."""
    return {
        "prior_scheduler": UnCLIPScheduler(clip_sample_range=5.0, prediction_type="sample"),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(),
    }


def pipelines(width: int = 32, head: int = 32, side: int = 16, dim: int = 32):
    """diffusers' text-to-image and image-variation pipelines of one small Karlo."""
    text, vision = towers(dim)
    nets, steps = networks(width, head, dim, side), schedulers()
    shared = {"text_encoder": text, "tokenizer": tokenizer()} | nets | steps
    generate = deprecated.UnCLIPPipeline(**shared)
    for name in ("prior", "prior_scheduler"):
        del shared[name]
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    vary = deprecated.UnCLIPImageVariationPipeline(
        image_encoder=vision, feature_extractor=processor, **shared
    )
    for pipeline in (generate, vary):
        pipeline.set_progress_bar_config(disable=True)
    return generate, vary


def save(folder: Path, generate, vary) -> Path:
    """One folder with all that both pipelines have, as text-to-image names it."""
    generate.save_pretrained(folder)
    vary.image_encoder.save_pretrained(folder / "image_encoder")
    vary.feature_extractor.save_pretrained(folder / "feature_extractor")
    return folder


def in_float64(scheduler) -> None:
    """Tables in the precision in which this project keeps its own."""
    from diffusers.schedulers import scheduling_unclip

    exact = torch.float64
    made = scheduling_unclip.betas_for_alpha_bar(1000)
    assert made.dtype == torch.float32
    steps = torch.arange(1001, dtype=exact) / 1000
    bar = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    scheduler.betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    assert (scheduler.betas - made).abs().max() < 1e-6
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=exact)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def drawn_by_diffusers(pipeline, seeds: list[int], steps: tuple[int, ...], **call) -> dict:
    """What a pipeline draws: the embedding ("prior"), the small and the large picture in [-1, 1].

    `steps` of its stages, in order; sample k has one generator for all stages.
    """
    seen: dict = {}
    step = pipeline.decoder_scheduler.step

    def watched(*args, **kwargs):
        result = step(*args, **kwargs)
        seen["decoder"] = result.prev_sample.clamp(-1, 1)
        return result

    hook = pipeline.text_proj.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(prior=kwargs["image_embeddings"]), with_kwargs=True
    )
    names = ("prior", "decoder", "super_res")[-len(steps) :]
    counts = {f"{name}_num_inference_steps": count for name, count in zip(names, steps)}
    pipeline.decoder_scheduler.step = watched
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(generator=generators, output_type="np", **counts, **call).images
    finally:
        hook.remove()
        del pipeline.decoder_scheduler.step
    return seen | {"upsampler": torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1}


@torch.no_grad()
def drawn_by_us(unclip, seeds: list[int], batch: dict, steps: tuple[int, ...]) -> dict:
    """The same by the stages of an UnCLIP; `batch` has the caption, or an `image_embed`."""
    from dataclasses import replace

    from unclip_pl.diffusion.noise import Noise

    noise, upsampler = Noise(seeds), unclip.cascade.stages[0]
    drawn = {"prior": batch.get("image_embed")}
    if drawn["prior"] is None:
        sampling = replace(unclip.prior.sampling, steps=steps[0])
        drawn["prior"] = unclip.prior.sample(batch, noise, sampling)
    given = batch | {"image_embed": drawn["prior"]}
    sampling = replace(unclip.decoder.sampling, steps=steps[-2])
    drawn["decoder"] = unclip.decoder.sample(given, noise, sampling).clamp(-1, 1)
    sampling = replace(upsampler.sampling, steps=steps[-1])
    drawn["upsampler"] = upsampler.sample({"low_res": drawn["decoder"]}, noise, sampling)
    return drawn


def noise(seeds: list[int]):
    from unclip_pl.diffusion.noise import Noise

    return Noise(seeds)


def karlo_size() -> dict[str, nn.Module]:
    """Karlo's networks at their own size, as diffusers' conversion configures them."""
    cross, plain = "SimpleCrossAttn", "Resnet"
    channels = (320, 640, 960, 1280)
    decoder = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        layers_per_block=3,
        block_out_channels=channels,
        down_block_types=(f"{plain}DownsampleBlock2D", *[f"{cross}DownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*[f"{cross}UpBlock2D"] * 3, f"{plain}UpsampleBlock2D"),
        cross_attention_dim=1536,
        attention_head_dim=64,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    upsampler = UNet2DModel(
        sample_size=256,
        in_channels=6,
        out_channels=3,
        layers_per_block=3,
        block_out_channels=channels,
        down_block_types=["ResnetDownsampleBlock2D"] * 4,
        up_block_types=["ResnetUpsampleBlock2D"] * 4,
        add_attention=False,
    )
    text_proj = deprecated.UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)
    return {
        "prior": PriorTransformer(),
        "text_proj": text_proj,
        "decoder": decoder,
        "super_res_first": upsampler,
    }


def loaded(folder: Path, kind: str):
    """A pipeline from its folder, module by module: versions after 0.33 do not find `text_proj`."""
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == kind
    known = {"diffusers": diffusers, "transformers": transformers, "unclip": deprecated}
    parts = {
        name: getattr(known[entry[0]], entry[1]).from_pretrained(folder / name)
        for name, entry in index.items()
        if isinstance(entry, list)
    }
    pipeline = getattr(deprecated, kind)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def captions_of(unclip, captions: list[str]) -> dict[str, Tensor]:
    """Captions as the stages take them."""
    tokens = unclip.clip.tokenize(captions)
    text = unclip.clip.embed_text(tokens)
    return {"text_mask": text.mask, "text_embed": text.embed, "text_states": text.states}
