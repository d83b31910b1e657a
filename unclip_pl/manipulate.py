"""Image manipulations with an `UnCLIP` (unCLIP section 3): a picture as its bipartite latent (z_i, x_T), and what can be done with both halves.

Pictures are (B, 3, H, W) in [-1, 1] at the decoder's size. The decoder is given no caption unless one is named: z_i and x_T alone decide.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unclip_pl import __version__
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.diffusion import samplers
from unclip_pl.diffusion.guidance import repainted
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Predict
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Schedule, Spacing, check_spacing
from unclip_pl.pipeline.unclip import Callback, UnCLIP
from unclip_pl.stages.decoder import SamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file

FORMAT = 1
INVERSION_STEPS = 50
AGAIN = 0.3
"""Share of the steps that inpainting repeats in each of its further rounds."""
SCHEDULE_FIELDS = ("schedule", "timesteps", "parametrization", "variance")
"""Of the diffusion settings, those that a latent's file names; the others do not change a latent."""


@dataclass(frozen=True)
class Latent:
    """B pictures as a decoder sees them: z_i is what CLIP recognises, x_T the rest of what it takes to draw them again."""

    image_embed: Tensor
    """z_i (B, D) as CLIP gives it."""
    x_T: Tensor
    """(B, 3, H, W), where the decoder's DDIM starts."""
    steps: Spacing
    """Of the inversion; the same draw the picture again."""

    def __len__(self) -> int:
        return len(self.x_T)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Latent":
        """Some of the pictures, or some of them several times."""
        rows = rows if isinstance(rows, slice) else list(rows)
        return replace(self, image_embed=self.image_embed[rows], x_T=self.x_T[rows])

    def save(self, path: str | os.PathLike, unclip: UnCLIP) -> None:
        """Write a safetensors file that also says of which CLIP, decoder and noise schedule it is."""
        model = {"clip_fingerprint": unclip.clip.fingerprint(), **decoder_identity(unclip)}
        header = {
            "format": str(FORMAT),
            "unclip_pl": __version__,
            "steps": json.dumps(self.steps),
            "model": json.dumps(model),
        }
        tensors = {
            "image_embed": self.image_embed.cpu().contiguous(),
            "x_T": self.x_T.cpu().contiguous(),
        }
        with atomic_file(path) as file:
            file.write(save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike, unclip: UnCLIP) -> "Latent":
        """Read what `save` wrote.

        Raises:
            UserError: it is no such file, or of another CLIP, decoder or noise schedule than those of `unclip`.
        """
        try:
            with safe_open(path, "pt") as file:
                header, tensors = (
                    file.metadata() or {},
                    {name: file.get_tensor(name) for name in ("image_embed", "x_T")},
                )
            if int(header["format"]) > FORMAT:
                raise UserError(
                    f"The latent {path} has format {header['format']} and this version reads up to {FORMAT}: update unclip_pl."
                )
            model, steps = json.loads(header["model"]), json.loads(header["steps"])
            steps = tuple(steps) if isinstance(steps, list) else steps
            check_spacing(steps, "A latent's decoder")
            require_same(
                model.pop("clip_fingerprint"), unclip.clip.fingerprint(), f"The latent {path}"
            )
        except FileNotFoundError:
            raise UserError(f"There is no latent {path}.") from None
        except (KeyError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} is no latent of ours ({error}): give a file that `unclip invert` wrote."
            ) from error
        ours = decoder_identity(unclip)
        if differs := [name for name in ours if model.get(name) != ours[name]]:
            raise UserError(
                f"The latent {path} was made with another decoder (its {' and '.join(differs)} differ): name that one, or invert the picture anew."
            )
        return cls(tensors["image_embed"], tensors["x_T"], steps)


def decoder_identity(unclip: UnCLIP) -> dict[str, Any]:
    """What a latent depends on besides the CLIP: the diffusion process, and a digest of the weights in float16, as a release has them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unclip.decoder.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().half().contiguous().numpy().tobytes())
    schedule = {name: getattr(unclip.decoder.process.config, name) for name in SCHEDULE_FIELDS}
    return {"schedule": schedule, "weights": digest.hexdigest()}


def deterministic(unclip: UnCLIP, steps: Spacing, **other: Any) -> SamplingConfig:
    """How an inversion and its way back walk: DDIM at eta 0, no guidance and no threshold, both of which would leave the inverted path."""
    settings: dict[str, Any] = {
        "sampler": "ddim",
        "steps": steps,
        "eta": 0.0,
        "guidance_scale": 1.0,
        "threshold": None,
    }
    return replace(unclip.decoder.sampling, **settings | other)


def invert(
    unclip: UnCLIP,
    images: Tensor,
    steps: Spacing = INVERSION_STEPS,
    callback: Callback | None = None,
    image_embed: Tensor | None = None,
) -> Latent:
    """(z_i, x_T) of pictures: z_i from CLIP, x_T by DDIM inversion with the decoder conditioned on z_i (ADM appendix F, its steps solved implicitly).

    image_embed: z_i where CLIP was shown something better than `images`, such as the picture in its own size. ValueError for images of another size.
    """
    of_size(unclip, images)
    embed = unclip.embed_images(images) if image_embed is None else image_embed

    def upwards(predict: Predict, schedule: Schedule) -> Tensor:
        return samplers.invert_implicit(
            predict, images.to(unclip.device), schedule, callback=callback
        )

    return Latent(
        embed,
        unclip.walk(upwards, len(images), embed, sampling=deterministic(unclip, steps)),
        steps,
    )


def reconstruct(unclip: UnCLIP, latent: Latent, callback: Callback | None = None) -> Tensor:
    """The pictures that were inverted, the more nearly so the more steps there were."""
    return decode(unclip, latent, range(len(latent)), callback=callback)


def decode(
    unclip: UnCLIP,
    latent: Latent,
    seeds: Sequence[int],
    captions: Sequence[str] | None = None,
    sampling: SamplingConfig | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw from z_i and x_T by any sampler (by default as `deterministic` says); seeds: of the noise on the way, if the sampler adds any."""
    sampling = sampling or deterministic(unclip, latent.steps)
    return unclip.decode(
        latent.image_embed, seeds, captions, sampling, callback, x_T=latent.x_T
    ).clamp(-1, 1)


def vary(
    unclip: UnCLIP,
    latent: Latent,
    seeds: Sequence[int],
    eta: float,
    captions: Sequence[str] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Variations around pictures (unCLIP 3.1): DDIM from (z_i, x_T) with noise eta on the way, 0 the picture itself. One seed a row of `latent`.

    For variations from fresh noise, which keep z_i alone, decode its embedding: `unclip.decode(latent.image_embed, seeds)`.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: give 0 (the picture again) to 1 (as much noise as DDPM).")
    return decode(
        unclip, latent, seeds, captions, deterministic(unclip, latent.steps, eta=eta), callback
    )


def slerp(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """From a (theta 0) to b (theta 1): the direction along the great circle, the angle to a growing evenly; the norm linearly from |a| to |b|.

    For equal norms this is Shoemake's slerp. Each sample is one vector. CLIP's embeddings come with their norms here, which the paper's have lost: so the
    way is theirs and a decoder that reads norms is given a fitting one. Computed in float64.

    Args:
        a, b: (B, ...).
        theta: (B,) in [0, 1].

    Raises:
        UserError: opposite vectors, between which every way is as short; a vector of zeros; theta outside [0, 1].
    """
    check_theta(theta)
    start, end = (x.detach().cpu().double().flatten(1) for x in (a, b))
    lengths = [x.norm(dim=1, keepdim=True) for x in (start, end)]
    if not all(bool((length > 0).all()) for length in lengths):
        raise UserError(
            "One of the two vectors to go between is zero, which has no direction: use other pictures or captions."
        )
    u, v = start / lengths[0], end / lengths[1]
    apart, together = (u - v).norm(dim=1), (u + v).norm(dim=1)
    if bool((together < 1e-6).any()):
        raise UserError(
            "The two embeddings or latents point in opposite directions, and every way between them is as short: use other pictures or captions."
        )
    omega = 2 * torch.atan2(
        apart, together
    )  # exact also near 0 and pi, unlike acos of the dot product
    share = theta.cpu().double()
    to_a, to_b = (
        torch.where(omega < 1e-9, part, (part * omega).sin() / omega.sin())
        for part in (1 - share, share)
    )
    direction = to_a[:, None] * u + to_b[:, None] * v
    length = torch.lerp(lengths[0], lengths[1], share[:, None])
    return (direction * length).view(a.shape).to(a.device, a.dtype)


def check_theta(theta: Tensor) -> None:
    """A sentence where one of the angles is outside [0, 1]."""
    if outside := [round(value, 6) for value in theta.flatten().tolist() if not 0 <= value <= 1]:
        raise UserError(f"theta is {outside[0]}: give 0 (where it starts) to 1 (all the way).")


def interpolate(
    unclip: UnCLIP,
    a: Latent,
    b: Latent,
    theta: Tensor,
    seed: int | None = None,
    sampling: SamplingConfig | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Between pictures (unCLIP 3.2). a, b of B rows, theta (B,) in [0, 1].

    seed None: z_i and the inverted x_T both by `slerp`, so that the ends are the reconstructions of a and b. A seed: its noise for every picture in the
    place of x_T; each seed is another way, whose ends have the content of a and b and not their pixels. UserError where a and b were inverted in different
    numbers of steps, which makes different latents.
    """
    if a.steps != b.steps:
        raise UserError(
            f"One of the latents was inverted in {a.steps} steps and the other in {b.steps}: "
            "invert both in the same."
        )
    embed = slerp(a.image_embed, b.image_embed, theta)
    x_T = (
        slerp(a.x_T, b.x_T, theta)
        if seed is None
        else Noise([seed])(a.x_T.shape[1:], unclip.device).expand_as(a.x_T)
    )
    seeds = [seed or 0] * len(theta)
    return decode(unclip, Latent(embed, x_T, a.steps), seeds, sampling=sampling, callback=callback)


def text_diff(
    unclip: UnCLIP,
    latent: Latent,
    source: Sequence[str] | None,
    target: Sequence[str],
    theta: Tensor,
    sampling: SamplingConfig | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pictures moved as captions say (unCLIP 3.3): slerp of z_i towards norm(z_t - z_t0) by theta, the base noise fixed to x_T.

    Args:
        latent: B pictures.
        source: z_t0, B captions of what they are, such as "a photo"; None leaves it out (the paper's "also worked well").
        target: z_t, B captions of what they shall be.
        theta: (B,) in [0, 1]; the paper goes up to 0.25 to 0.5.

    Raises:
        UserError: source and target are the same for CLIP; theta outside [0, 1].
    """
    check_theta(theta)
    to = torch.nn.functional.normalize(unclip.embed_text(target), dim=1)
    if source is not None:  # z_t and z_t0 at unit length, as the paper's are
        start = torch.nn.functional.normalize(unclip.embed_text(source), dim=1)
        if same := [
            caption for caption, gap in zip(target, (to - start).norm(dim=1).tolist()) if gap < 1e-4
        ]:
            raise UserError(
                f'The captions to go from and to are the same for CLIP ("{same[0]}"), which is no direction: change one of them.'
            )
        to = to - start
    z = latent.image_embed.to(unclip.device)
    towards = torch.nn.functional.normalize(to, dim=1) * z.norm(
        dim=1, keepdim=True
    )  # the norm stays that of z_i
    return decode(
        unclip,
        replace(latent, image_embed=slerp(z, towards, theta)),
        range(len(latent)),
        sampling=sampling,
        callback=callback,
    )


def inpaint(
    unclip: UnCLIP,
    image_embed: Tensor | None,
    seeds: Sequence[int],
    captions: Sequence[str] | None = None,
    sampling: SamplingConfig | None = None,
    callback: Callback | None = None,
    *,
    images: Tensor,
    mask: Tensor,
    rounds: int = 3,
) -> Tensor:
    """Draw where `mask` (B, 1, H, W) is True and keep the pictures elsewhere, to the pixel; any sampler. Otherwise as `unclip.decode`.

    The first draw heeds what is known too little; so the result is `rounds` times sent back to the last AGAIN of the steps and drawn on (RePaint's
    resampling in few long jumps). A sampler with noise of its own (eta 1) heeds it better.

    Raises:
        UserError: a mask of another size, or one that asks for nothing or leaves nothing known.
    """
    of_size(unclip, images)
    if mask.shape != images[:, :1].shape or mask.dtype != torch.bool:
        raise UserError(
            f"The mask is {mask.dtype} {tuple(mask.shape)}, and the pictures need a bool {tuple(images[:, :1].shape)}: make it of their size."
        )
    if bool(mask.flatten(1).all(1).any()):
        raise UserError(
            "The mask asks for the whole picture, of which nothing would stay: leave some of it black, or use `unclip generate`."
        )
    if not bool(mask.flatten(1).any(1).all()):
        raise UserError(
            "The mask is all black, so that there is nothing to paint: make white what shall be drawn anew."
        )
    settings, noise = sampling or unclip.decoder.sampling, Noise(seeds)
    known, mask = images.to(unclip.device), mask.to(unclip.device)

    def down(predict: Predict, schedule: Schedule) -> Tensor:
        held, x, kept = (
            repainted(predict, unclip.decoder.process, known, mask),
            known,
            len(schedule),
        )
        for _ in range(1 + rounds):
            x, rest = noised(x, schedule, kept, noise(unclip.decoder.shape, unclip.device))
            x = SAMPLERS[settings.sampler](
                held, x, rest, noise=noise, eta=settings.eta, callback=callback
            )
            kept = max(1, round(AGAIN * len(schedule)))
        return x

    drawn = unclip.walk(down, len(seeds), image_embed, captions, settings)
    return torch.where(mask, drawn, known)


def image_to_image(
    unclip: UnCLIP,
    image_embed: Tensor | None,
    seeds: Sequence[int],
    captions: Sequence[str] | None = None,
    sampling: SamplingConfig | None = None,
    callback: Callback | None = None,
    *,
    images: Tensor,
    strength: float,
) -> Tensor:
    """Draw from pictures with noise on them (SDEdit): strength 0 gives them back, 1 starts from noise alone, as `unclip.decode` does from the same seeds.

    Between, the last round(strength * steps) of the sampler's steps are walked (one at least). Otherwise as `unclip.decode`; any sampler.
    """
    of_size(unclip, images)
    if not 0 <= strength <= 1:
        raise UserError(
            f"The strength is {strength}: give 0 (the picture itself) to 1 (nothing of it)."
        )
    images = images.to(unclip.device)
    if strength == 0:
        return images
    settings, noise = sampling or unclip.decoder.sampling, Noise(seeds)

    def down(predict: Predict, schedule: Schedule) -> Tensor:
        kept = max(1, round(strength * len(schedule)))
        x, rest = noised(images, schedule, kept, noise(unclip.decoder.shape, unclip.device))
        return SAMPLERS[settings.sampler](
            predict, x, rest, noise=noise, eta=settings.eta, callback=callback
        )

    return unclip.walk(down, len(seeds), image_embed, captions, settings)


def noised(images: Tensor, schedule: Schedule, kept: int, noise: Tensor) -> tuple[Tensor, Schedule]:
    """Pictures at the level of noise from which `kept` steps of a schedule are left, and these steps; at the topmost level `noise` alone."""
    if kept == len(schedule):
        return noise, schedule
    level = float(schedule.alphas_cumprod[kept - 1])
    return math.sqrt(level) * images + math.sqrt(1 - level) * noise, Schedule(
        schedule.alphas_cumprod[:kept], schedule.timesteps[:kept]
    )


def of_size(unclip: UnCLIP, images: Tensor) -> None:
    """ValueError unless the pictures are (B, 3, H, W) at the decoder's size."""
    if images.ndim != 4 or tuple(images.shape[1:]) != unclip.decoder.shape:
        raise ValueError(
            f"pictures {tuple(images.shape)} were given, and the decoder draws {unclip.decoder.shape}: cut them to that size"
        )
