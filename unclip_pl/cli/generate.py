"""`unclip generate`: pictures from captions."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unclip_pl.cli.options import (
    AddCommand,
    add_decoder_option,
    add_device_options,
    add_output_options,
    add_size_option,
    add_upsampler_options,
    device_kwargs,
    override_upsampling,
    read_file,
    require_minimum,
    upsampler_paths,
)
from unclip_pl.cli.pictures import GRID_PIXELS, load_square
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import (
    add_prior_option,
    add_prior_sampling_options,
    add_sampling_options,
    override_sampling,
)
from unclip_pl.utils.text import repair_text

NAME_BYTES = 150
"""Bytes of a prompt in the name of a file, which has 255 at most."""
STRENGTH = 0.7
PRIOR_OPTIONS = (
    "prior",
    "prior_guidance_scale",
    "prior_steps",
    "prior_sampler",
    "prior_temperature",
    "prior_top_p",
)


def add(command: AddCommand) -> None:
    parser = command(
        "generate",
        run,
        "Draw pictures from captions: a prior makes a CLIP image embedding of each, the decoder "
        "draws it.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="captions")
    parser.add_argument("--file", type=Path, help="a UTF-8 text file with one more prompt per line")
    parser.add_argument(
        "--condition",
        choices=["prior", "text", "caption"],
        default="prior",
        help="what the decoder gets as its image embedding: the prior's, CLIP's text embedding, "
        "or none",
    )
    add_prior_option(parser)
    add_prior_sampling_options(parser)
    parser.add_argument("--num-images", type=int, default=4, help="pictures of each prompt")
    add_decoder_option(parser)
    add_sampling_options(parser)
    add_output_options(parser, "picture k of each prompt uses seed + k", "folder for the PNG files")
    parser.add_argument(
        "--init",
        type=Path,
        help="a picture to start from, of any size (its centre square is taken)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="how much of --init is drawn again, 0 (it stays) to 1 (nothing of it stays); by "
        f"default {STRENGTH}",
    )
    add_size_option(parser)
    add_upsampler_options(parser, "--upsampler-steps")
    add_device_options(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures drawn at a time")
    parser.add_argument(
        "--grid",
        action="store_true",
        help=f"also write grid.png, a row for each prompt, at most {GRID_PIXELS} pixels wide",
    )


def run(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from unclip_pl.pipeline.unclip import UnCLIP
    from unclip_pl.pipeline.weights import DEFAULT_DECODER
    from unclip_pl.utils.images import grid, save_png, shrink

    prompts = read_prompts(arguments.prompts, arguments.file)
    arguments.out.mkdir(parents=True, exist_ok=True)
    require_minimum(arguments, num_images=1, batch_size=1)
    check_conditions(arguments)
    prior = (arguments.prior or "diffusion") if arguments.condition == "prior" else None
    upsamplers = upsampler_paths(arguments)
    unclip = UnCLIP.load(
        arguments.decoder or DEFAULT_DECODER,
        prior,
        upsamplers=upsamplers,
        **device_kwargs(arguments),
    )
    options = vars(arguments)
    sampling = override_sampling(unclip.decoder, options)
    upsampling = override_upsampling(unclip.cascade, arguments, "upsampler_")
    prior_sampling = None
    if unclip.prior:
        prior_sampling = override_sampling(unclip.prior, options, "prior_")
    warn_of_cut_prompts(unclip, prompts)

    decode, start = None, ""
    if arguments.init is not None:
        strength = STRENGTH if arguments.strength is None else arguments.strength
        decode = decode_from_picture(unclip, arguments.init, strength)
        start = f"start {arguments.init.name} at strength {strength}, "
    decoder = arguments.decoder or "of the package"
    settings = (
        f"generate, {start}condition {arguments.condition}, prior {prior} {prior_sampling}, "
        f"decoder {decoder} {sampling}"
    )
    for path, stage_sampling in zip(upsamplers, upsampling.values()):
        settings += f", upsampler {path} {stage_sampling}"

    names = file_names(prompts)
    seeds = range(arguments.seed, arguments.seed + arguments.num_images)
    samples = [(prompt, seed) for prompt in prompts for seed in seeds]
    cell = max(unclip.sizes[0], GRID_PIXELS // arguments.num_images)  # more is not shown
    cells: list[torch.Tensor] = []
    with tqdm(total=len(samples), unit="picture", file=sys.stderr) as bar:

        def report(stage: str, step: int, steps: int) -> None:
            bar.set_postfix_str(f"{stage} step {step}/{steps}")

        for first in range(0, len(samples), arguments.batch_size):
            batch = samples[first : first + arguments.batch_size]
            images = unclip.generate(
                [prompt for prompt, _ in batch],
                [seed for _, seed in batch],
                arguments.condition,
                size=unclip.sizes[-1],
                prior_sampling=prior_sampling,
                sampling=sampling,
                upsampling=upsampling,
                decode=decode,
                callback=report,
            )
            for (prompt, seed), image in zip(batch, images.cpu(), strict=True):
                path = arguments.out / f"{names[prompt]}-{seed}.png"
                save_png(image, path, prompt=prompt, seed=str(seed), unclip=settings)
                bar.write(str(path), file=sys.stdout)
                if arguments.grid:
                    cells.append(shrink(image[None], cell))
            bar.update(len(images))
    if arguments.grid:
        rows = list(torch.cat(cells).split(arguments.num_images))
        path = arguments.out / "grid.png"
        metadata = {"prompt": "; ".join(prompts), "seed": str(arguments.seed), "unclip": settings}
        figure = grid(rows, prompts, max_width=GRID_PIXELS)
        print(save_png(figure, path, **metadata))


def read_prompts(words: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of the file, each once, without empty lines.

    Raises:
        UserError: there is no prompt, one is empty, or the file cannot be read.
    """
    prompts = [repair_text(word).strip() for word in words]
    if not all(prompts):
        raise UserError("A prompt is empty: write what the picture should show.")
    if file:
        lines = repair_text(read_file(file, "prompts")).splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("There is no prompt: write one, or name a file with one per line (--file).")
    return list(dict.fromkeys(prompts))


def check_conditions(arguments: argparse.Namespace) -> None:
    """Raise a UserError if an option is for something that is not used."""
    used = [name for name in PRIOR_OPTIONS if getattr(arguments, name) is not None]
    if used and arguments.condition != "prior":
        raise UserError(
            f"--{used[0].replace('_', '-')} is given, and --condition {arguments.condition} uses "
            "no prior: leave one of them out."
        )
    if arguments.strength is not None and arguments.init is None:
        raise UserError(
            "--strength is for --init: name a picture to start from, or leave --strength out."
        )


def warn_of_cut_prompts(unclip: Any, prompts: Sequence[str]) -> None:
    """A line on stderr for each prompt that is longer than CLIP reads."""
    for prompt in prompts:
        if cut := unclip.clip.truncated_text(prompt):
            print(
                f'unclip: "{prompt[:40]}..." is longer than CLIP reads '
                f'({unclip.clip.context_length} tokens), cut: "{cut}"',
                file=sys.stderr,
            )


def decode_from_picture(unclip: Any, path: Path, strength: float) -> Callable[..., Any]:
    """A function in place of `unclip.decode` that starts from a picture; see `image_to_image`."""
    from unclip_pl.manipulate import image_to_image

    image = load_square(path, unclip.decoder.net_config.image_size)
    return partial(image_to_image, unclip, images=image, strength=strength)


def file_names(prompts: Sequence[str]) -> dict[str, str]:
    """A file's name for each prompt, without ending; prompts that look alike get a number."""
    names: dict[str, str] = {}
    for prompt in prompts:
        words = re.sub(r"\W+", "-", prompt).strip("-")[:60]
        name = words.encode()[:NAME_BYTES].decode(errors="ignore") or "picture"
        names[prompt] = name if name not in names.values() else f"{name}-{len(names) + 1}"
    return names
