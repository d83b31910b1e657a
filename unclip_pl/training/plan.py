"""What a training run needs: memory of each GPU and time, counted on the meta device, so that a 3.5B stage is planned on a laptop in seconds.

Operations are those of matrix products, convolutions and attention (half of it where it is causal), a multiply-add being two; training is three times
the forward pass, and what checkpointing computes again is not counted, as MFU is defined. Memory is what must be held; allocators and kernels need more.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast
from unittest import mock

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.networks.layers import Unit

GB = 1e9
Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Needs:
    """What one stage needs, counted by `count`; bytes for training in "bf16-mixed"."""

    parameters: int
    largest_unit: int
    """Parameters of the largest `Unit`."""
    outside: int
    """Parameters outside of all units, which FSDP gathers once a step and holds."""
    flops: float
    """Of a training step, a sample."""
    activations: float
    """Bytes a sample of all that the backward pass needs, without checkpointing."""
    checkpointed: float
    """Bytes a sample with checkpointing: what stands between units, and all of the unit that needs most."""


@dataclass(frozen=True)
class Row:
    """A run of `gpus` GPUs: bytes a GPU by what they hold, and its time."""

    gpus: int
    strategy: Strategy
    weights: float
    gradients: float
    optimizer: float
    ema: float
    gathered: float
    """Copies in the precision of the computation, and unsharded gradients, of the units under way."""
    activations: float
    micro_batch: int
    """Samples a GPU and pass; 0: not even one fits."""
    accumulate: int
    """Passes a step."""
    steps_an_hour: float
    hours: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema + self.gathered + self.activations


class _Autocast(TorchFunctionMode):
    """bfloat16 autocast as GPUs have it, on the meta device, which has none; attention as its fast kernels do it, which keep no scores.

    `copies` are the weights in bfloat16 by their storage; `flops` those of attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, Tensor] = {}
        self.flops = 0.0

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._half(x) for x in args[:3])
            pairs: float = q.shape[-2] * k.shape[-2]
            if kwargs.get("is_causal"):
                pairs = q.shape[-2] * (2 * k.shape[-2] - q.shape[-2] + 1) / 2
            self.flops += 4 * math.prod(q.shape[:-2]) * pairs * q.shape[-1]
            return _Attention.apply(q, k, v)
        if func in (F.linear, F.conv2d, F.conv_transpose2d):
            args = tuple(self._half(x, weight=place > 0) if isinstance(x, Tensor) else x for place, x in enumerate(args))
        return func(*args, **kwargs)

    def _half(self, x: Tensor, weight: bool = False) -> Tensor:
        half = x.bfloat16()
        if weight:
            self.copies[_storage(half)] = half
        return half


class _Attention(torch.autograd.Function):
    """The shapes of attention that keeps its inputs, its output and one number a query and head (FlashAttention)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def example(stage: Any, crop: int | None = None) -> dict[str, Any]:
    """A batch of one sample on the meta device, with all that a stage may ask for; `crop` is the side of an upsampler's images."""
    net, text = stage.net_config, getattr(stage, "text_config", None)
    batch: dict[str, Any] = {"key": ["0"]}
    with torch.device("meta"):
        if hasattr(net, "image_size"):
            side = crop or net.image_size
            batch |= {"image": torch.zeros(1, 3, side, side), "low_res": torch.zeros(1, 3, side // 4, side // 4)}
        if getattr(net, "embed_dim", 0):
            batch |= {"image_embed": torch.zeros(1, net.embed_dim), "text_embed": torch.zeros(1, net.embed_dim)}
        if text is not None and text.kind != "none":
            batch["tokens"] = torch.zeros(1, text.context_length, dtype=torch.int64)
            if text.kind == "states":
                batch["text_states"] = torch.zeros(1, text.context_length, text.states_width)
    return batch


def count(stage: LightningModule, crop: int | None = None) -> Needs:
    """Parameters, operations and activations of a stage, which is moved to the meta device for it."""
    stage = stage.to("meta").train()
    if (quantizer := cast(Any, getattr(stage, "quantizer", None))) is not None:
        quantizer.codes = quantizer.max_codes  # as many as there may be: the data decide when training starts
    units = {name: module for name, module in stage.named_modules() if isinstance(module, Unit)}
    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units.values()]
    parameters = sum(p.numel() for p in stage.parameters())
    saved, _, flops = _kept(stage, units, crop, checkpointing=False)
    whole = {number: size for part in saved.values() for number, size in part.items()}
    saved, inputs, _ = _kept(stage, units, crop, checkpointing=True)
    between = inputs | saved.pop("")
    largest = max(sum(size for number, size in unit.items() if number not in between) for unit in saved.values())
    return Needs(parameters, max(sizes), parameters - sum(sizes), 3 * flops, sum(whole.values()), sum(between.values()) + largest)


def _kept(
    stage: LightningModule, units: dict[str, Unit], crop: int | None, checkpointing: bool
) -> tuple[dict[str, dict[int, int]], dict[int, int], float]:
    """What the loss of one sample keeps in each unit ("" outside), and the inputs of the units: bytes by storage; operations.

    With `checkpointing`, what a unit keeps when it is computed again alone.
    """
    for module in stage.modules():
        if isinstance(getattr(module, "checkpointing", None), bool):
            cast(Any, module).checkpointing = checkpointing
    weights = {_storage(parameter) for parameter in stage.parameters()}
    kept: list[Tensor] = []  # alive, so that no storage is given another's number
    inside: list[str] = []
    saved: dict[str, dict[int, int]] = {name: {} for name in ("", *units)}
    inputs: dict[int, int] = {}
    half = _Autocast()

    def keep(tensor: Any, where: dict[int, int]) -> None:
        if isinstance(tensor, Tensor) and (number := _storage(tensor)) not in weights and number not in half.copies:
            where[number] = tensor.untyped_storage().nbytes()
            kept.append(tensor)

    def pack(tensor: Tensor) -> Tensor:
        keep(tensor, saved[inside[-1] if inside else ""])
        return tensor

    def enter(name: str, given: tuple) -> None:
        inside.append(name)
        for tensor in given:
            keep(tensor, inputs)

    hooks = [unit.register_forward_pre_hook(lambda _, given, name=name: enter(name, given)) for name, unit in units.items()]
    hooks += [unit.register_forward_hook(lambda *_: inside.pop() and None) for unit in units.values()]
    with (
        mock.patch("torch.autocast", lambda *_, **__: nullcontext()),  # the meta device knows none
        mock.patch("unclip_pl.networks.layers.checkpoint", lambda module, *given, **_: module(*given)),
        mock.patch("unclip_pl.networks.recompute.keep", pack),
        FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half,
    ):
        cast(Any, stage).loss(example(stage, crop))
    for hook in hooks:
        hook.remove()
    return saved, inputs, counter.get_total_flops() + half.flops


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def row(needs: Needs, gpus: int, strategy: Strategy, batch: int, steps: int, *, mfu: float, peak: float, memory: float, checkpointing: bool = True) -> Row:
    """A run of `steps` steps of `batch` samples on `gpus` GPUs.

    Weights, gradients and average are float32, AdamW has two numbers a weight; FSDP shares them out.

    Args:
        needs: what the stage needs.
        batch: samples a step, of all GPUs together.
        mfu: share of `peak` that is reached.
        peak: operations a second of a GPU.
        memory: bytes of a GPU that may be used; as many samples go through at a time as fit.
        checkpointing: activations are computed again in the backward pass.
    """
    each = 4 * needs.parameters / (gpus if strategy == "fsdp" else 1)
    if strategy == "fsdp":  # the root in float32, and two units, of which one is being fetched, in bfloat16; for all of them gradients not yet shared out
        gathered = 8.0 * needs.outside + 2 * (2 + 2) * needs.largest_unit + 4 * needs.largest_unit
    else:  # autocast's copies of the weights in use
        gathered = 2.0 * (needs.largest_unit if checkpointing else needs.parameters)
    sample = needs.checkpointed if checkpointing else needs.activations
    mine = math.ceil(batch / gpus)
    fits = int(max(0.0, memory - 5 * each - gathered) // sample)
    accumulate = math.ceil(mine / fits) if fits else 0
    micro = math.ceil(mine / accumulate) if fits else 0
    seconds = needs.flops * batch / (gpus * peak * mfu)
    return Row(
        gpus, strategy, each, each, 2 * each, each, gathered, micro * sample, micro, accumulate, 3600 / seconds, seconds * steps / 3600
    )
