"""Where the stages run: on the device all the time, or only while they work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.stages.base import Stage
from unclip_pl.utils.precision import autocast


@contextmanager
def on_device(
    model: Stage | FrozenCLIP,
    device: torch.device | str,
    offload: bool,
    precision: str = "fp32",
) -> Iterator[None]:
    """Keep a stage or a CLIP on `device` while the body runs, and compute in `precision` there.

    With `offload` the model returns to the CPU's memory afterwards.
    """
    if model.device != torch.device(device):
        model.to(device)
    try:
        with autocast(precision, device):
            yield
    finally:
        if offload:
            model.to("cpu")


def canonical_device(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" becomes the current GPU, such as "cuda:0"."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def accelerate_stages(
    stages: Sequence[Stage], device: torch.device, compile: bool, cuda_graphs: bool
) -> None:
    """Compile the blocks of stages that will run on `device`, and let them use CUDA graphs."""
    for stage in stages:
        stage.cuda_graphs = cuda_graphs
        if compile:
            compile_blocks(stage, device)
