"""The picture on top of the README, from the weights in the package: `python docs/showcase.py`.

Captions, variations, an interpolation and a text diff, each drawn at 64 pixels and enlarged to 256
by the first upsampler. Minutes on a CPU.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip_pl import manipulate
from unclip_pl.manipulate.latent import INVERSION_STEPS
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.utils.images import grid, save_png

CAPTIONS = [
    "woman firefighter, dark skin tone",
    "couple with heart",
    "man scientist, medium skin tone",
    "thumbs up",
    "red apple",
    "cactus",
]
COLUMNS = len(CAPTIONS)
SOURCE = "OpenMoji, CC BY-SA 4.0, openmoji.org"


def rows(unclip: UnCLIP, seed: int = 0) -> dict[str, Tensor]:
    """Each row's label and its pictures, (6, 3, 64, 64)."""
    drawn = unclip.generate(CAPTIONS, [seed] * COLUMNS, size=64)
    person = unclip.generate(["woman, light skin tone"], [seed], size=64)
    embed = unclip.embed_images(person)
    varied = unclip.decode(embed.expand(COLUMNS - 1, -1), range(1, COLUMNS))
    theta = torch.linspace(0, 1, COLUMNS)
    ends = unclip.generate(
        ["woman pilot, dark skin tone", "man with beard, light skin tone"], [seed] * 2, size=64
    )
    # on the way that was inverted
    still = replace(unclip.decoder.sampling, steps=INVERSION_STEPS, eta=0.0)
    start, end = (manipulate.invert(unclip, image[None]) for image in ends)
    between = manipulate.interpolate(unclip, repeated(start), repeated(end), theta, seed, still)
    changed = manipulate.text_diff(
        unclip,
        repeated(manipulate.invert(unclip, person)),
        ["woman, light skin tone"] * COLUMNS,
        ["woman, dark skin tone"] * COLUMNS,
        0.25 * theta,
        still,
    )
    return {
        "captions": drawn,
        "variations": torch.cat([person, varied]),
        "interpolation": between,
        "text diff": changed,
    }


def repeated(latent: manipulate.Latent) -> manipulate.Latent:
    """The latent of one picture, for each column."""
    return manipulate.Latent(
        latent.image_embed.expand(COLUMNS, -1),
        latent.x_T.expand(COLUMNS, -1, -1, -1),
        latent.steps,
    )


def main() -> None:
    """Draw the pictures of the README and write them as one PNG."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("docs/showcase.png"))
    arguments.add_argument("--decoder", help="a release or checkpoint in place of the package's")
    arguments.add_argument("--side", type=int, default=128, help="of a picture in the grid")
    given = arguments.parse_args()
    decoder = {"decoder": given.decoder} if given.decoder else {}
    unclip = UnCLIP.load(**decoder, prior="diffusion", upsamplers=("256",))
    shown = {}
    for name, images in rows(unclip).items():
        large = unclip.upsample(images, range(len(images)))
        shown[name] = F.interpolate(large, given.side, mode="area")
    picture = grid(list(shown.values()), list(shown)).quantize(256, Image.Quantize.FASTOCTREE)
    print(save_png(picture, given.out, source=SOURCE))


if __name__ == "__main__":
    main()
