"""Tiny stages of every kind and batches for them, the same at each call."""

from pathlib import Path

import torch
from torch import nn

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.checkpointing import Checkpointing
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.stages import ar_prior, decoder, diffusion_prior, upsampler
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.utils.byte_pairs import ID_OF_BYTE

STAGES = ("decoder", "diffusion_prior", "ar_prior", "upsampler")
EMBED, STATES, TOKENS = 16, 24, 7
"""Width of a CLIP's embeddings, width of its token states, tokens of a caption."""


def randomise(module: nn.Module, std: float = 0.05) -> None:
    """Add noise to all parameters: what starts at zero would hide its inputs."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))


def fill_zeros(module: nn.Module, std: float = 0.05) -> None:
    """Draw the parameters that start at zero, and so hide their inputs, from a normal."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)


def tiny_stage(
    name: str,
    checkpointing: Checkpointing = "none",
    lr: float = 2e-3,
    dropout: float = 0.0,
    parametrization: str = "v",
) -> Stage:
    """A stage by its name in `STAGES`, with weights drawn from one seed.

    `dropout` and `parametrization` are those of the U-Nets.
    """
    torch.manual_seed(0)
    optimizer = OptimizerConfig(lr=lr, warmup_steps=0)
    states = {"states_width": STATES, "context_length": TOKENS}
    unet = {"width": 32, "mults": (1, 2), "depth": 1, "head_width": 32, "dropout": dropout}
    unet["checkpointing"] = checkpointing
    if name == "decoder":
        net = UNetConfig(image_size=16, attention=(8,), embed_dim=EMBED, context_width=32, **unet)
        text = TextConfig("states", states_width=STATES)
        sampling = decoder.DecoderSamplingConfig("ddim", steps=6, guidance_scale=2.0)
        diffusion = DiffusionConfig(parametrization=parametrization)
        return decoder.Decoder(net, text, diffusion, sampling=sampling, optimizer=optimizer)
    if name == "upsampler":
        net = UNetConfig(image_size=16, **unet, **upsampler.NET)
        sampling = upsampler.UpsamplingConfig(steps=6)
        diffusion = DiffusionConfig(parametrization=parametrization, variance="fixed_small")
        return upsampler.Upsampler256(net, diffusion, sampling, optimizer=optimizer)
    transformer = {"embed_dim": EMBED, "width": 64, "depth": 2, "heads": 2}
    transformer["checkpointing"] = checkpointing
    if name == "diffusion_prior":
        net = PriorTransformerConfig(**transformer)
        sampling = diffusion_prior.PriorSamplingConfig("ddim", steps=6, guidance_scale=2.0)
        return diffusion_prior.DiffusionPrior(
            net, PriorTextConfig("states", **states), sampling=sampling, optimizer=optimizer
        )
    net = ARPriorConfig(max_codes=8, buckets=16, **transformer)
    text = TextConfig("states", **states)
    stage = ar_prior.ARPrior(net, text, max_error=0.9, optimizer=optimizer)
    fit_quantizer(stage, tiny_batch("ar_prior", 200))
    return stage


def fit_quantizer(stage: ar_prior.ARPrior, batch: dict) -> None:
    """Fit an AR prior's codes to the embeddings of a batch."""
    exact = batch["image_embed"].double()
    covariance = exact.T.cov(correction=0)
    stage.quantizer.fit(exact.mean(0), covariance, batch["image_embed"], batch["text_embed"])


def tiny_captions(
    size: int,
    generator: torch.Generator,
    embed: int = EMBED,
    states: int = STATES,
    length: int = TOKENS,
    eot: int = 49407,
) -> dict:
    """Captions as CLIP encodes them, with images' embeddings: EOT is the last token but one.

    `embed` and `states` are the widths of the CLIP; `eot` must be the largest id.
    """
    tokens = torch.randint(1, 100, (size, length), generator=generator)
    tokens[:, -2] = eot
    return {
        "image_embed": torch.randn(size, embed, generator=generator),
        "text_embed": torch.randn(size, embed, generator=generator),
        "text_states": torch.randn(size, length, states, generator=generator),
        "tokens": tokens,
        "text_mask": torch.arange(length).repeat(size, 1) <= length - 2,
    }


def tiny_batch(name: str, size: int = 4, seed: int = 1) -> dict:
    """A batch for a stage by its name in `STAGES`, to train on and to sample for."""
    generator = torch.Generator().manual_seed(seed)
    batch: dict = {"key": [str(i) for i in range(size)]}
    if name in ("decoder", "upsampler"):
        batch["image"] = torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1
    if name == "upsampler":
        batch["low_res"] = torch.nn.functional.avg_pool2d(batch["image"], 4)
        return batch
    return batch | tiny_captions(size, generator)


def on(batch: dict, device: str) -> dict:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def package_decoder(seed: int = 0, **arguments) -> decoder.Decoder:
    """A decoder of 16 pixels for the CLIP in the package, with random weights."""
    torch.manual_seed(seed)
    net = UNetConfig(
        image_size=16,
        width=32,
        mults=(1,),
        depth=1,
        attention=(),
        middle_attention=False,
        head_width=32,
        embed_dim=256,
    )
    sampling = decoder.DecoderSamplingConfig(sampler="ddim", steps=2)
    diffusion = DiffusionConfig(parametrization="v")
    defaults = {"net": net, "sampling": sampling, "diffusion": diffusion}
    stage = decoder.Decoder(**defaults | arguments)
    fill_zeros(stage.net)
    stage.clip_fingerprint = FrozenCLIP().fingerprint()
    return stage.eval()


def captions_decoder() -> decoder.Decoder:
    """A decoder of 16 pixels that reads captions only, by a tokenizer of its own, without a CLIP.

    It joins "ap", "app" and "le"; its caption has 8 positions.
    """
    torch.manual_seed(0)
    net = UNetConfig(
        image_size=16,
        width=32,
        mults=(1,),
        depth=1,
        attention=(16,),
        head_width=32,
        dropout=0.0,
        context_width=16,
    )
    text = TextConfig(
        "transformer",
        vocab_size=260,
        context_length=8,
        width=16,
        depth=1,
        heads=2,
        tokenizer="gpt2",
    )
    stage = decoder.Decoder(
        net,
        text,
        cond_dropout=decoder.CondDropoutConfig(text=0.2),
        sampling=decoder.DecoderSamplingConfig("ddim", steps=2, guidance_scale=2.0),
        normalizer="none",
        condition="none",
    )
    fill_zeros(stage)
    a, p, le = ID_OF_BYTE[ord("a")], ID_OF_BYTE[ord("p")], [ID_OF_BYTE[b] for b in b"le"]
    state = stage.state_dict()
    state["text.encoder.merges"] = torch.tensor([[a, p], [256, p], le], dtype=torch.int32)
    stage.load_state_dict(state)
    return stage.eval()


def package_cascade() -> tuple[decoder.Decoder, upsampler.Upsampler256, upsampler.Upsampler1024]:
    """A decoder and both upsamplers at their real sizes, very small, with random weights."""
    small = {"width": 32, "mults": (1,), "depth": 1, "dropout": 0.0}
    plain = {"attention": (), "middle_attention": False, "head_width": 32, "embed_dim": 256}
    net = UNetConfig(image_size=64, patch_size=4, **plain, **small)
    low = UNetConfig(image_size=256, patch_size=8, **small, **upsampler.NET)
    high = UNetConfig(image_size=1024, patch_size=16, **small, **upsampler.NET)
    sampling = upsampler.UpsamplingConfig(steps=2)
    upsamplers = (
        upsampler.Upsampler256(net=low, sampling=sampling),
        upsampler.Upsampler1024(net=high, sampling=sampling),
    )
    first = package_decoder(net=net)
    for stage in upsamplers:
        fill_zeros(stage.net)
    return first, *(stage.eval() for stage in upsamplers)


def write_release(folder: Path, stage: Stage, steps: int = 1) -> Path:
    """A release of the stage with its weights as they are."""
    weights = Release(
        type(stage).__name__,
        dict(stage.hparams),
        stage.clip_fingerprint,
        stage.state_dict(),
        steps,
    )
    buffers = [name for name, _ in stage.named_buffers()]
    return release.write(folder, weights, "# a card\n", exact=buffers)


def write_checkpoint(path: Path, stage: Stage, steps: int = 7) -> Path:
    """What `lightning fit` keeps of a stage, as far as it is read to draw with."""
    checkpoint = {
        "stage": type(stage).__name__,
        "hyper_parameters": dict(stage.hparams),
        "state_dict": stage.state_dict(),
        "global_step": steps,
        "clip_fingerprint": stage.clip_fingerprint,
    }
    torch.save(checkpoint, path)
    return path
