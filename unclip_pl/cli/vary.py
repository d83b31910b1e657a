"""`unclip vary`: variations of pictures (unCLIP section 3.1)."""

import argparse
from pathlib import Path
from typing import Any

from unclip_pl.cli.options import AddCommand, require_minimum
from unclip_pl.cli.pictures import PICTURE_HELP, require_files
from unclip_pl.cli.session import Session, add_session_options
from unclip_pl.utils.errors import UserError


def add(command: AddCommand) -> None:
    parser = command(
        "vary",
        run,
        "Draw variations of pictures: around the picture itself (--eta), or of all that CLIP sees "
        "the same in.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=PICTURE_HELP)
    parser.add_argument(
        "--eta",
        type=float,
        nargs="+",
        help="noise of DDIM, 0 (the picture again) to 1: a row of the figure for each",
    )
    parser.add_argument(
        "--noise",
        choices=["inverted", "fresh"],
        help="start from the inverted picture or from fresh noise; by default inverted with --eta",
    )
    parser.add_argument(
        "--num-images",
        type=int,
        default=4,
        help="variations of each picture (and each eta); picture k uses seed + k",
    )
    parser.add_argument(
        "--caption", help="a caption to draw with; without it only the picture decides"
    )
    add_session_options(parser)


def run(arguments: argparse.Namespace) -> None:
    require_minimum(arguments, num_images=1)
    noise = arguments.noise or ("inverted" if arguments.eta else "fresh")
    inverted = noise == "inverted"
    etas = arguments.eta or ([0.0] if inverted else [None])
    for eta in etas:
        if eta is not None and not 0 <= eta <= 1:
            raise UserError(f"--eta is {eta}: give 0 (no noise on the way) to 1 (as much as DDPM).")
    require_files(arguments.images)
    session = Session(arguments)
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    captions = [arguments.caption] * len(seeds) if arguments.caption else None
    rows, labels = [], []
    for path in arguments.images:
        original, start = session.load_latent(path) if inverted else session.embed(path)
        rows.append(original)
        labels.append(path.stem)
        for eta in etas:
            drawn, sampling = draw(session, path, start, seeds, captions, eta)
            suffix = f"-eta{eta:g}" if len(etas) > 1 else ""
            settings = f"vary, {noise} noise, {sampling}, caption {arguments.caption!r}"
            for seed, image in zip(seeds, drawn):
                name = f"{path.stem}{suffix}-{seed}"
                session.save(image, name, source=path.name, seed=str(seed), unclip=settings)
            rows.append(drawn)
            labels.append("variations" if eta is None else f"eta {eta:g}")
    session.save_figure("variations", rows, labels)


def draw(
    session: Session,
    path: Path,
    start: Any,
    seeds: list[int],
    captions: list[str] | None,
    eta: float | None,
) -> tuple[Any, Any]:
    """Variations at --size, one per seed, and the settings they were drawn with.

    `start` is the picture's latent, or its z_i (1, D) for fresh noise.
    """
    from unclip_pl.manipulate import Latent, decode

    description = path.name if eta is None else f"{path.name}, eta {eta:g}"
    with session.progress(description) as callback:
        if isinstance(start, Latent):
            latent = start[[0] * len(seeds)]
            sampling = session.inversion_sampling(latent, eta)
            drawn = decode(session.unclip, latent, seeds, captions, sampling, callback)
        else:
            embed = start.expand(len(seeds), -1)
            sampling = session.sampling(eta)
            drawn = session.unclip.decode(embed, seeds, captions, sampling, callback)
    return session.upsample_to_size(drawn, seeds), sampling
