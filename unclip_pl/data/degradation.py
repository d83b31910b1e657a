"""Low-resolution conditions for the upsamplers, degraded as the papers say.

Gaussian blur for 256 pixels (unCLIP App. C), BSR-light for 1024 (LDM, BSRGAN).

The steps take a float32 (3, H, W) in [0, 1] and return a new tensor in [0, 1]. All randomness comes
from the numpy generator that they are given. Resizes in BSR-light alias as cv2's do in LDM, which
is the strongest part of it. No step shifts the image: pixel i of an image n times smaller lies at
the centre of pixels n i .. n i + n - 1, whatever sizes were in between.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip_pl.utils.choices import check_choices

INTERPOLATIONS = ("linear", "cubic", "area")
SHIFTED_RADIUS = 12  # of the 25 x 25 kernel
PROBABILITY = {"blur": 0.5, "bsr": 1.0, "none": 0.0}


@dataclass(frozen=True)
class DegradationConfig:
    """How the low-resolution condition of an upsampler is degraded in training."""

    kind: Literal["blur", "bsr", "none"] = "blur"
    """"blur": a Gaussian, for 64 -> 256; "bsr": BSR-light, for 256 -> 1024; "none": only
    antialiased downscaling."""
    probability: float | None = None
    """Share of the conditions that are degraded; the others are only downscaled. None: 0.5 for blur
    (Cascaded Diffusion 3.1; unCLIP does not say), 1 for bsr."""
    kernel_size: int = 3
    """blur: side of the kernel in pixels, odd."""
    sigma: float = 0.6
    """blur: standard deviation in pixels of the low resolution."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise ValueError(f"DegradationConfig.probability is {self.probability}: give 0 to 1.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0 or not 0 < self.sigma < math.inf:
            raise ValueError(
                "DegradationConfig needs an odd kernel_size and a sigma above 0: got "
                f"{self.kernel_size} and {self.sigma}."
            )


def degrade(
    high_res: Tensor, config: DegradationConfig, generator: np.random.Generator, factor: int = 4
) -> Tensor:
    """The low-resolution condition of an image.

    Args:
        high_res: (3, H, W) in [-1, 1], H and W multiples of `factor`.
        config: the kind of degradation, and how often it is applied.
        generator: source of all randomness.
        factor: how many times smaller the condition is.

    Returns:
        (3, H / factor, W / factor) in [-1, 1].
    """
    probability = PROBABILITY[config.kind] if config.probability is None else config.probability
    is_degraded = config.kind != "none" and generator.random() < probability
    if is_degraded and config.kind == "bsr":
        image = high_res.float().add(1).div_(2).clamp_(0, 1)
        return bsr_light(image, generator, factor).mul_(2).sub_(1)
    low_res = downscale(high_res, factor)
    return gaussian_blur(low_res, config.kernel_size, config.sigma) if is_degraded else low_res


def downscale(image: Tensor, factor: int = 4) -> Tensor:
    """(..., 3, H, W) in [-1, 1] -> (..., 3, H / factor, W / factor) in [-1, 1].

    Antialiased bicubic, as every low-resolution condition is made before it is degraded.
    """
    height, width = _target(image, factor)
    return bicubic(image.float(), height, width).clamp(-1, 1)


def gaussian_blur(image: Tensor, kernel_size: int = 3, sigma: float = 0.6) -> Tensor:
    """Convolve (..., H, W), mirrored at its borders, with an isotropic Gaussian.

    Args:
        image: of any range.
        kernel_size: side of the kernel in pixels, odd.
        sigma: standard deviation in pixels.
    """
    taps = gaussian_taps(kernel_size, sigma)
    height, width = image.shape[-2:]
    padded = _mirror_pad(image, kernel_size // 2)
    rows = _weighted_sum([padded[..., i : i + height, :] for i in range(kernel_size)], taps)
    return _weighted_sum([rows[..., i : i + width] for i in range(kernel_size)], taps)


def bsr_light(image: Tensor, generator: np.random.Generator, factor: int = 4) -> Tensor:
    """BSR-light of LDM (`bsrgan_light`): (3, H, W) -> (3, H / factor, W / factor), both in [0, 1].

    The result has only 256 levels, because JPEG is the last step.
    """
    height, width = _target(image, factor)
    if factor == 4 and generator.random() < 0.25:
        half = image.shape[-2] // 2, image.shape[-1] // 2
        if generator.random() < 0.5:
            image = resize(image, *half, random_interpolation(generator)).clamp(0, 1)
        else:
            image = bicubic(image, *half).clamp(0, 1)
        factor = 2
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "blur": lambda x: random_blur(x, generator, factor),
        "reduce": lambda x: random_reduce(x, generator, factor),
        "fit": lambda x: resize(x, height, width, random_interpolation(generator)).clamp(0, 1),
        "noise": lambda x: gaussian_noise(x, random_mixing(generator), generator),
        "jpeg": lambda x: jpeg(x, random_quality(generator)) if generator.random() < 0.9 else x,
    }
    for step in random_order(generator):
        image = steps[step](image)
    return jpeg(image, random_quality(generator))


def random_order(generator: np.random.Generator) -> list[str]:
    """The steps of BSR-light in random order, but "reduce" always before "fit"."""
    steps = ["blur", "reduce", "fit", "noise", "jpeg"]
    order = [steps[i] for i in generator.permutation(len(steps))]
    reduce, fit = sorted((order.index("reduce"), order.index("fit")))
    order[reduce], order[fit] = "reduce", "fit"
    return order


def random_interpolation(generator: np.random.Generator) -> str:
    """Draw one of `INTERPOLATIONS`, each with the same probability, as a mode of `resize`."""
    return INTERPOLATIONS[generator.integers(len(INTERPOLATIONS))]


def random_quality(generator: np.random.Generator) -> int:
    """JPEG quality, 80 to 95."""
    return int(generator.integers(80, 96))


def random_blur(image: Tensor, generator: np.random.Generator, factor: int) -> Tensor:
    """Blur an image with a random Gaussian, in half of the cases an anisotropic one.

    An anisotropic kernel has a side of 5 to 14 pixels, an isotropic one of 5 to 7. The parameters
    of their widths are a quarter of BSRGAN's.

    Even sizes are made odd, because an even kernel shifts the image by half a pixel. Taps beyond 4
    standard deviations (10^-4 of the weight) are left out.
    """
    if generator.random() < 0.5:
        size, angle = int(generator.integers(2, 12)) + 3, math.pi * generator.random()
        variances = (4 + factor) / 4 * generator.random(2)
        size = _odd_size(size, math.sqrt(variances.max()))
        return anisotropic_blur(image, anisotropic_kernel(size, angle, *variances))
    size, sigma = int(generator.integers(2, 5)) + 3, (2 + 0.2 * factor) / 4 * generator.random()
    return gaussian_blur(image, _odd_size(size, sigma), sigma)


def random_reduce(image: Tensor, generator: np.random.Generator, factor: int) -> Tensor:
    """Mostly a resize by 1 to 1 / (2 factor), else a Gaussian blur and every `factor`-th pixel."""
    if generator.random() < 0.8:
        scale = generator.uniform(1, 2 * factor)
        height, width = (max(1, int(side / scale)) for side in image.shape[-2:])
        return resize(image, height, width, random_interpolation(generator)).clamp(0, 1)
    return blur_and_subsample(image, generator.uniform(0.1, 0.6 * factor), factor)


def random_mixing(generator: np.random.Generator) -> np.ndarray:
    """(3, K) matrix M from white noise to that of the channels, of covariance M M^T.

    At level 1 or 2 of 255: 40% independent, 40% one grey map; else correlated, with the covariance
    |U^T D U| times the square of level 2.
    """
    level, kind = generator.integers(1, 3) / 255, generator.random()
    if kind > 0.6:
        return level * np.eye(3)
    if kind < 0.4:
        return level * np.ones((3, 1))
    basis = np.linalg.svd(generator.random((3, 3)))[0]
    covariance = np.abs(basis.T @ np.diag(generator.random(3)) @ basis) + 1e-9 * np.eye(3)
    return 2 / 255 * np.linalg.cholesky(covariance)


def gaussian_noise(image: Tensor, mixing: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Add to each pixel the (3, K) `mixing` times K numbers of N(0, 1); clipped to [0, 1]."""
    # torch draws three times as fast as numpy
    quick = torch.Generator().manual_seed(int(generator.integers(2**63)))
    noise = torch.randn(mixing.shape[1], image[0].numel(), generator=quick)
    noisy = torch.addmm(image.reshape(3, -1), torch.from_numpy(mixing).float(), noise)
    return noisy.reshape(image.shape).clamp(0, 1)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Encode as an 8-bit JPEG (4:2:0) in memory and decode it again."""
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    pixels = pixels.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file, formats=("JPEG",)) as decoded:
        levels = np.asarray(decoded).transpose(2, 0, 1).astype(np.float32, order="C")
    return torch.from_numpy(levels).div_(255)


def anisotropic_blur(image: Tensor, kernel: np.ndarray) -> Tensor:
    """Convolve (C, H, W), mirrored at its borders, with a point-symmetric (K, K) kernel, K odd."""
    weight = torch.from_numpy(kernel).to(image.dtype)
    weight = weight[None, None].expand(len(image), 1, *kernel.shape)
    padded = _mirror_pad(image, len(kernel) // 2)
    return F.conv2d(padded[None], weight, groups=len(image))[0].clamp(0, 1)


def blur_and_subsample(image: Tensor, sigma: float, factor: int) -> Tensor:
    """Blur with a Gaussian, then take every `factor`-th pixel, starting with the first.

    The kernel is moved by (factor - 1) / 2 pixels, so that nothing shifts.
    """
    height, width = image.shape[-2:]
    narrow = image @ _shifted_gaussian(width, factor, sigma).T
    return _shifted_gaussian(height, factor, sigma) @ narrow


def resize(image: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resize (C, H, W) -> (C, height, width) as `cv2.resize` does, without antialiasing.

    Args:
        image: (C, H, W) float32.
        height: of the result, in pixels.
        width: of the result, in pixels.
        mode: "linear"; "cubic" (a = -0.75, overshoots); "area" (the mean of the pixels' shares;
            where a side grows, linear within them).
    """
    if mode == "area":
        shrinks = height <= image.shape[-2] and width <= image.shape[-1]
        weights = _area if shrinks else _area_enlarged
        return weights(image.shape[-2], height) @ (image @ weights(image.shape[-1], width).T)
    method = "bicubic" if mode == "cubic" else "bilinear"
    return F.interpolate(image[None], (height, width), mode=method, align_corners=False)[0]


def bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """(..., C, H, W) -> (..., C, height, width), antialiased as in Pillow (a = -0.5)."""
    batch = image.reshape(-1, *image.shape[-3:])
    small = F.interpolate(
        batch, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return small.reshape(*image.shape[:-2], height, width)


def gaussian_taps(size: int, sigma: float) -> np.ndarray:
    """(size,) weights of a Gaussian around the middle tap, of sum 1."""
    taps = np.exp(-0.5 * (np.arange(size) - size // 2) ** 2 / max(sigma, 1e-3) ** 2)
    return taps / taps.sum()


def anisotropic_kernel(size: int, angle: float, variance1: float, variance2: float) -> np.ndarray:
    """Make the weights [y, x] (size, size) of an anisotropic Gaussian, with sum 1.

    It has `variance1` along `angle` (radians from x towards y) and `variance2` across.
    """
    x = np.arange(size) - size // 2
    along = math.cos(angle) * x + math.sin(angle) * x[:, None]
    across = math.cos(angle) * x[:, None] - math.sin(angle) * x
    kernel = np.exp(-0.5 * (along**2 / max(variance1, 1e-6) + across**2 / max(variance2, 1e-6)))
    return kernel / kernel.sum()


def _odd_size(size: int, sigma: float) -> int:
    """The next odd kernel size, or that which reaches 4 standard deviations if it is smaller."""
    return min(size | 1, 2 * math.ceil(4 * sigma) + 1)


def _target(image: Tensor, factor: int) -> tuple[int, int]:
    height, width = image.shape[-2:]
    if image.shape[-3] != 3 or height % factor or width % factor or not (height and width):
        raise ValueError(
            f"An image of shape {tuple(image.shape)} cannot be made {factor} times smaller: "
            f"give (3, H, W) with H and W multiples of {factor}."
        )
    return height // factor, width // factor


def _mirrored(index: np.ndarray, size: int) -> np.ndarray:
    """Any index -> one of 0 .. size - 1, mirrored at the centres of the first and last pixel."""
    period = max(2 * (size - 1), 1)
    index = np.abs(index) % period
    return np.minimum(index, period - index)


def _mirror_pad(image: Tensor, pad: int) -> Tensor:
    if pad < min(image.shape[-2:]):
        return F.pad(image, (pad, pad, pad, pad), mode="reflect")
    for dim in (-2, -1):
        size = image.shape[dim]
        index = torch.from_numpy(_mirrored(np.arange(-pad, size + pad), size))
        image = image.index_select(dim, index)
    return image


def _weighted_sum(images: list[Tensor], weights: np.ndarray) -> Tensor:
    total = images[0] * float(weights[0])
    for image, weight in zip(images[1:], weights[1:]):
        total.add_(image, alpha=float(weight))
    return total


@lru_cache(maxsize=64)
def _area(size: int, smaller: int) -> Tensor:
    """(smaller, size): the share of each pixel in each smaller one, in float32."""
    edges = np.arange(smaller + 1)[:, None] * (size / smaller)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return torch.from_numpy(overlap.clip(0) * (smaller / size)).float()


@lru_cache(maxsize=64)
def _area_enlarged(size: int, larger: int) -> Tensor:
    """Make cv2's weights (larger, size) for the mode "area" where a side grows.

    A new pixel inside an old one has its colour. One across a border mixes two by their shares.
    """
    factor = larger / size
    new = np.arange(larger)
    old = np.floor(new * (1 / factor)).astype(int)
    share = (new + 1 - (old + 1) * factor).astype(np.float32)  # cv2's precision: 1 - 1e-15 is 1
    share = np.where(share <= 0, 0, share - np.floor(share))
    matrix = np.zeros((larger, size))
    np.add.at(matrix, (new, old.clip(max=size - 1)), 1 - share)
    np.add.at(matrix, (new, (old + 1).clip(max=size - 1)), share)
    return torch.from_numpy(matrix).float()


def _shifted_gaussian(size: int, factor: int, sigma: float) -> Tensor:
    """Make the weights (size / factor, size) of a Gaussian, in float32.

    Each row is a Gaussian around the centre of a block of `factor` pixels, mirrored at the borders.
    """
    centres = np.arange(0, size, factor)[:, None] + (factor - 1) / 2
    pixels = np.floor(centres) + np.arange(-SHIFTED_RADIUS, SHIFTED_RADIUS + 2)
    distance = pixels - centres
    weights = np.exp(-0.5 * (distance / sigma) ** 2) * (np.abs(distance) <= SHIFTED_RADIUS)
    matrix = np.zeros((len(centres), size))
    rows, columns = np.arange(len(centres))[:, None], _mirrored(pixels.astype(int), size)
    np.add.at(matrix, (rows, columns), weights / weights.sum(1, keepdims=True))
    return torch.from_numpy(matrix).float()
