"""3x3 convolutions by minimal filtering, F(4x4, 3x3) (Lavin and Gray 2016, arXiv 1509.09308), from matrix products: for CPUs where arithmetic is the limit.

A 4x4 tile of the output costs 36 multiplications a pair of channels in place of 144, and transforms that grow with the channels alone. CPUs with AVX2 and
no more gain by it; those with wider instructions, GPUs and half precision are limited by memory, and keep torch's convolution.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

INPUT = torch.tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1.0]])
KERNEL = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24.0]]) / 24
OUTPUT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1.0]])
"""B^T, G and A^T: an output tile is A^T [(G g G^T) * (B^T d B)] A of the input tile d (6x6) and the kernel g (3x3)."""
CHANNELS, CHANNELS_WEIGHT, TILES = 96, 48, 48
"""From how many channels (harmonic mean of both sides) on products outweigh transforms, in images and in the gradient of the weights; least tiles a batch."""
SLICE = 2**21
"""Floats of the tiles that are worked on together: what a cache holds."""


def _both(matrix: Tensor, tiles: Tensor) -> Tensor:
    """matrix @ tile @ matrix^T for tiles (b, b, ...), matrix (a, b) -> (a * a, ...) flattened to two dimensions."""
    rows = torch.mm(matrix, tiles.reshape(matrix.shape[1], -1)).view(matrix.shape[0], matrix.shape[1], -1)
    del tiles  # their memory serves for the result, if nobody else has them
    return torch.matmul(matrix, rows).flatten(0, 1)


def _kernels(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (36, out, in)."""
    return _both(KERNEL, weight.permute(2, 3, 0, 1)).unflatten(1, weight.shape[:2])


def _input_tiles(x: Tensor) -> Tensor:
    """Overlapping tiles of x (B, H, W, C) with a border of zeros -> (36, tiles, C)."""
    size, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    image, row, column, _ = x.stride()
    tiles = x.as_strided((6, 6, size, height // 4, width // 4, channels), (row, column, image, 4 * row, 4 * column, 1))
    return _both(INPUT, tiles).unflatten(1, (-1, channels))


def _tiled(x: Tensor) -> Tensor:
    """(B, H, W, C) seen as (4, 4, B, H / 4, W / 4, C)."""
    return x.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).permute(2, 4, 0, 1, 3, 5)


def _slices(x: Tensor, channels: int) -> Iterator[slice]:
    """Samples of x (B, H, W, C), a few at a time."""
    each = max(1, int(SLICE / (x[0, ..., 0].numel() * 2.25 * channels)))
    return (slice(i, i + each) for i in range(0, len(x), each))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:3], len(weight))
    kernels = _kernels(weight).transpose(1, 2)
    for some in _slices(x, max(weight.shape[:2])):
        part = _tiled(out[some])
        tiles = _both(OUTPUT, torch.bmm(_input_tiles(x[some]), kernels).unflatten(0, (6, 6))).view(part.shape)
        part.copy_(tiles) if bias is None else torch.add(tiles, bias, out=part)
    return out


def _added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, the products in place of a total of None."""
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, image: bool, kernel: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, by the transposed transforms; those wanted."""
    (size, height, width, channels), out = x.shape, len(weight)
    kernels = _kernels(weight) if image else weight
    # the tiles of x overlap: each writes its own 4x4 cell and adds to the next ones
    padded = x.new_empty(size, height + 4, width + 4, channels) if image else x
    if image:
        padded[:, height:].zero_()
        padded[:, :, width:].zero_()
    products: Tensor | None = None
    for some in _slices(x, max(channels, out)):
        tiles = _both(OUTPUT.t(), _tiled(grad[some])).unflatten(1, (-1, out))
        if kernel:
            products = _added(products, tiles.transpose(1, 2), _input_tiles(x[some]))
        if image:
            cells = _tiled(padded[some])
            found = _both(INPUT.t(), torch.bmm(tiles, kernels).unflatten(0, (6, 6)))
            found = found.view(6, 6, -1, height // 4, width // 4, channels)
            cells[:, :, :, :-1, :-1] = found[:4, :4]
            cells[:2, :, :, 1:, :-1] += found[4:, :4]
            cells[:, :2, :, :-1, 1:] += found[:4, 4:]
            cells[:2, :2, :, 1:, 1:] += found[4:, 4:]
    return (
        padded[:, 1 : height + 1, 1 : width + 1].contiguous() if image else None,
        None if products is None else _both(KERNEL.t(), products.unflatten(0, (6, 6))).view(3, 3, out, channels).permute(2, 3, 0, 1),
    )


def _pays(x: Tensor, out: int, channels: int) -> bool:
    """Whether tiles are the quicker way: the machine, float32, sides of x (B, C, H, W) that divide into them, enough of them, enough channels."""
    size, wide, height, width = x.shape
    suits = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return suits and height % 4 == width % 4 == 0 and size * height * width >= 16 * TILES and 2 * out * wide >= channels * (out + wide)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution of x (B, in, H, W), padding 1, without a graph. weight (out, in, 3, 3) of the same type -> (B, out, H, W)."""
    if not _pays(x, len(weight), CHANNELS):
        return F.conv2d(x, weight, bias, padding=1)
    return _convolved(x.permute(0, 2, 3, 1).contiguous(), weight, bias).permute(0, 3, 1, 2)


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those `wanted`, from that of the output."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    image, kernel = (need and _pays(x, len(weight), least) for need, least in zip(wanted, (CHANNELS, CHANNELS_WEIGHT)))
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    if image or kernel:
        grad_x, grad_weight = _backward(grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1).contiguous(), weight, image, kernel)
        grad_x = None if grad_x is None else grad_x.permute(0, 3, 1, 2)
    left = [wanted[0] and not image, wanted[1] and not kernel, False]
    if any(left):
        direct = torch.ops.aten.convolution_backward(grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, left)
        grad_x, grad_weight = grad_x if image else direct[0], grad_weight if kernel else direct[1]
    return grad_x, grad_weight, grad.sum((0, 2, 3)) if wanted[2] else None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolution(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return convolution_backward(grad, x, weight, ctx.needs_input_grad)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 that picks the quicker way. (B, in, H, W) -> (B, out, H, W), H and W any.

    By tiles the float32 result differs from the direct one by up to about 1e-5 of its largest value, and equals itself from run to run.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _pays(x, self.out_channels, CHANNELS_WEIGHT) or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.bias)
