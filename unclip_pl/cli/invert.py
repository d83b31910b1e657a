"""`unclip invert`: the latents of pictures, as files (unCLIP section 3)."""

import argparse
from pathlib import Path

from unclip_pl.cli.options import AddCommand
from unclip_pl.cli.pictures import enlarge_like, require_files
from unclip_pl.cli.session import Session, add_session_options
from unclip_pl.utils.errors import UserError


def add(command: AddCommand) -> None:
    parser = command(
        "invert",
        run,
        "Take pictures apart into z_i and x_T, save these latents, and show how well they draw the "
        "pictures again.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="pictures of any size (the centre square is taken)",
    )
    add_session_options(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import reconstruct
    from unclip_pl.utils.images import psnr

    require_files(arguments.images)
    session = Session(arguments)
    rows = []
    for path in arguments.images:
        if path.suffix == ".safetensors":
            raise UserError(f"{path} is a latent already: give a picture.")
        original, latent = session.load_latent(path)
        file = session.out / f"{path.stem}.safetensors"
        latent.save(file, session.unclip)
        print(file)
        with session.progress(f"draw {path.name} again") as callback:
            again = reconstruct(session.unclip, latent, callback).cpu()
        decibels = float(psnr(again, original))
        print(f"{path.name}: drawn again at {decibels:.1f} dB PSNR ({latent.steps} steps)")
        drawn = session.upsample_to_size(again, [arguments.seed])
        settings = f"invert, {latent.steps} steps"
        session.save(drawn[0], f"{path.stem}-again", source=path.name, unclip=settings)
        x_T = enlarge_like(latent.x_T.cpu(), drawn)
        rows.append(torch.cat([enlarge_like(original, drawn), drawn, x_T]))
    labels = [path.stem for path in arguments.images]
    session.save_figure("inversions", rows, labels, ["original", "drawn again", "x_T"])
