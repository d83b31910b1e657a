"""`unclip interpolate`: pictures between two pictures (unCLIP section 3.2)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from unclip_pl.cli.options import AddCommand, require_minimum
from unclip_pl.cli.pictures import PICTURE_HELP, enlarge_like, require_files
from unclip_pl.cli.session import Session, add_session_options
from unclip_pl.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_pl.manipulate import Latent


def add(command: AddCommand) -> None:
    parser = command("interpolate", run, "Draw the way from one picture to another.")
    parser.add_argument("a", type=Path, metavar="A", help=PICTURE_HELP)
    parser.add_argument("b", type=Path, metavar="B", help=PICTURE_HELP)
    parser.add_argument(
        "--steps", type=int, default=8, help="pictures on the way, both ends included"
    )
    parser.add_argument(
        "--noise",
        choices=["inverted", "fresh"],
        default="inverted",
        help="x_T between those of A and B, so that the ends are A and B; or one noise for all, "
        "from a seed",
    )
    parser.add_argument(
        "--num-images",
        type=int,
        help="ways with fresh noise, a row each: way k uses seed + k; by default 1",
    )
    add_session_options(parser, "--sampling-steps")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import interpolate

    require_minimum(arguments, steps=2)
    fresh = arguments.noise == "fresh"
    if arguments.num_images is not None:
        require_minimum(arguments, num_images=1)
        if not fresh:
            raise UserError(
                "--num-images is for --noise fresh: with inverted noise there is one way from A to "
                "B."
            )
    require_files([arguments.a, arguments.b])
    session = Session(arguments)
    first, a = load_end(session, arguments.a, fresh)
    last, b = load_end(session, arguments.b, fresh)
    sampling = session.sampling() if fresh else session.inversion_sampling(a)
    count = arguments.steps
    a, b = a[[0] * count], b[[0] * count]
    theta = torch.linspace(0, 1, count)
    name = f"{arguments.a.stem}-{arguments.b.stem}"
    source = f"{arguments.a.name} to {arguments.b.name}"
    settings = f"interpolate, {arguments.noise} noise, {sampling}"
    rows, labels = [], []
    for seed in [arguments.seed + k for k in range(arguments.num_images or 1)]:
        with session.progress(source) as callback:
            noise_seed = seed if fresh else None
            drawn = interpolate(session.unclip, a, b, theta, noise_seed, sampling, callback)
        drawn = session.upsample_to_size(drawn, [seed] * count)
        for k, image in enumerate(drawn):
            metadata = {"source": source, "seed": str(seed), "unclip": settings}
            session.save(image, f"{name}-{seed}-{k}", **metadata)
        rows.append(torch.cat([enlarge_like(first, drawn), drawn, enlarge_like(last, drawn)]))
        labels.append(f"seed {seed}" if fresh else "inverted x_T")
    heads = ["A", *(f"{value:.2f}" for value in theta.tolist()), "B"]
    session.save_figure("interpolation", rows, labels, heads)


def load_end(session: Session, path: Path, fresh: bool) -> tuple["Tensor", "Latent"]:
    """A picture and its latent; where the noise is fresh, x_T is not needed and is zero."""
    import torch

    from unclip_pl.manipulate import Latent

    if not fresh:
        return session.load_latent(path)
    original, embed = session.embed(path)
    return original, Latent(embed, torch.zeros(1, *session.unclip.decoder.shape), 0)
