"""`unclip inpaint`: a part of a picture drawn again."""

from dataclasses import replace
from pathlib import Path

from unclip_pl.cli.pictures import enlarge_like, require_files
from unclip_pl.cli.progress import step_bar
from unclip_pl.cli.session import Session, SessionOptions
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count


def inpaint(
    image: Path,
    prompt: str | None = None,
    *,
    mask: Path,
    prior: str | None = None,
    num_images: Count = 4,
    options: SessionOptions,
) -> None:
    """Draw a part of a picture again and keep the rest.

    Args:
        image: a picture of any size (its centre square is taken)
        prompt: what the whole picture shall show; without it, what CLIP sees in it now
        mask: a picture of the same size, white where to draw
        prior: for PROMPT: "diffusion" (the default) or "ar", those in the package; or a
            checkpoint or release
        num_images: picture k uses seed + k
        options: what draws, from which seed and where to
    """
    if prior and not prompt:
        raise UserError(
            "--prior is given, and without a PROMPT no prior is used: write one, or leave --prior "
            "out."
        )
    require_files([image, mask])
    prior = (prior or "diffusion") if prompt else None
    options.require_weights(prior)
    check_sizes(image, mask)
    session = Session(options, prior)
    import torch

    from unclip_pl import manipulate
    from unclip_pl.utils.images import load_image

    unclip, sampling = session.unclip, session.sampling()
    if sampling.sampler == "ddim":  # with noise on the way it fits the known part better
        sampling = replace(sampling, eta=1.0)
    seeds = options.seeds(num_images)
    original, full_size = session.load_picture(image)
    white = load_image(mask, session.size).mean(0, keepdim=True)[None] > 0
    if prompt:
        captions = [prompt] * len(seeds)
        embed = unclip.sample_prior(captions, seeds)
    else:
        captions = None
        embed = unclip.embed_images(full_size).expand(len(seeds), -1)
    images = original.expand(len(seeds), -1, -1, -1)
    masks = white.expand(len(seeds), -1, -1, -1)
    with step_bar(image.name) as callback:
        drawn = manipulate.inpaint(
            unclip, embed, seeds, captions, sampling, callback, images=images, mask=masks
        )
    drawn = session.upsample_to_size(drawn, seeds)
    source = image.name
    settings = f"inpaint, mask {mask.name}, prompt {prompt!r}, {sampling}"
    for seed, picture in zip(seeds, drawn):
        name = f"{image.stem}-{seed}"
        session.save(picture, name, source=source, seed=str(seed), unclip=settings)
    known = torch.where(white, torch.zeros(()), original)  # grey where it is drawn
    row = torch.cat([enlarge_like(original, drawn), enlarge_like(known, drawn), drawn])
    label = prompt or image.stem
    heads = ["original", "known", *(f"seed {seed}" for seed in seeds)]
    session.save_figure("inpainting", [row], [label], heads)


def check_sizes(image: Path, mask: Path) -> None:
    """Raise a UserError unless picture and mask have the same size."""
    from unclip_pl.utils.images import load_image

    height, width = load_image(image).shape[1:]
    mask_height, mask_width = load_image(mask).shape[1:]
    if (height, width) != (mask_height, mask_width):
        raise UserError(
            f"The mask {mask} is {mask_width} x {mask_height} pixels and the picture {width} x "
            f"{height}: make it of the same size."
        )
