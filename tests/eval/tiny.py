"""Small random stages and a few drawings, for tests of what draws and evaluates."""

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.factories import randomise
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data import openmoji
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.stages.upsampler import NET as UPSAMPLER_NET
from unclip_pl.stages.upsampler import Upsampler256, UpsamplingConfig
from unclip_pl.utils.commands import CommandParser

NET = UNetConfig(
    image_size=16,
    width=32,
    mults=(1,),
    depth=1,
    attention=(8,),
    middle_attention=True,
    head_width=32,
    embed_dim=256,
    context_width=32,
)


def decoder(folder: Path, condition: str = "image", seed: int = 0, pooled: bool = False) -> Path:
    """A release of a decoder with random weights that depends on embedding and caption."""
    torch.manual_seed(seed)
    stage = Decoder(
        net=NET,
        text=TextConfig("states", states_width=80, pooled=pooled),
        sampling=DecoderSamplingConfig(sampler="ddim", steps=2),
        diffusion=DiffusionConfig(parametrization="v"),
        condition=condition,
    )
    randomise(stage.net, 0.1)
    fingerprint = FrozenCLIP().fingerprint()
    weights = Release("Decoder", dict(stage.hparams), fingerprint, stage.state_dict(), 1)
    return release.write(folder, weights, "# a card\n")


def shards(folder: Path, count: int = 20, seed: int = 0, size: int = 16) -> Path:
    """Held-out drawings of `size` pixels, chosen by `seed`, as one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = openmoji.composition_split(openmoji.list_drawings())[1]
    chosen = random.Random(seed).sample(held_out, count)
    openmoji.write_shards(folder, [], chosen, size, progress=False)
    return folder / "val-00000.tar"


class InceptionLayers(nn.Module):
    """Means over 2048 fields of an image."""

    def forward(self, x: Tensor) -> Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(x, (32, 64)).mean(1)
        return means.flatten(1)[:, :, None, None]


class Inception(nn.Module):
    """In form what clean-fid's TorchScript is, without its 90 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = InceptionLayers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def inception(file: Path, module: nn.Module | None = None) -> None:
    """Put the stand-in, or another module, where clean-fid's Inception is looked for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(module or Inception()).save(str(file))


def upsampler(folder: Path, size: int = 64, seed: int = 0) -> Path:
    """A release of an upsampler from a quarter of `size` with random weights, of two steps."""
    torch.manual_seed(seed)
    net = UNetConfig(image_size=size, width=32, mults=(1,), depth=1, patch_size=2, **UPSAMPLER_NET)
    stage = Upsampler256(net=net, sampling=UpsamplingConfig(steps=2))
    randomise(stage.net)
    weights = Release("Upsampler256", dict(stage.hparams), None, stage.state_dict(), 1)
    return release.write(folder, weights, "# a card\n")


def arguments(command: ModuleType, *words: str) -> dict[str, Any]:
    """What the function of `python -m COMMAND` gets from the words of a command line."""
    return CommandParser(command.run, command.__name__).bind(words).keywords
