"""Drawing that starts from an image: inpainting, and image to image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unclip_pl.diffusion.guidance import repainted
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Predict
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Schedule
from unclip_pl.manipulate.latent import decoder_images
from unclip_pl.pipeline.unclip import Callback, UnCLIP
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import Images, as_tensor, expand_to

RESAMPLE_FRACTION = 0.3
"""Share of the steps that inpainting repeats in each of its further rounds."""


def inpaint(
    unclip: UnCLIP,
    image_embed: Tensor | None,
    seeds: Sequence[int],
    captions: Sequence[str] | None = None,
    sampling: DecoderSamplingConfig | None = None,
    callback: Callback | None = None,
    *,
    images: Images,
    mask: Images,
    rounds: int = 3,
) -> Tensor:
    """Draw where the mask is True and keep the images elsewhere, to the pixel.

    One pass takes too little notice of the known part. So the last steps are repeated in `rounds`
    further rounds: noise is added up to the level of those steps, and they are sampled again
    (RePaint's resampling, in few long jumps). A sampler that adds noise (eta 1) fits the known part
    better.

    Args:
        unclip: its decoder draws.
        image_embed: (B, D), what the pictures should show; None leaves only the captions.
        seeds: B seeds of the noise.
        captions: B captions; None draws without.
        sampling: settings in place of the decoder's own, with any sampler.
        callback: called with (step, steps).
        images: (B, 3, H, W) in [-1, 1] at the decoder's size, or PIL images.
        mask: (B, 1, H, W) bool; or PIL images, white where to draw.
        rounds: how often the last RESAMPLE_FRACTION of the steps are repeated.

    Returns:
        (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: a mask of another size, or one that draws nothing or leaves nothing known.
        ValueError: images of another size.
    """
    known = expand_to(decoder_images(unclip, images), len(seeds))
    if not isinstance(mask, Tensor):
        mask = as_tensor(mask, unclip.decoder.shape[-1]).mean(1, keepdim=True) > 0
    mask = expand_to(mask, len(seeds)).to(unclip.device)
    _check_mask(mask, known)
    settings, noise = sampling or unclip.decoder.sampling, Noise(seeds)
    sample = SAMPLERS[settings.sampler]

    def resample(predict: Predict, schedule: Schedule) -> Tensor:
        predict = repainted(predict, unclip.decoder.process, known, mask)
        x, count = known, len(schedule)
        for _ in range(1 + rounds):
            fresh = noise(unclip.decoder.shape, unclip.device)
            x, last = add_noise(x, schedule, count, fresh)
            x = sample(predict, x, last, noise=noise, eta=settings.eta, callback=callback)
            count = max(1, round(RESAMPLE_FRACTION * len(schedule)))
        return x

    drawn = unclip.run_sampler(resample, len(seeds), image_embed, captions, settings)
    return torch.where(mask, drawn, known)


def _check_mask(mask: Tensor, images: Tensor) -> None:
    """Raise a UserError unless the mask fits the images and divides each of them."""
    if mask.shape != images[:, :1].shape or mask.dtype != torch.bool:
        raise UserError(
            f"The mask is {mask.dtype} {tuple(mask.shape)}, and the pictures need a bool "
            f"{tuple(images[:, :1].shape)}: make it of their size."
        )
    if bool(mask.flatten(1).all(1).any()):
        raise UserError(
            "The mask asks for the whole picture, of which nothing would stay: leave some of it "
            "black, or use `unclip generate`."
        )
    if not bool(mask.flatten(1).any(1).all()):
        raise UserError(
            "The mask is all black, so that there is nothing to paint: make white what shall be "
            "drawn."
        )


def image_to_image(
    unclip: UnCLIP,
    image_embed: Tensor | None,
    seeds: Sequence[int],
    captions: Sequence[str] | None = None,
    sampling: DecoderSamplingConfig | None = None,
    callback: Callback | None = None,
    *,
    images: Images,
    strength: float,
) -> Tensor:
    """Draw from images with noise added to them (SDEdit).

    Args:
        unclip: its decoder draws.
        image_embed: (B, D), what the pictures should show; None leaves only the captions.
        seeds: B seeds of the noise.
        captions: B captions; None draws without.
        sampling: settings in place of the decoder's own, with any sampler.
        callback: called with (step, steps).
        images: (B, 3, H, W) in [-1, 1] at the decoder's size, or PIL images.
        strength: 0 gives the images back; 1 starts from noise only, as `unclip.decode` does with
            the same seeds. Between them, the last round(strength * steps) of the sampler's steps
            are run, at least one.

    Returns:
        (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: the strength is outside [0, 1].
        ValueError: images of another size.
    """
    start = expand_to(decoder_images(unclip, images), len(seeds))
    if not 0 <= strength <= 1:
        raise UserError(
            f"The strength is {strength}: give 0 (the picture itself) to 1 (nothing of it)."
        )
    if strength == 0:
        return start
    settings, noise = sampling or unclip.decoder.sampling, Noise(seeds)
    sample = SAMPLERS[settings.sampler]

    def denoise(predict: Predict, schedule: Schedule) -> Tensor:
        count = count_last_steps(len(schedule), strength)
        fresh = noise(unclip.decoder.shape, unclip.device)
        x, last = add_noise(start, schedule, count, fresh)
        return sample(predict, x, last, noise=noise, eta=settings.eta, callback=callback)

    return unclip.run_sampler(denoise, len(seeds), image_embed, captions, settings)


def count_last_steps(steps: int, strength: float) -> int:
    """How many of a sampler's steps `image_to_image` runs; none at strength 0."""
    return max(1, round(strength * steps)) if strength else 0


def add_noise(
    images: Tensor, schedule: Schedule, count: int, noise: Tensor
) -> tuple[Tensor, Schedule]:
    """Images with noise up to the level from which the last `count` steps start; and these steps.

    At the topmost level it is `noise` only.
    """
    if count == len(schedule):
        return noise, schedule
    level = float(schedule.alphas_cumprod[count - 1])
    x = math.sqrt(level) * images + math.sqrt(1 - level) * noise
    return x, Schedule(schedule.alphas_cumprod[:count], schedule.timesteps[:count])
