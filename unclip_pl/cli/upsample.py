"""`unclip upsample`: pictures of one's own, drawn larger by the upsamplers."""

import argparse
import sys
from pathlib import Path

from unclip_pl.cli.options import (
    AddCommand,
    add_device_options,
    add_output_options,
    add_upsampler_options,
    device_kwargs,
    override_upsampling,
)
from unclip_pl.utils.errors import UserError


def add(command: AddCommand) -> None:
    parser = command(
        "upsample",
        run,
        "Draw pictures larger, whole and in their own shape: 4 times by one upsampler, 16 times by "
        "both.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="picture files of any size; transparency becomes white",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--times",
        type=int,
        choices=[4, 16],
        help="4 (the default): by the upsampler made for the nearest size, 64 or 256 pixels",
    )
    size.add_argument(
        "--size",
        type=int,
        help="pixels of the longer side instead: drawn 4 or 16 times as large, then shrunk to this",
    )
    add_upsampler_options(parser, "--steps")
    add_device_options(parser)
    out_help = "folder for the PNG files, IMAGE-WIDTHxHEIGHT.png"
    add_output_options(parser, "the same for every picture", out_help)


def run(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from unclip_pl.pipeline.cascade import Cascade
    from unclip_pl.pipeline.weights import load_upsamplers
    from unclip_pl.utils.images import load_image, save_png, shrink

    images = [load_image(path)[None] for path in arguments.images]
    factors = []
    for path, image in zip(arguments.images, images):
        if arguments.size is None:
            factors.append(arguments.times or 4)
        else:
            factors.append(factor_for(path, max(image.shape[-2:]), arguments.size))
    paths = {256: arguments.upsampler_256 or "256", 1024: arguments.upsampler_1024 or "1024"}
    kwargs = device_kwargs(arguments)
    cascade = Cascade(load_upsamplers(list(paths.values())), **kwargs)
    sampling = override_upsampling(cascade, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    written: set[Path] = set()
    for path, image, factor in zip(arguments.images, images, factors):
        stages = cascade.route(max(image.shape[-2:]), factor)
        sizes = [stage.net_config.image_size for stage in stages]
        total = sum(stage.count_steps(sampling[size]) for stage, size in zip(stages, sizes))
        with tqdm(desc=path.name, total=total, unit="step", file=sys.stderr) as bar:

            def report(stage: str, step: int, steps: int, bar: tqdm = bar) -> None:
                bar.set_postfix_str(f"{stage} step {step}/{steps}")
                bar.update(1)

            drawn = cascade.upsample(image, [arguments.seed], factor, sampling, report).cpu()
        if arguments.size is not None:
            drawn = shrink(drawn, arguments.size)
        name = f"{path.stem}-{drawn.shape[-1]}x{drawn.shape[-2]}"
        target = arguments.out / f"{name}.png"
        if target in written:  # another picture of the same name, from another folder
            target = arguments.out / f"{name}-{len(written) + 1}.png"
        written.add(target)
        settings = f"upsample {factor} times"
        for size in sizes:
            settings += f", upsampler {paths[size]} {sampling[size]}"
        metadata = {"source": path.name, "seed": str(arguments.seed), "unclip": settings}
        print(save_png(drawn[0], target, **metadata))


def factor_for(path: Path, side: int, size: int) -> int:
    """How many times as large a picture must be drawn to have `size` pixels at its longer side.

    Args:
        path: the picture, for messages.
        side: pixels of its longer side.
        size: pixels of the longer side that are wanted.

    Raises:
        UserError: it is that large already, or would have to be more than 16 times as large.
    """
    if size <= side:
        raise UserError(
            f"{path} has {side} pixels at its longer side already, and --size is {size}: ask for "
            "more, or leave the picture out."
        )
    if size > 16 * side:
        raise UserError(
            f"{path} has {side} pixels at its longer side, and --size {size} is more than 16 times "
            f"as many: ask for at most {16 * side}."
        )
    return 4 if size <= 4 * side else 16
