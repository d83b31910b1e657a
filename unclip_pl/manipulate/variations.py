"""Variations, interpolations and text diffs: what unCLIP sections 3.1 to 3.3 do with latents."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.manipulate.latent import Latent, decode, inversion_sampling, latent_of
from unclip_pl.manipulate.spherical import check_theta, slerp
from unclip_pl.pipeline.unclip import Callback, UnCLIP
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import Images


def vary(
    unclip: UnCLIP,
    latent: Latent | Images,
    seeds: Sequence[int],
    eta: float,
    captions: Sequence[str] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw variations of images (unCLIP 3.1): DDIM from (z_i, x_T) with noise on the way.

    For variations from fresh noise, which keep only z_i, decode its embedding:
    `unclip.decode(latent.image_embed, seeds)`.

    Args:
        unclip: has the CLIP and the decoder.
        latent: B images or their latents; of one image there is a variation for each seed.
        seeds: B seeds of the noise.
        eta: the amount of noise; 0 gives the images back, 1 adds as much as DDPM.
        captions: B captions; None draws without.
        callback: called with (step, steps).

    Returns:
        (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: give 0 (the picture again) to 1 (as much noise as DDPM).")
    latent = latent_of(unclip, latent, len(seeds))
    sampling = inversion_sampling(unclip, latent.steps, eta=eta)
    return decode(unclip, latent, seeds, captions, sampling, callback)


def interpolate(
    unclip: UnCLIP,
    a: Latent | Images,
    b: Latent | Images,
    theta: Tensor | Sequence[float],
    seed: int | None = None,
    sampling: DecoderSamplingConfig | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw images between a and b (unCLIP 3.2).

    Args:
        unclip: has the CLIP and the decoder.
        a: B images or latents, or one for all B pictures.
        b: the same, where the way from a ends.
        theta: (B,) in [0, 1], from a to b.
        seed: None: `slerp` of the two x_T, so that the ends are the reconstructions of a and b.
            A number: x_T is this seed's noise for every image. Each seed is then another path,
            whose ends have the content of a and b, not their pixels.
        sampling: by default as `inversion_sampling` says.
        callback: called with (step, steps).

    Returns:
        (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: a and b were inverted in different numbers of steps, which makes their latents
            different.
    """
    theta = torch.as_tensor(theta)
    a, b = latent_of(unclip, a, len(theta)), latent_of(unclip, b, len(theta))
    if a.steps != b.steps:
        raise UserError(
            f"One of the latents was inverted in {a.steps} steps and the other in {b.steps}: "
            "invert both in the same."
        )
    embed = slerp(a.image_embed, b.image_embed, theta)
    if seed is None:
        x_T = slerp(a.x_T, b.x_T, theta)
    else:
        x_T = Noise([seed])(a.x_T.shape[1:], unclip.device).expand_as(a.x_T)
    latent = Latent(embed, x_T, a.steps)
    seeds = [seed or 0] * len(theta)
    return decode(unclip, latent, seeds, sampling=sampling, callback=callback)


def text_diff(
    unclip: UnCLIP,
    latent: Latent | Images,
    source: Sequence[str] | None,
    target: Sequence[str],
    theta: Tensor | Sequence[float],
    sampling: DecoderSamplingConfig | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Change images as captions say (unCLIP 3.3).

    z_i is rotated towards norm(z_t - z_t0) by theta; x_T stays as it is.

    Args:
        unclip: has the CLIP and the decoder.
        latent: B images or their latents, or one for all captions.
        source: z_t0, B captions of what they show, such as "a photo"; None leaves z_t0 out (the
            paper: "also worked well").
        target: z_t, B captions of what they should show.
        theta: (B,) in [0, 1]; the paper goes up to 0.25 to 0.5.
        sampling: by default as `inversion_sampling` says.
        callback: called with (step, steps).

    Returns:
        (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: source and target are the same for CLIP; theta is outside [0, 1].
    """
    theta = torch.as_tensor(theta)
    check_theta(theta)
    latent = latent_of(unclip, latent, len(theta))
    # z_t and z_t0 at unit length, as the paper has them
    direction = F.normalize(unclip.embed_text(target), dim=1)
    if source is not None:
        direction = direction - F.normalize(unclip.embed_text(source), dim=1)
        lengths = direction.norm(dim=1).tolist()
        same = [caption for caption, length in zip(target, lengths) if length < 1e-4]
        if same:
            raise UserError(
                f'The captions to go from and to are the same for CLIP ("{same[0]}"), which is no '
                "direction: change one of them."
            )
    z = latent.image_embed.to(unclip.device)
    towards = F.normalize(direction, dim=1) * z.norm(dim=1, keepdim=True)  # z_i keeps its norm
    edited = replace(latent, image_embed=slerp(z, towards, theta))
    return decode(unclip, edited, range(len(latent)), sampling=sampling, callback=callback)
