"""`unclip invert`: the latents of pictures, as files (unCLIP section 3)."""

from collections.abc import Sequence
from pathlib import Path

from unclip_pl.cli.pictures import enlarge_like, require_files
from unclip_pl.cli.progress import step_bar
from unclip_pl.cli.session import Session, SessionOptions
from unclip_pl.utils.errors import UserError


def invert(images: Sequence[Path], *, options: SessionOptions) -> None:
    """Take pictures apart into z_i and x_T.

    Saves these latents, and shows how well they draw the pictures again.

    Args:
        images: pictures of any size (the centre square is taken)
        options: what draws, from which seed and where to
    """
    for path in images:
        if path.suffix == ".safetensors":
            raise UserError(f"{path} is a latent already: give a picture.")
    require_files(images)
    session = Session(options)
    import torch

    from unclip_pl.manipulate import reconstruct
    from unclip_pl.utils.images import psnr

    rows = []
    for path in images:
        original, latent = session.load_latent(path)
        content = latent.to_bytes(session.unclip)
        print(session.out.write(f"{path.stem}.safetensors", content))
        with step_bar(f"draw {path.name} again") as callback:
            again = reconstruct(session.unclip, latent, callback).cpu()
        decibels = float(psnr(again, original))
        print(f"{path.name}: drawn again at {decibels:.1f} dB PSNR ({latent.steps} steps)")
        drawn = session.upsample_to_size(again, [options.seed])
        settings = f"invert, {latent.steps} steps"
        session.save(drawn[0], f"{path.stem}-again", source=path.name, unclip=settings)
        x_T = enlarge_like(latent.x_T.cpu(), drawn)
        rows.append(torch.cat([enlarge_like(original, drawn), drawn, x_T]))
    labels = [path.stem for path in images]
    session.save_figure("inversions", rows, labels, ["original", "drawn again", "x_T"])
