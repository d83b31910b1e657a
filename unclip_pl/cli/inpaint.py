"""`unclip inpaint`: a part of a picture drawn again."""

import argparse
from dataclasses import replace
from pathlib import Path

from unclip_pl.cli.options import AddCommand, require_minimum
from unclip_pl.cli.pictures import enlarge_like
from unclip_pl.cli.session import Session, add_session_options
from unclip_pl.utils.errors import UserError


def add(command: AddCommand) -> None:
    parser = command("inpaint", run, "Draw a part of a picture again and keep the rest.")
    parser.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help="a picture of any size (its centre square is taken)",
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="what the whole picture shall show; without it, what CLIP sees in it now",
    )
    parser.add_argument(
        "--mask", type=Path, required=True, help="a picture of the same size, white where to draw"
    )
    parser.add_argument(
        "--prior",
        help='for PROMPT: "diffusion" (the default) or "ar", those in the package; or a checkpoint '
        "or release",
    )
    parser.add_argument("--num-images", type=int, default=4, help="picture k uses seed + k")
    add_session_options(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import inpaint
    from unclip_pl.utils.images import load_image

    require_minimum(arguments, num_images=1)
    if arguments.prior and not arguments.prompt:
        raise UserError(
            "--prior is given, and without a PROMPT no prior is used: write one, or leave --prior "
            "out."
        )
    check_sizes(arguments.image, arguments.mask)
    session = Session(arguments, (arguments.prior or "diffusion") if arguments.prompt else None)
    unclip, sampling = session.unclip, session.sampling()
    if sampling.sampler == "ddim":  # with noise on the way it fits the known part better
        sampling = replace(sampling, eta=1.0)
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    original, full_size = session.load_picture(arguments.image)
    mask = load_image(arguments.mask, session.size).mean(0, keepdim=True)[None] > 0
    if arguments.prompt:
        captions = [arguments.prompt] * len(seeds)
        embed = unclip.sample_prior(captions, seeds)
    else:
        captions = None
        embed = unclip.embed_images(full_size).expand(len(seeds), -1)
    images = original.expand(len(seeds), -1, -1, -1)
    masks = mask.expand(len(seeds), -1, -1, -1)
    with session.progress(arguments.image.name) as callback:
        drawn = inpaint(
            unclip, embed, seeds, captions, sampling, callback, images=images, mask=masks
        )
    drawn = session.upsample_to_size(drawn, seeds)
    source = arguments.image.name
    settings = f"inpaint, mask {arguments.mask.name}, prompt {arguments.prompt!r}, {sampling}"
    for seed, image in zip(seeds, drawn):
        name = f"{arguments.image.stem}-{seed}"
        session.save(image, name, source=source, seed=str(seed), unclip=settings)
    known = torch.where(mask, torch.zeros(()), original)  # grey where it is drawn
    row = torch.cat([enlarge_like(original, drawn), enlarge_like(known, drawn), drawn])
    label = arguments.prompt or arguments.image.stem
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
