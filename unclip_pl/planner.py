"""What a training run needs: memory of each GPU and time, counted on the meta device, so that a
3.5B stage is planned on a laptop in seconds.

Operations are those of matrix products, convolutions and attention (half of it where it is causal),
a multiply-add being two; training is three times the forward pass, and what checkpointing computes
again is not counted, as MFU is defined. Memory is what must be held; allocators and kernels need
more.
"""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.clip.config import DTYPES, CLIPConfig
from unclip_pl.clip.loading import clip_architecture
from unclip_pl.networks.checkpointing import Checkpointing, apply_checkpointing
from unclip_pl.networks.layers import Block

GB = 1e9
Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Needs:
    """What one stage needs, counted by `count`; bytes for training in "bf16-mixed"."""

    parameters: int
    largest_block: int
    """Parameters of the largest `Block`."""
    outside: int
    """Parameters outside of all blocks, which FSDP gathers once per step and holds."""
    flops: float
    """Of a training step, per sample, those of a CLIP in the loop included."""
    activations: dict[Checkpointing, float]
    """Bytes per sample of what the backward pass needs, for each kind of checkpointing. "none": all
    that autograd saves; "full": what lies between blocks, and all of the block that needs most;
    "selective": as "full", and the results of products, convolutions and attention."""
    clip: float = 0.0
    """Bytes of the CLIP that gives the data's token states at each step, whole on every GPU."""


@dataclass(frozen=True)
class Row:
    """A run of `gpus` GPUs: bytes a GPU by what they hold, and its time."""

    gpus: int
    strategy: Strategy
    weights: float
    gradients: float
    optimizer: float
    ema: float
    clip: float
    gathered: float
    """Copies in the precision of the computation, and unsharded gradients, of the blocks under
    way."""
    activations: float
    micro_batch: int
    """Samples a GPU and pass; 0: not even one fits."""
    accumulate: int
    """Passes a step."""
    steps_an_hour: float
    hours: float

    @property
    def total(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.ema
            + self.clip
            + self.gathered
            + self.activations
        )


class _Autocast(TorchFunctionMode):
    """bfloat16 autocast on the meta device, which has none, with attention as a fused kernel.

    `copies` are the weights in bfloat16 by their storage; `flops` those of attention; `results` is
    called with what products, convolutions and attention return.
    """

    def __init__(self, results: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.copies: dict[int, Tensor] = {}
        self.flops = 0.0
        self.results = results

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
        self.results(result)
        return result

    def _half(self, x: Tensor, weight: bool = False) -> Tensor:
        half = x.bfloat16()
        if weight:
            self.copies[_storage(half)] = half
        return half


class _Attention(torch.autograd.Function):
    """The shapes of attention that keeps its inputs, its output and one number a query and head
    (FlashAttention)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def example(stage: Any, crop: int | None = None) -> dict[str, Any]:
    """A batch of one sample on the meta device, with all that a stage may ask for; `crop` is the
    side of an upsampler's images."""
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
            batch["tokens"] = torch.zeros(1, text.context_length, dtype=torch.int64)
            if text.kind == "states":
                batch["text_states"] = torch.zeros(1, text.context_length, text.states_width)
    return batch


def count(stage: LightningModule, crop: int | None = None, clip: CLIPConfig | None = None) -> Needs:
    """Parameters, operations and activations of a stage, which is moved to the meta device.

    Args:
        stage: of this package.
        crop: side of an upsampler's images.
        clip: the CLIP whose text tower runs at each step; None: none does.
    """
    stage = stage.to("meta").train()
    apply_checkpointing(stage, "none")
    if (quantizer := cast(Any, getattr(stage, "quantizer", None))) is not None:
        quantizer.codes = quantizer.max_codes  # the data decide how many when training starts
    blocks = {name: module for name, module in stage.named_modules() if isinstance(module, Block)}
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks.values()]
    parameters = sum(p.numel() for p in stage.parameters())
    saved, flops = _count_saved(stage, blocks, crop)

    between = saved.inputs | saved.tensors.pop("")
    everything = dict(between)
    for tensors in saved.tensors.values():
        everything |= tensors
    kept = between | saved.results
    own = [_bytes(tensors, but=between) for tensors in saved.tensors.values()]
    recomputed = [_bytes(tensors, but=kept) for tensors in saved.tensors.values()]
    activations: dict[Checkpointing, float] = {
        "none": _bytes(everything),
        "selective": _bytes(kept) + max(recomputed),
        "full": _bytes(between) + max(own),
    }
    held, text_flops = (0.0, 0.0) if clip is None else clip_needs(clip)
    flops = 3 * flops + text_flops
    return Needs(parameters, max(sizes), parameters - sum(sizes), flops, activations, held)


def clip_needs(config: CLIPConfig) -> tuple[float, float]:
    """Bytes of a frozen CLIP, both towers, and operations of its text tower for one caption."""
    model: Any = clip_architecture(config)
    size = DTYPES[config.precision].itemsize
    length = getattr(model, "text", model).context_length
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_text(tokens)
    held = float(size * sum(p.numel() for p in model.parameters()))
    return held, float(counter.get_total_flops())


def _bytes(tensors: dict[int, int], but: Container[int] = ()) -> int:
    return sum(size for storage, size in tensors.items() if storage not in but)


class _Saved:
    """Bytes by storage of what autograd saves for one sample."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self.tensors: dict[str, dict[int, int]] = {name: {} for name in ("", *blocks)}
        """Saved within each block ("": outside)."""
        self.inputs: dict[int, int] = {}
        """The inputs of blocks."""
        self.results: dict[int, int] = {}
        """Results of products, convolutions and attention within blocks."""


def _count_saved(
    stage: LightningModule, blocks: dict[str, Block], crop: int | None
) -> tuple[_Saved, float]:
    """What the loss of one sample saves, and its operations."""
    weights = {_storage(parameter) for parameter in stage.parameters()}
    alive: list[Tensor] = []  # so that no storage gets another's number
    inside: list[str] = []
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

    def enter(name: str, inputs: tuple) -> None:
        inside.append(name)
        for tensor in inputs:
            record(tensor, saved.inputs)

    hooks = []
    for name, block in blocks.items():
        pre_hook = partial(lambda name, _, inputs: enter(name, inputs), name)
        hooks.append(block.register_forward_pre_hook(pre_hook))
        hooks.append(block.register_forward_hook(lambda *_: inside.pop() and None))
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast,
    ):
        cast(Any, stage).loss(example(stage, crop))
    for hook in hooks:
        hook.remove()
    return saved, counter.get_total_flops() + autocast.flops


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def row(
    needs: Needs,
    gpus: int,
    strategy: Strategy,
    batch: int,
    steps: int,
    *,
    mfu: float,
    peak: float,
    memory: float,
    checkpointing: Checkpointing = "full",
) -> Row:
    """A run of `steps` steps of `batch` samples on `gpus` GPUs.

    Weights, gradients and average are float32, AdamW has two numbers per weight; FSDP shares them.

    Args:
        needs: what the stage needs.
        batch: samples per step, of all GPUs together.
        mfu: share of `peak` that is reached.
        peak: operations per second of a GPU.
        memory: bytes of a GPU that may be used; as many samples are computed at a time as fit.
        checkpointing: which activations are computed again in the backward pass.
    """
    each = 4 * needs.parameters / (gpus if strategy == "fsdp" else 1)
    largest = needs.largest_block
    if strategy == "fsdp":
        # the rest in float32; two blocks, one of them being fetched, in bfloat16; and gradients
        # that are not yet shared out
        gathered = 8.0 * needs.outside + 2 * (2 + 2) * largest + 4 * largest
    else:  # autocast's copies of the weights in use
        gathered = 2.0 * (needs.parameters if checkpointing == "none" else largest)
    sample = needs.activations[checkpointing]
    mine = math.ceil(batch / gpus)
    fits = int(max(0.0, memory - 5 * each - needs.clip - gathered) // sample)
    accumulate = math.ceil(mine / fits) if fits else 0
    micro = math.ceil(mine / accumulate) if fits else 0
    seconds = needs.flops * batch / (gpus * peak * mfu)
    return Row(
        gpus,
        strategy,
        weights=each,
        gradients=each,
        optimizer=2 * each,
        ema=each,
        clip=needs.clip,
        gathered=gathered,
        activations=micro * sample,
        micro_batch=micro,
        accumulate=accumulate,
        steps_an_hour=3600 / seconds,
        hours=seconds * steps / 3600,
    )
