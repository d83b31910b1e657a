"""The blocks of the U-Net in float64, written out from their weights, without torch's modules."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """(B, C, H, W) float64, 32 groups."""
    groups = x.unflatten(1, (32, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
    normed = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    weight, bias = (p.double()[:, None, None] for p in (norm.weight, norm.bias))
    return normed * weight + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The sum over the kernel's places of shifted images times a matrix of channels."""
    size = layer.kernel_size[0]
    pad = size // 2
    height, width = x.shape[2:]
    x = F.pad(x, (pad, pad, pad, pad))
    out = layer.bias.double()[:, None, None]
    for i in range(size):
        for j in range(size):
            shifted = x[:, :, i : i + height, j : j + width]
            out = out + torch.einsum("oc,bchw->bohw", layer.weight.double()[:, :, i, j], shifted)
    return out


def resampled(x: Tensor, resample: str) -> Tensor:
    if resample == "up":
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    if resample == "down":
        return x.unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    return x


def res_block(block: nn.Module, x: Tensor, emb: Tensor, resample: str, film: bool) -> Tensor:
    x = x.double()
    h = conv(block.conv1, resampled(silu(group_norm(block.norm1, x)), resample))
    emb = emb.double() @ block.emb_proj.weight.double().T + block.emb_proj.bias.double()
    if film:
        scale, shift = emb[..., None, None].chunk(2, dim=1)
        h = group_norm(block.norm2, h) * (1 + scale) + shift
    else:
        h = group_norm(block.norm2, h + emb[..., None, None])
    shortcut = resampled(x, resample)
    if isinstance(block.shortcut, nn.Conv2d):
        shortcut = conv(block.shortcut, shortcut)
    return shortcut + conv(block.conv2, silu(h))


def attention_block(
    block: nn.Module, x: Tensor, context: Tensor | None, mask: Tensor | None
) -> Tensor:
    """One sample, head and pixel at a time."""
    x = x.double()
    linear = lambda layer, y: y @ layer.weight.double().T + layer.bias.double()
    pixels = group_norm(block.norm, x).flatten(2).transpose(1, 2)
    out = torch.zeros_like(pixels)
    channels = x.shape[1]
    width = channels // block.heads
    for b in range(len(x)):
        q, k, v = linear(block.qkv, pixels[b]).split(channels, dim=1)
        if context is not None:
            tokens = context[b].double() if mask is None else context[b][mask[b]].double()
            context_k, context_v = linear(block.context_kv, tokens).split(channels, dim=1)
            k, v = torch.cat([context_k, k]), torch.cat([context_v, v])
        for head in range(block.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / width**0.5
            out[b, :, part] = scores.softmax(1) @ v[:, part]
    return x + linear(block.proj, out).transpose(1, 2).unflatten(2, x.shape[2:])
