"""`unclip interpolate`: pictures between two pictures (unCLIP section 3.2)."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unclip_pl.cli.pictures import enlarge_like, require_files
from unclip_pl.cli.progress import step_bar
from unclip_pl.cli.session import Session, SessionOptions
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_pl.manipulate import Latent


def interpolate(
    a: Path,
    b: Path,
    *,
    num_images: Count = 8,
    noise: Literal["inverted", "fresh"] = "inverted",
    num_rows: Count | None = None,
    options: SessionOptions,
) -> None:
    """Draw the way from one picture to another.

    Args:
        a: a picture of any size (its centre square is taken), or a latent that `unclip invert`
            wrote
        b: another
        num_images: pictures on the way, both ends included
        noise: x_T between those of A and B, so that the ends are A and B; or one noise for all,
            from a seed
        num_rows: ways with fresh noise, a row each: way k uses seed + k; by default 1
        options: what draws, from which seed and where to
    """
    if num_images < 2:
        raise UserError(f"--num-images is {num_images}: give 2 or more, the ends A and B.")
    fresh = noise == "fresh"
    if num_rows is not None and not fresh:
        raise UserError(
            "--num-rows is for --noise fresh: with inverted noise there is one way from A to B."
        )
    require_files([a, b], latents=True)
    session = Session(options)
    import torch

    from unclip_pl import manipulate

    first, start = load_end(session, a, fresh)
    last, end = load_end(session, b, fresh)
    sampling = session.sampling() if fresh else session.inversion_sampling(start)
    count = num_images
    start, end = start[[0] * count], end[[0] * count]
    theta = torch.linspace(0, 1, count)
    name = f"{a.stem}-{b.stem}"
    source = f"{a.name} to {b.name}"
    settings = f"interpolate, {noise} noise, {sampling}"
    rows, labels = [], []
    for seed in options.seeds(num_rows or 1):
        with step_bar(source) as callback:
            noise_seed = seed if fresh else None
            drawn = manipulate.interpolate(
                session.unclip, start, end, theta, noise_seed, sampling, callback
            )
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
