"""What the commands of manipulations and probes share: pictures and latents in, single PNGs and one labelled figure out."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unclip_pl.cli.generate import GRID, upsamplers_of
from unclip_pl.cli.options import placement, upsampling
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import SPACING_HELP, override_sampling, seed, spacing

UNSAFE = r"[^-\w.,+ ]"
"""Of a label, what no file name has."""
STEPS = 50
"""Of an inversion and of its way back, unless --steps says otherwise."""


def options(command: argparse.ArgumentParser, steps: str = "--steps") -> None:
    """The options of every command here; `steps`: the name of the sampling steps."""
    command.add_argument(
        "--decoder", type=Path, help="a checkpoint or release; by default the one in the package"
    )
    command.add_argument(
        "--sampler",
        choices=["ddpm", "ddim", "dpm_solver_pp"],
        help="by default ddim from inverted noise, and the decoder's own from fresh",
    )
    command.add_argument(
        steps,
        dest="sampling_steps",
        type=spacing,
        help=f"{SPACING_HELP}; by default {STEPS} from inverted noise, and the decoder's own from fresh",
    )
    command.add_argument(
        "--guidance-scale",
        type=float,
        help="by default 1 (none) from inverted noise, and the decoder's own from fresh",
    )
    command.add_argument("--seed", type=seed, default=0, help="of all that is drawn")
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    command.add_argument(
        "--size",
        type=int,
        choices=[64, 256, 1024],
        default=64,
        help="pixels a side; upsamplers draw the decoder's 64 larger",
    )
    upsampling(command, "--upsampler-steps")
    command.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the PNG files and the figure"
    )


def at_least(arguments: argparse.Namespace, **least: int) -> None:
    """A sentence where an option is below its least value."""
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give {value} or more."
            )


def check_files(paths: list[Path]) -> None:
    """A sentence for a picture that is not there, before anything is loaded."""
    if gone := [path for path in paths if not path.exists()]:
        raise UserError(f"There is no picture {gone[0]}.")


def square(path: Path, size: int | None = None) -> Any:
    """The centre square of a picture file of any size, mode and rotation, (1, 3, S, S); with a size it is told what is cut off."""
    from unclip_pl.utils.images import load_image

    height, width = load_image(path).shape[1:]
    side = min(height, width)
    if size and height != width:
        print(
            f"unclip: {path} is {width} x {height} pixels, of which the {side} x {side} in the centre are taken.",
            file=sys.stderr,
        )
    return load_image(path, size or side)[None]


class Studio:
    """An `UnCLIP` with the options of a command: reads what it is given, keeps what it draws.

    Args:
        arguments: with the options of `options`.
        prior: as for `UnCLIP.load`.
    """

    def __init__(self, arguments: argparse.Namespace, prior: Any = None) -> None:
        from unclip_pl.pipeline.unclip import UnCLIP
        from unclip_pl.pipeline.weights import DEFAULT_DECODER

        self.arguments, self.out = arguments, arguments.out
        upsamplers = upsamplers_of(arguments)
        self.unclip = UnCLIP.load(
            arguments.decoder or DEFAULT_DECODER,
            prior,
            upsamplers=upsamplers,
            **placement(arguments),
        )
        stages = zip(self.unclip.cascade.sizes, self.unclip.cascade.stages)
        self.upsampling = {
            size: override_sampling(stage, vars(arguments), "upsampler_") for size, stage in stages
        }
        self.size = self.unclip.decoder.net_config.image_size
        self.out.mkdir(parents=True, exist_ok=True)

    def sampling(self, eta: float | None = None) -> Any:
        """The decoder's settings with what the options say otherwise."""
        options = vars(self.arguments) | {"steps": self.arguments.sampling_steps, "eta": eta}
        if eta is not None:
            options["sampler"] = options["sampler"] or "ddim"
        return override_sampling(self.unclip.decoder, options)

    def following(self, latent: Any, eta: float | None = None) -> Any:
        """The settings that draw a latent again, left where the options say so."""
        from dataclasses import replace

        from unclip_pl.manipulate import inversion_sampling

        settings = self.sampling(eta)  # a sentence where an option is impossible
        options = {
            "sampler": self.arguments.sampler,
            "steps": self.arguments.sampling_steps,
            "guidance_scale": self.arguments.guidance_scale,
            "eta": eta,
        }
        told = {
            name: getattr(settings, name) for name, value in options.items() if value is not None
        }
        return replace(inversion_sampling(self.unclip, latent.steps), **told)

    def picture(self, path: Path) -> tuple[Any, Any]:
        """A picture file: at the decoder's size, (1, 3, S, S); and what CLIP is shown, the same square in its own size."""
        return square(path, self.size), square(path)

    def latent(self, path: Path) -> tuple[Any, Any]:
        """(original (1, 3, S, S), its Latent) of a picture, inverted here; or of a latent that `unclip invert` wrote, whose original is drawn again."""
        from unclip_pl.manipulate import Latent, invert, reconstruct

        if path.suffix == ".safetensors":
            latent = Latent.load(path, self.unclip)
            with self.progress(f"draw {path.name}") as callback:
                return reconstruct(self.unclip, latent, callback).cpu(), latent
        steps = STEPS if self.arguments.sampling_steps is None else self.sampling().steps
        image, whole = self.picture(path)
        with self.progress(f"invert {path.name}") as callback:
            latent = invert(self.unclip, image, steps, callback, self.unclip.embed_images(whole))
        return image, latent

    def embed(self, path: Path) -> tuple[Any, Any]:
        """(original (1, 3, S, S), z_i (1, D)) of a picture or a saved latent, without inverting it."""
        if path.suffix == ".safetensors":
            original, latent = self.latent(path)
            return original, latent.image_embed
        image, whole = self.picture(path)
        return image, self.unclip.embed_images(whole)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar of sampling steps on stderr, as a callback."""
        from tqdm import tqdm

        with tqdm(desc=what, unit="step", file=sys.stderr) as bar:

            def callback(step: int, steps: int) -> None:
                if step < bar.n:  # a further walk
                    bar.reset(steps)
                bar.total = steps
                bar.update(step - bar.n)

            yield callback

    def finish(self, images: Any, seeds: Sequence[int]) -> Any:
        """Pictures of the decoder at the size that is asked for, on the CPU. The upsamplers' noise is that of the seeds."""
        sizes = self.unclip.sizes
        if len(sizes) == 1:
            return images.cpu()
        with self.progress(f"upsample to {sizes[-1]}") as callback:
            drawn = self.unclip.upsample(
                images,
                seeds,
                sizes[-1] // sizes[0],
                self.upsampling,
                lambda _, step, steps: callback(step, steps),
            )
        return drawn.cpu()

    def save(self, images: Any, names: Sequence[str], **metadata: str) -> None:
        """One PNG a picture, its path on stdout."""
        from unclip_pl.utils.images import save_png

        for image, name in zip(images, names, strict=True):
            print(
                save_png(
                    image,
                    self.out / f"{re.sub(UNSAFE, '-', name)}.png",
                    decoder=str(self.arguments.decoder or "of the package"),
                    **metadata,
                )
            )

    def figure(
        self,
        name: str,
        rows: Sequence[Any],
        labels: Sequence[str],
        heads: Sequence[str] | None = None,
    ) -> None:
        """The labelled figure, its path on stdout; pictures wider together than GRID pixels are shown smaller."""
        from unclip_pl.utils.images import grid, save_png, shrink

        side = max(self.size, GRID // max(len(row) for row in rows))
        print(
            save_png(
                grid([shrink(row, side) for row in rows], labels, heads=heads),
                self.out / f"{name}.png",
            )
        )


def enlarged(image: Any, drawn: Any) -> Any:
    """(B, 3, H, W) at the size of the pictures `drawn`, each pixel as a square."""
    from torch.nn.functional import interpolate

    return interpolate(image, drawn.shape[-2:], mode="nearest")


def numbers(text: str) -> list[float]:
    """ "0.25" as [0.25], "0..0.5" as five from 0 to 0.5."""
    first, dots, last = text.partition("..")
    try:
        start = float(first)
        end = float(last) if dots else start
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is neither a number nor a range: write 0.25 or 0..0.5"
        ) from None
    return [start + (end - start) * k / 4 for k in range(5)] if dots else [start]
