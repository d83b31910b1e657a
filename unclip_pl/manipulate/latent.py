"""The bipartite latent (z_i, x_T) of an image: inversion, its file, and drawing from it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unclip_pl import __version__
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.diffusion import samplers
from unclip_pl.diffusion.process import Predict
from unclip_pl.diffusion.schedule import Schedule, Spacing, check_spacing
from unclip_pl.pipeline.unclip import Callback, UnCLIP
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.images import Images, as_tensor

FORMAT = 1
INVERSION_STEPS = 50
MIN_SIGMA_OF_X0 = 0.1
"""Noise at which inversion starts with a decoder that predicts x0. Without it, an error of the last
steps grows to several times the noise (x_T with a standard deviation of 3 to 6 was seen)."""
SCHEDULE_FIELDS = ("schedule", "timesteps", "parametrization", "variance")
"""The diffusion settings on which a latent depends. Its file names them."""


@dataclass(frozen=True)
class Latent:
    """B images as a decoder sees them.

    z_i is what CLIP recognises. x_T is the rest of what it takes to draw the images again.
    """

    image_embed: Tensor
    """z_i (B, D) as CLIP gives it."""
    x_T: Tensor
    """(B, 3, H, W), the noise from which DDIM starts."""
    steps: Spacing
    """Sampling steps of the inversion; the same steps draw the image again."""

    def __len__(self) -> int:
        return len(self.x_T)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Latent":
        """A selection of the images; an index may come several times."""
        rows = rows if isinstance(rows, slice) else list(rows)
        return replace(self, image_embed=self.image_embed[rows], x_T=self.x_T[rows])

    def to_bytes(self, unclip: UnCLIP) -> bytes:
        """A safetensors file that also names the CLIP, the decoder and the noise schedule."""
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
        return _in_order(save(tensors, header))

    def save(self, path: str | os.PathLike, unclip: UnCLIP) -> None:
        """Write the file of `to_bytes`."""
        with atomic_file(path) as file:
            file.write(self.to_bytes(unclip))

    @classmethod
    def load(cls, path: str | os.PathLike, unclip: UnCLIP) -> "Latent":
        """Read what `save` wrote.

        Raises:
            UserError: the file is not a latent, or it was made with another CLIP, decoder or noise
                schedule than those of `unclip`.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("image_embed", "x_T")}
            if int(header["format"]) > FORMAT:
                raise UserError(
                    f"The latent {path} has format {header['format']} and this version reads up to "
                    f"{FORMAT}: update unclip_pl."
                )
            model, steps = json.loads(header["model"]), json.loads(header["steps"])
            steps = tuple(steps) if isinstance(steps, list) else steps
            check_spacing(steps, "A latent's decoder")
            theirs, ours = model.pop("clip_fingerprint"), unclip.clip.fingerprint()
            require_same(theirs, ours, f"The latent {path}")
        except FileNotFoundError:
            raise UserError(f"There is no latent {path}.") from None
        except (KeyError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} is not a latent ({error}): give a file that `unclip invert` wrote."
            ) from error
        identity = decoder_identity(unclip)
        if differs := [name for name in identity if model.get(name) != identity[name]]:
            raise UserError(
                f"The latent {path} was made with another decoder (its {' and '.join(differs)} "
                "differ): name that one, or invert the picture again."
            )
        return cls(tensors["image_embed"], tensors["x_T"], steps)


def _in_order(file: bytes) -> bytes:
    """A safetensors file with its header in order, so that equal latents are equal files."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at multiples of 8 bytes
    return len(header).to_bytes(8, "little") + header + file[end:]


def decoder_identity(unclip: UnCLIP) -> dict[str, Any]:
    """What a latent depends on besides the CLIP.

    The settings of the diffusion process, and a digest of the decoder's weights in float16, the
    precision of a release.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unclip.decoder.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().half().contiguous().numpy().tobytes())
    schedule = {name: getattr(unclip.decoder.process.config, name) for name in SCHEDULE_FIELDS}
    return {"schedule": schedule, "weights": digest.hexdigest()}


def inversion_sampling(unclip: UnCLIP, steps: Spacing, **changes: Any) -> DecoderSamplingConfig:
    """The settings of an inversion and of the way back: DDIM with eta 0.

    There is no guidance and no threshold, because both would leave the inverted path. `changes`
    replace single settings.
    """
    settings: dict[str, Any] = {
        "sampler": "ddim",
        "steps": steps,
        "eta": 0.0,
        "guidance_scale": 1.0,
        "threshold": None,
    }
    return replace(unclip.decoder.sampling, **settings | changes)


def invert(
    unclip: UnCLIP,
    images: Images,
    steps: Spacing = INVERSION_STEPS,
    callback: Callback | None = None,
    image_embed: Tensor | None = None,
) -> Latent:
    """Take images apart into (z_i, x_T).

    z_i comes from CLIP. x_T comes from DDIM inversion with the decoder conditioned on z_i (ADM
    appendix F); each step is solved implicitly.

    Args:
        unclip: has the CLIP and the decoder.
        images: (B, 3, H, W) in [-1, 1] at the decoder's size; or PIL images, which CLIP sees in
            their own size.
        steps: sampling steps; more steps make a better reconstruction.
        callback: called with (step, steps).
        image_embed: z_i (B, D), if CLIP saw something better than `images`, such as the same
            pictures in their own size.

    Raises:
        ValueError: the images have another size.
    """
    start = decoder_images(unclip, images)
    embed = unclip.embed_images(images) if image_embed is None else image_embed

    def upwards(predict: Predict, schedule: Schedule) -> Tensor:
        predicts_x0 = unclip.decoder.process.config.parametrization == "x0"
        min_sigma = MIN_SIGMA_OF_X0 if predicts_x0 else 0.0
        return samplers.invert_implicit(
            predict, start, schedule, callback=callback, min_sigma=min_sigma
        )

    sampling = inversion_sampling(unclip, steps)
    x_T = unclip.run_sampler(upwards, len(start), embed, sampling=sampling)
    return Latent(embed, x_T, steps)


def latent_of(unclip: UnCLIP, images: Latent | Images, count: int) -> Latent:
    """A latent as it is, images inverted; of one image, `count` times the same."""
    latent = images if isinstance(images, Latent) else invert(unclip, images)
    return latent[[0] * count] if len(latent) == 1 else latent


def reconstruct(unclip: UnCLIP, latent: Latent, callback: Callback | None = None) -> Tensor:
    """Draw the inverted images again, (B, 3, H, W); the more steps, the closer they are."""
    return decode(unclip, latent, range(len(latent)), callback=callback)


def decode(
    unclip: UnCLIP,
    latent: Latent,
    seeds: Sequence[int],
    captions: Sequence[str] | None = None,
    sampling: DecoderSamplingConfig | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw from z_i and x_T with any sampler, by default as `inversion_sampling` says.

    `seeds` are those of the noise on the way, if the sampler adds any. The result is (B, 3, H, W)
    in [-1, 1].
    """
    sampling = sampling or inversion_sampling(unclip, latent.steps)
    images = unclip.decode(latent.image_embed, seeds, captions, sampling, callback, x_T=latent.x_T)
    return images.clamp(-1, 1)


def decoder_images(unclip: UnCLIP, images: Images) -> Tensor:
    """Images on the device, (B, 3, H, W) at the decoder's size, to which PIL images are resized.

    Raises:
        ValueError: tensors of another size.
    """
    images = as_tensor(images, unclip.decoder.shape[-1])
    if images.ndim != 4 or tuple(images.shape[1:]) != unclip.decoder.shape:
        raise ValueError(
            f"images {tuple(images.shape)} were given, and the decoder draws "
            f"{unclip.decoder.shape}: cut them to that size"
        )
    return images.to(unclip.device)
