"""`unclip upsample`: pictures of one's own, drawn larger by the upsamplers."""

import argparse
import sys
from pathlib import Path

from unclip_pl.cli.options import Command, placement, upsampling
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import override_sampling, seed


def add(command: Command) -> None:
    """The command."""
    upsample = command(
        "upsample",
        run_upsample,
        "Draw pictures larger, whole and in their own shape: 4 times by one upsampler, 16 times by both.",
    )
    upsample.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="picture files of any size; transparency becomes white",
    )
    how = upsample.add_mutually_exclusive_group()
    how.add_argument(
        "--times",
        type=int,
        choices=[4, 16],
        help="4 (the default): by the upsampler made for the nearest size, 64 or 256 pixels",
    )
    how.add_argument(
        "--size",
        type=int,
        help="pixels of the longer side instead: drawn 4 or 16 times as large, then shrink to this",
    )
    upsampling(upsample, "--steps")
    upsample.add_argument("--seed", type=seed, default=0, help="the same for every picture")
    upsample.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    upsample.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        help="folder for the PNG files, IMAGE-WIDTHxHEIGHT.png",
    )


def times_for(path: Path, longer: int, size: int) -> int:
    """How many times as large a picture must be drawn to have `size` pixels at its longer side; one sentence where it cannot be."""
    if size <= longer:
        raise UserError(
            f"{path} has {longer} pixels at its longer side already, and --size is {size}: ask for more, or leave the picture out."
        )
    if size > 16 * longer:
        raise UserError(
            f"{path} has {longer} pixels at its longer side, and --size {size} is more than 16 times as many: ask for at most {16 * longer}."
        )
    return 4 if size <= 4 * longer else 16


def run_upsample(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from unclip_pl.pipeline.cascade import Cascade
    from unclip_pl.pipeline.weights import load_upsamplers
    from unclip_pl.utils.images import load_image, save_png, shrink

    pictures = [load_image(path)[None] for path in arguments.images]
    sides = [max(picture.shape[-2:]) for picture in pictures]
    times = [
        arguments.times or 4 if arguments.size is None else times_for(path, side, arguments.size)
        for path, side in zip(arguments.images, sides)
    ]
    where = placement(arguments)
    paths = [arguments.upsampler_256 or "256", arguments.upsampler_1024 or "1024"]
    cascade = Cascade(load_upsamplers(paths), **where)
    by_size = {
        size: override_sampling(stage, vars(arguments))
        for size, stage in zip(cascade.sizes, cascade.stages)
    }
    names = dict(zip(cascade.sizes, paths))
    arguments.out.mkdir(parents=True, exist_ok=True)
    written: set[Path] = set()
    for path, picture, side, factor in zip(arguments.images, pictures, sides, times):
        stages = cascade.route(side, factor)
        route = [stage.net_config.image_size for stage in stages]
        total = sum(stage.count_steps(by_size[size]) for stage, size in zip(stages, route))
        with tqdm(desc=path.name, total=total, unit="step", file=sys.stderr) as bar:

            def told(stage: str, step: int, steps: int, bar: tqdm = bar) -> None:
                bar.set_postfix_str(f"{stage} step {step}/{steps}")
                bar.update(1)

            drawn = cascade.upsample(picture, [arguments.seed], factor, by_size, told).cpu()
        drawn = drawn if arguments.size is None else shrink(drawn, arguments.size)
        name = f"{path.stem}-{drawn.shape[-1]}x{drawn.shape[-2]}"
        target = arguments.out / f"{name}.png"
        if target in written:  # another picture of the same name, from another folder
            target = arguments.out / f"{name}-{len(written) + 1}.png"
        written.add(target)
        settings = f"upsample {factor} times" + "".join(
            f", upsampler {names[size]} {by_size[size]}" for size in route
        )
        print(
            save_png(drawn[0], target, source=path.name, seed=str(arguments.seed), unclip=settings)
        )
