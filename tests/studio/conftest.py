"""A studio of a tiny decoder of 16 pixels, with the CLIP and the priors of the package."""

import base64

import pytest
import torch

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.locate import DEFAULT_PRIORS
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.probe import PrincipalComponents
from unclip_pl.stages import upsampler
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.studio.engine import Engine
from unclip_pl.studio.models import Models
from unclip_pl.utils.images import png_bytes

TINY = {"width": 32, "mults": (1,), "depth": 1, "head_width": 32}


def awake(stage, fingerprint):
    """The stage with outputs that do not start at zero."""
    for parameter in stage.net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    stage.clip_fingerprint = fingerprint
    return stage.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def models():
    return tiny_models(16)


def tiny_models(side):
    """Models whose decoder draws `side` pixels, and an upsampler."""
    torch.manual_seed(0)
    clip = FrozenCLIP()
    net = UNetConfig(image_size=side, embed_dim=256, attention=(), middle_attention=False, **TINY)
    v = DiffusionConfig(parametrization="v")
    decoder = Decoder(net=net, sampling=DecoderSamplingConfig(sampler="ddim", steps=4), diffusion=v)
    decoder = awake(decoder, clip.fingerprint())
    larger = UNetConfig(image_size=4 * side, **TINY, **upsampler.NET)
    v = DiffusionConfig(parametrization="v", variance="fixed_small")
    sampling = upsampler.UpsamplingConfig(steps=3)
    stages = [awake(upsampler.Upsampler256(larger, v, sampling), None)]
    priors = {
        name: load_stage(path, DiffusionPrior, ARPrior) for name, path in DEFAULT_PRIORS.items()
    }
    return Models(UnCLIP(decoder, clip=clip, upsamplers=stages), priors)


@pytest.fixture
def engine(models):
    engine = Engine(models, limit=20)
    yield engine
    engine.close()


def picture(side=40, seed=0):
    """A picture file in base64."""
    noise = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    large = torch.nn.functional.interpolate(noise[None], (side, side))[0]
    return base64.b64encode(png_bytes(large)).decode()


def mask(side=40):
    """White in the left half."""
    image = torch.full((3, side, side), -1.0)
    image[:, :, : side // 2] = 1
    return base64.b64encode(png_bytes(image)).decode()


def principal():
    """The principal components of embeddings that point everywhere."""
    axes = torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64))[0].T
    ones = torch.ones(256, dtype=torch.float64)
    return PrincipalComponents(torch.zeros(256, dtype=torch.float64), axes, ones)
