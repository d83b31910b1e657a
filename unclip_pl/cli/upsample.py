"""`unclip upsample`: pictures of one's own, drawn larger by the upsamplers."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from unclip_pl.cli.options import DeviceOptions, OutputOptions
from unclip_pl.cli.pictures import require_files
from unclip_pl.pipeline.locate import require_weights
from unclip_pl.utils.commands import UsageError
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Seed, Spacing, check_sampling, override_sampling


def upsample(
    images: Sequence[Path],
    *,
    times: Literal[4, 16] | None = None,
    size: int | None = None,
    upsampler_256: str | None = None,
    upsampler_1024: str | None = None,
    steps: Spacing | None = None,
    compute: DeviceOptions,
    seed: Seed = 0,
    output: OutputOptions,
) -> None:
    """Draw pictures larger, whole and in their own shape.

    4 times as large by one upsampler, 16 times by both.

    Args:
        images: picture files of any size; transparency becomes white
        times: 4 (the default): by the upsampler made for the nearest size, 64 or 256 pixels
        size: pixels of the longer side instead of --times: drawn 4 or 16 times as large, then
            shrunk to this
        upsampler_256: a checkpoint or release of the upsampler 64 to 256; by default the one in
            the package
        upsampler_1024: a checkpoint or release of the upsampler 256 to 1024; by default the one in
            the package
        steps: sampling steps: a number, 10,10,3,2,2 (numbers for equal sections), fast27 or
            ddim25; of each upsampler, by default its own
        seed: the same for every picture
        out: folder for the PNG files, IMAGE-WIDTHxHEIGHT.png; what lies there already is kept, and
            new pictures of the same name get a number
        compute: where and how the networks run
        output: where the pictures go
    """
    if times is not None and size is not None:
        raise UsageError("--times and --size both say how large: give one of them.")
    check_sampling({"steps": steps})
    require_files(images)
    out = output.open()
    paths = {256: upsampler_256 or "256", 1024: upsampler_1024 or "1024"}
    require_weights(upsamplers=[*paths.values()])
    placement = compute.kwargs()
    from tqdm import tqdm

    from unclip_pl.utils.images import load_image, shrink

    pictures = [load_image(path)[None] for path in images]
    factors: list[int] = []
    for path, image in zip(images, pictures):
        if size is None:
            factors.append(times or 4)
        else:
            factors.append(factor_for(path, max(image.shape[-2:]), size))
    from unclip_pl.pipeline.cascade import Cascade
    from unclip_pl.pipeline.weights import load_upsamplers

    cascade = Cascade(load_upsamplers(list(paths.values())), **placement)
    sampling = {
        side: override_sampling(stage, {"steps": steps})
        for side, stage in zip(cascade.sizes, cascade.stages)
    }
    for image, factor in zip(pictures, factors):
        height, width = image.shape[-2:]
        cascade.require_memory(1, (height, width), factor)
    for path, image, factor in zip(images, pictures, factors):
        height, width = image.shape[-2:]
        total = cascade.count_steps(1, (height, width), factor, sampling)
        with tqdm(desc=path.name, total=total, unit="step", file=sys.stderr) as bar:

            def report(stage: str, step: int, steps: int, bar: tqdm = bar) -> None:
                bar.set_postfix_str(f"{stage} step {step}/{steps}")
                bar.update(1)

            drawn = cascade.upsample(image, [seed], factor, sampling, report).cpu()
        if size is not None:
            drawn = shrink(drawn, size)
        name = f"{path.stem}-{drawn.shape[-1]}x{drawn.shape[-2]}.png"
        settings = f"upsample {factor} times"
        for stage in cascade.route(max(height, width), factor):
            side = stage.net_config.image_size
            settings += f", upsampler {paths[side]} {sampling[side]}"
        metadata = {"source": path.name, "seed": str(seed), "unclip": settings}
        print(out.write_picture(name, drawn[0], **metadata))


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
