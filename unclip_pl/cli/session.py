"""What the commands for manipulations and probes share.

They read pictures and latents, draw with one pipeline, and write single PNGs and a labelled figure.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unclip_pl.cli.options import DeviceOptions, OutputOptions, UpsamplerOptions
from unclip_pl.cli.pictures import GRID_PIXELS, load_square
from unclip_pl.cli.progress import step_bar
from unclip_pl.pipeline.locate import require_weights
from unclip_pl.utils.commands import Option
from unclip_pl.utils.options import Sampler, Seed, Spacing, check_sampling, override_sampling

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_pl.manipulate import Latent
    from unclip_pl.stages.decoder import DecoderSamplingConfig

UNSAFE = r"[^-\w.,+ ]"
"""Characters of a label that have no place in a file's name."""
STEPS = 50
"""Sampling steps of an inversion and of the way back, unless an option says otherwise."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """What draws.

    Args:
        decoder: a checkpoint or release; by default the one in the package
        sampler: by default ddim from inverted noise, and the decoder's own from fresh
        steps: sampling steps: a number, 10,10,3,2,2 (numbers for equal sections), fast27 or
            ddim25; by default 50 from inverted noise, and the decoder's own from fresh
        guidance_scale: by default 1 (none) from inverted noise, and the decoder's own from fresh
        seed: of everything random
    """

    decoder: str | None = None
    sampler: Sampler | None = None
    steps: Annotated[Spacing | None, Option(renamed="--sampling-steps")] = None
    guidance_scale: float | None = None
    seed: Seed = 0
    output: OutputOptions
    upsamplers: UpsamplerOptions
    compute: DeviceOptions

    def __post_init__(self) -> None:
        check_sampling(vars(self))

    def require_weights(self, prior: str | None = None) -> None:
        """Raise a UserError if weights that are named are not there, before any are loaded."""
        require_weights(self.decoder, prior, self.upsamplers.paths)

    def seeds(self, count: int) -> list[int]:
        """One for each of `count` pictures."""
        return [self.seed + k for k in range(count)]


class Session:
    """A pipeline with the options of one command.

    Args:
        options: those of the command.
        prior: as for `UnCLIP.load`.
    """

    def __init__(self, options: SessionOptions, prior: str | None = None) -> None:
        options.require_weights(prior)
        self.options, self.out = options, options.output.open()
        placement = options.compute.kwargs()
        from unclip_pl.pipeline.compatibility import require_embeddings
        from unclip_pl.pipeline.unclip import UnCLIP

        self.unclip = UnCLIP.load(
            options.decoder or "openmoji",
            prior,
            upsamplers=options.upsamplers.paths,
            **placement,
        )
        require_embeddings(self.unclip.decoder)
        self.upsampling = options.upsamplers.sampling(self.unclip.cascade)
        self.size = self.unclip.decoder.net_config.image_size

    def _options(self, eta: float | None) -> dict[str, Any]:
        """The options of sampling, by the names of the settings; None where there is none."""
        return {
            "sampler": self.options.sampler,
            "steps": self.options.steps,
            "guidance_scale": self.options.guidance_scale,
            "eta": eta,
        }

    def sampling(self, eta: float | None = None) -> "DecoderSamplingConfig":
        """The decoder's own settings, changed by the options. With `eta` the default is DDIM."""
        options = self._options(eta)
        if eta is not None:
            options["sampler"] = options["sampler"] or "ddim"
        return override_sampling(self.unclip.decoder, options)

    def inversion_sampling(
        self, latent: "Latent", eta: float | None = None
    ) -> "DecoderSamplingConfig":
        """The settings that draw a latent again, changed by the options."""
        from unclip_pl.manipulate import inversion_sampling

        settings = self.sampling(eta)  # refuses impossible options
        options = self._options(eta)
        changed = [name for name, value in options.items() if value is not None]
        changes = {name: getattr(settings, name) for name in changed}
        return inversion_sampling(self.unclip, **{"steps": latent.steps} | changes)

    def load_picture(self, path: Path) -> tuple["Tensor", "Tensor"]:
        """The centre square of a picture, (1, 3, S, S): at the decoder's size, and in its own.

        CLIP is shown the second one.
        """
        return load_square(path, self.size), load_square(path)

    def load_latent(self, path: Path) -> tuple["Tensor", "Latent"]:
        """A picture, (1, 3, S, S), and its latent.

        A picture file is inverted here. Of a file that `unclip invert` wrote, the picture is drawn
        again.
        """
        from unclip_pl.manipulate import Latent, invert, reconstruct

        if path.suffix == ".safetensors":
            latent = Latent.load(path, self.unclip)
            with step_bar(f"draw {path.name}") as callback:
                return reconstruct(self.unclip, latent, callback).cpu(), latent
        steps = STEPS if self.options.steps is None else self.sampling().steps
        image, full_size = self.load_picture(path)
        embed = self.unclip.embed_images(full_size)
        with step_bar(f"invert {path.name}") as callback:
            return image, invert(self.unclip, image, steps, callback, embed)

    def embed(self, path: Path) -> tuple["Tensor", "Tensor"]:
        """A picture, (1, 3, S, S), and its z_i, (1, D), without inverting it."""
        if path.suffix == ".safetensors":
            original, latent = self.load_latent(path)
            return original, latent.image_embed
        image, full_size = self.load_picture(path)
        return image, self.unclip.embed_images(full_size)

    def upsample_to_size(self, images: "Tensor", seeds: Sequence[int]) -> "Tensor":
        """The decoder's pictures at --size, on the CPU. The seeds are those of the new noise."""
        sizes = self.unclip.sizes
        if len(sizes) == 1:
            return images.cpu()
        with step_bar(f"upsample to {sizes[-1]}") as callback:
            times = sizes[-1] // sizes[0]
            report = lambda _, step, steps: callback(step, steps)  # noqa: E731
            return self.unclip.upsample(images, seeds, times, self.upsampling, report).cpu()

    def save(self, image: "Tensor", name: str, **metadata: str) -> None:
        """Write a picture (3, H, W) as NAME.png and print its path."""
        file = f"{re.sub(UNSAFE, '-', name)}.png"
        decoder = str(self.options.decoder or "of the package")
        print(self.out.write_picture(file, image, decoder=decoder, **metadata))

    def save_figure(
        self,
        name: str,
        rows: Sequence["Tensor"],
        labels: Sequence[str],
        heads: Sequence[str] | None = None,
    ) -> None:
        """Write rows of pictures with labels as NAME.png and print its path.

        It is at most GRID_PIXELS wide; pictures are shown smaller for that.
        """
        from unclip_pl.utils.images import grid

        figure = grid(rows, labels, heads=heads, max_width=GRID_PIXELS)
        print(self.out.write_picture(f"{name}.png", figure))
