"""Estimate the memory per GPU and the time of a training run.

Everything is counted on the meta device, so that a stage of 3.5 billion parameters is planned on a
laptop in seconds.

Operations are those of matrix products, convolutions and attention (half of it if it is causal); a
multiply-add counts as two. Training takes three times the forward pass. As MFU is defined, what
checkpointing computes again does not count. Memory is what must be held; allocators and kernels
need more.
"""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.clip.config import DTYPES, CLIPConfig
from unclip_pl.clip.loading import clip_architecture
from unclip_pl.networks.checkpointing import Checkpointing, apply_checkpointing
from unclip_pl.networks.layers import Block
from unclip_pl.networks.long_text import has_own_tokenizer

GB = 1e9
Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class ResourceEstimate:
    """What one stage needs for training in "bf16-mixed", see `estimate_resources`."""

    parameters: int
    largest_block: int
    """Parameters of the largest `Block`."""
    outside: int
    """Parameters outside of all blocks, which FSDP gathers once per step and holds."""
    flops: float
    """Operations per sample of a training step, with those of a CLIP that runs at each step."""
    activations: dict[Checkpointing, float]
    """Bytes per sample that the backward pass needs, for each kind of checkpointing.

    "none": all that autograd saves. "full": what passes between blocks, and all that the largest
    block saves. "selective": as "full", with the results of products, convolutions and attention.
    """
    clip: float = 0.0
    """Bytes of the CLIP that computes token states at each step, whole on every GPU."""
    frozen: int = 0
    """Parameters that training leaves as they are: they have no gradients and no state."""
    idle: int = 0
    """Those of them that training does not compute with either."""
    optimizer: float = 0.0
    """Bytes of the optimiser's state."""


@dataclass(frozen=True)
class RunEstimate:
    """The memory of each GPU in bytes, by what it holds, and the time of a run."""

    gpus: int
    strategy: Strategy
    weights: float
    gradients: float
    optimizer: float
    ema: float
    clip: float
    gathered: float
    """Weights in the precision of the computation, and unsharded gradients, of current blocks."""
    activations: float
    micro_batch: int
    """Samples per GPU and pass; 0: not even one fits."""
    accumulate: int
    """Passes per step."""
    steps_per_hour: float
    hours: float

    @property
    def total(self) -> float:
        """Bytes per GPU."""
        state = self.weights + self.gradients + self.optimizer + self.ema
        return state + self.clip + self.gathered + self.activations


class _Autocast(TorchFunctionMode):
    """Autocast to bfloat16 for the meta device, which has none; attention is a fused kernel.

    Args:
        on_result: called with each result of a product, a convolution or attention.
    """

    def __init__(self, on_result: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.copies: dict[int, Tensor] = {}
        """Weights in bfloat16, by their storage."""
        self.flops = 0.0
        """Operations of attention."""
        self.on_result = on_result

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._half(x) for x in args[:3])
            pairs: float = q.shape[-2] * k.shape[-2]
            if kwargs.get("is_causal"):
                pairs = q.shape[-2] * (2 * k.shape[-2] - q.shape[-2] + 1) / 2
            self.flops += 4 * math.prod(q.shape[:-2]) * pairs * q.shape[-1]
            result = _Attention.apply(q, k, v)
        elif func in (F.linear, F.conv2d):
            args = tuple(
                self._half(x, weight=place > 0) if isinstance(x, Tensor) else x
                for place, x in enumerate(args)
            )
            result = func(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        self.on_result(result)
        return result

    def _half(self, x: Tensor, weight: bool = False) -> Tensor:
        half = x.bfloat16()
        if weight:
            self.copies[_storage(half)] = half
        return half


class _Attention(torch.autograd.Function):
    """The shapes of FlashAttention, which saves inputs, output and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def example_batch(stage: Any, crop: int | None = None) -> dict[str, Any]:
    """A batch of one sample on the meta device, with all inputs that the stage may use.

    Args:
        stage: of this package.
        crop: side of an upsampler's images in pixels; None: the side that its network draws.
    """
    net, text = stage.net_config, getattr(stage, "text_config", None)
    batch: dict[str, Any] = {"key": ["0"]}
    with torch.device("meta"):
        if hasattr(net, "image_size"):
            side = crop or net.image_size
            batch |= {
                "image": torch.zeros(1, 3, side, side),
                "low_res": torch.zeros(1, 3, side // 4, side // 4),
            }
        if getattr(net, "embed_dim", 0):
            batch |= {
                "image_embed": torch.zeros(1, net.embed_dim),
                "text_embed": torch.zeros(1, net.embed_dim),
            }
        if text is not None and text.kind != "none":
            own = "text_tokens" if has_own_tokenizer(text) else "tokens"
            batch[own] = torch.zeros(1, text.context_length, dtype=torch.int64)
            if text.kind == "states":
                batch["text_states"] = torch.zeros(1, text.context_length, text.states_width)
    return batch


def estimate_resources(
    stage: LightningModule, crop: int | None = None, clip: CLIPConfig | None = None
) -> ResourceEstimate:
    """Count parameters, operations and activations of a stage.

    Args:
        stage: of this package. It is moved to the meta device.
        crop: side of an upsampler's images in pixels; None: the side that its network draws.
        clip: the CLIP whose text tower runs at each step, if one does.
    """
    stage = stage.to("meta").train()
    apply_checkpointing(stage, "none")
    if (quantizer := cast(Any, getattr(stage, "quantizer", None))) is not None:
        quantizer.codes = quantizer.max_codes  # the data decide how many when training starts
    blocks = {name: module for name, module in stage.named_modules() if isinstance(module, Block)}
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks.values()]
    parameters = sum(p.numel() for p in stage.parameters())
    frozen = sum(p.numel() for p in stage.parameters() if not p.requires_grad)
    ran: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.add(m)) for m in stage.modules()]
    saved, flops = _count_saved(stage, blocks, crop)
    for hook in hooks:
        hook.remove()
    unused = [p for m in stage.modules() if m not in ran for p in m.parameters(recurse=False)]

    between = saved.inputs | saved.tensors.pop("")
    everything = dict(between)
    for tensors in saved.tensors.values():
        everything |= tensors
    between_and_results = between | saved.results
    within = [_bytes(tensors, but=between) for tensors in saved.tensors.values()]
    recomputed = [_bytes(tensors, but=between_and_results) for tensors in saved.tensors.values()]
    activations: dict[Checkpointing, float] = {
        "none": _bytes(everything),
        "selective": _bytes(between_and_results) + max(recomputed),
        "full": _bytes(between) + max(within),
    }
    clip_bytes, text_flops = (0.0, 0.0) if clip is None else _estimate_clip(clip)
    return ResourceEstimate(
        parameters=parameters,
        largest_block=max(sizes),
        outside=parameters - sum(sizes),
        flops=3 * flops + text_flops,
        activations=activations,
        clip=clip_bytes,
        frozen=frozen,
        idle=sum(p.numel() for p in unused if not p.requires_grad),
        optimizer=cast(Any, stage).optimizer_bytes,
    )


def _estimate_clip(config: CLIPConfig) -> tuple[float, float]:
    """Bytes of a frozen CLIP, both towers, and operations of its text tower for one caption."""
    model: Any = clip_architecture(config)
    size = DTYPES[config.precision].itemsize
    length = getattr(model, "text", model).context_length
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_text(tokens)
    total = float(size * sum(p.numel() for p in model.parameters()))
    return total, float(counter.get_total_flops())


def _bytes(tensors: dict[int, int], but: Container[int] = ()) -> int:
    """The size of all storages but those in `but`."""
    return sum(size for storage, size in tensors.items() if storage not in but)


class _Saved:
    """Bytes by storage of what autograd saves for one sample."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self.tensors: dict[str, dict[int, int]] = {name: {} for name in ("", *blocks)}
        """What is saved within each block; "": outside of all blocks."""
        self.inputs: dict[int, int] = {}
        """Inputs of blocks."""
        self.results: dict[int, int] = {}
        """Results of products, convolutions and attention within blocks."""


def _count_saved(
    stage: LightningModule, blocks: dict[str, Block], crop: int | None
) -> tuple[_Saved, float]:
    """What autograd saves for the loss of one sample, and the operations of the loss."""
    weights = {_storage(parameter) for parameter in stage.parameters()}
    alive: list[Tensor] = []  # keeps tensors, so that no number of a storage is used again
    inside: list[str] = []  # names of the blocks that are running
    saved = _Saved(blocks)

    def record_result(result: Tensor) -> None:
        if inside:
            record(result, saved.results)

    autocast = _Autocast(record_result)

    def record(tensor: Any, where: dict[int, int]) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = _storage(tensor)
        if storage not in weights and storage not in autocast.copies:
            where[storage] = tensor.untyped_storage().nbytes()
            alive.append(tensor)

    def pack(tensor: Tensor) -> Tensor:
        record(tensor, saved.tensors[inside[-1] if inside else ""])
        return tensor

    def enter(name: str, inputs: tuple, more: dict[str, Any]) -> None:
        inside.append(name)
        for tensor in (*inputs, *more.values()):
            record(tensor, saved.inputs)

    hooks = []
    for name, block in blocks.items():
        pre_hook = partial(lambda name, _, inputs, more: enter(name, inputs, more), name)
        hooks.append(block.register_forward_pre_hook(pre_hook, with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda *_: inside.pop() and None))
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast,
    ):
        cast(Any, stage).loss(example_batch(stage, crop))
    for hook in hooks:
        hook.remove()
    return saved, counter.get_total_flops() + autocast.flops


def _storage(tensor: Tensor) -> int:
    """The number of a tensor's storage."""
    return tensor.untyped_storage()._cdata


def estimate_run(
    estimate: ResourceEstimate,
    gpus: int,
    strategy: Strategy,
    batch: int,
    steps: int,
    *,
    mfu: float,
    peak: float,
    memory: float,
    checkpointing: Checkpointing = "full",
) -> RunEstimate:
    """Estimate the memory and the time of a run.

    Weights, gradients and the average are float32.

    Args:
        estimate: what the stage needs.
        gpus: how many.
        strategy: "fsdp" shards weights, gradients, optimiser and average over the GPUs.
        batch: samples per step, over all GPUs.
        steps: of the optimiser.
        mfu: share of `peak` that is reached.
        peak: operations per second of one GPU.
        memory: usable bytes of one GPU. It decides how many samples are computed at a time.
        checkpointing: which activations are computed again in the backward pass.
    """
    shards = gpus if strategy == "fsdp" else 1
    trained = estimate.parameters - estimate.frozen
    weights, gradients = 4 * estimate.parameters / shards, 4 * trained / shards
    optimizer = estimate.optimizer / shards
    largest = estimate.largest_block
    if strategy == "fsdp":
        # What is outside of blocks in float32; two blocks, one of them being gathered, in bfloat16;
        # and gradients that are not sharded yet.
        gathered = 8.0 * estimate.outside + 2 * (2 + 2) * largest + 4 * largest
    else:  # autocast's copies of the weights in use
        gathered = 2.0 * (
            estimate.parameters - estimate.idle if checkpointing == "none" else largest
        )
    sample = estimate.activations[checkpointing]
    samples = math.ceil(batch / gpus)
    free = memory - 2 * weights - gradients - optimizer - estimate.clip - gathered
    fitting = int(max(0.0, free) // sample)
    accumulate = math.ceil(samples / fitting) if fitting else 0
    micro_batch = math.ceil(samples / accumulate) if fitting else 0
    seconds_per_step = estimate.flops * batch / (gpus * peak * mfu)
    return RunEstimate(
        gpus,
        strategy,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        ema=weights,
        clip=estimate.clip,
        gathered=gathered,
        activations=micro_batch * sample,
        micro_batch=micro_batch,
        accumulate=accumulate,
        steps_per_hour=3600 / seconds_per_step,
        hours=seconds_per_step * steps / 3600,
    )
