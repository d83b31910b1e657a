"""`unclip generate`: pictures from captions."""

import argparse
import sys
from pathlib import Path
from typing import Any

from unclip_pl.cli.options import SPACING, Command, chosen, drawing, placement, spacing, upsampling
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import mended

GRID = 2048
NAME = 150  # bytes of a prompt in the name of a file, which has 255 at most


def add(command: Command) -> None:
    """The command."""
    generate = command(
        "generate",
        run_generate,
        "Draw pictures from captions: a prior makes a CLIP image embedding of each, the decoder draws it.",
    )
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="captions")
    generate.add_argument("--file", type=Path, help="a UTF-8 text file with one more prompt a line")
    generate.add_argument(
        "--condition",
        choices=["prior", "text", "caption"],
        default="prior",
        help="what the decoder has for an image embedding: the prior's, CLIP's text embedding in its place, or none",
    )
    generate.add_argument(
        "--prior",
        help='"diffusion" (the default) or "ar", those in the package; or a checkpoint or release',
    )
    generate.add_argument(
        "--prior-guidance-scale", type=float, help="1: no guidance; by default the prior's own"
    )
    generate.add_argument(
        "--prior-steps", type=spacing, help=f"{SPACING} of a diffusion prior; by default its own"
    )
    generate.add_argument(
        "--prior-sampler",
        choices=["analytic", "ddpm", "ddim", "dpm_solver_pp"],
        help="of a diffusion prior; by default its own",
    )
    generate.add_argument(
        "--prior-temperature",
        type=float,
        help="of an autoregressive prior: divides its logits; by default its own",
    )
    generate.add_argument(
        "--prior-top-p",
        type=float,
        help="of an autoregressive prior: share of the likeliest codes drawn from; by default its own",
    )
    drawing(generate, "pictures of each prompt")
    generate.add_argument(
        "--init",
        type=Path,
        help="a picture to start from, of any size (its centre square is taken)",
    )
    generate.add_argument(
        "--strength",
        type=float,
        help="how much of --init is drawn anew, 0 (it stays) to 1 (nothing of it stays); by default 0.7",
    )
    generate.add_argument(
        "--size",
        type=int,
        choices=[64, 256, 1024],
        default=64,
        help="pixels a side; upsamplers draw the decoder's 64 larger",
    )
    upsampling(generate, "--upsampler-steps")
    generate.add_argument("--batch-size", type=int, default=16, help="pictures drawn at a time")
    generate.add_argument(
        "--grid",
        action="store_true",
        help=f"also write grid.png, a row for each prompt, at most {GRID} pixels of pictures wide",
    )


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """The prompts as arguments and of the file, without empty lines; one sentence where there is none, or an empty one."""
    prompts = [mended(prompt).strip() for prompt in arguments.prompts]
    if any(not prompt for prompt in prompts):
        raise UserError("A prompt is empty: write what the picture should show.")
    if arguments.file:
        try:
            lines = mended(arguments.file.read_text(encoding="utf-8-sig")).splitlines()
        except OSError as error:
            raise UserError(
                f"The file of prompts {arguments.file} cannot be read ({error.strerror}): check --file."
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"The file of prompts {arguments.file} is not UTF-8 (byte {error.start}): save it as UTF-8."
            ) from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("There is no prompt: write one, or name a file with one a line (--file).")
    return list(dict.fromkeys(prompts))  # each once


def from_picture(unclip: Any, arguments: argparse.Namespace) -> Any:
    """What draws in the place of `unclip.decode`: from the picture --init, at --strength."""
    from unclip_pl.cli.session import square
    from unclip_pl.manipulate import image_to_image

    image = square(arguments.init, unclip.decoder.net_config.image_size)
    arguments.strength = 0.7 if arguments.strength is None else arguments.strength

    def decode(embed: Any, seeds: Any, *rest: Any) -> Any:
        return image_to_image(
            unclip,
            embed,
            seeds,
            *rest,
            images=image.expand(len(seeds), -1, -1, -1),
            strength=arguments.strength,
        )

    return decode


def upsamplers_of(arguments: argparse.Namespace) -> list[str | Path]:
    """What `UnCLIP.load` takes for the upsamplers that `--size` needs; one sentence where an option is of one that it does not."""
    options = {"256": arguments.upsampler_256, "1024": arguments.upsampler_1024}
    needed = [name for name in options if arguments.size >= int(name)]
    of_others = {f"upsampler-{name}": path for name, path in options.items() if name not in needed}
    of_all = {} if needed else {"upsampler-steps": arguments.upsampler_steps}
    if idle := [name for name, value in (of_others | of_all).items() if value is not None]:
        raise UserError(
            f"--{idle[0]} is given, and pictures of {arguments.size} pixels need no such upsampler: leave it out, or ask for a larger --size."
        )
    return [options[name] or name for name in needed]


def run_generate(arguments: argparse.Namespace) -> None:
    import re

    import torch
    from tqdm import tqdm

    from unclip_pl.pipeline.unclip import DEFAULT_DECODER, UnCLIP
    from unclip_pl.utils.images import grid, reduced, save_png

    prompts = prompts_of(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("num_images", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give 1 or more."
            )
    of_prior = (
        "prior",
        "prior_guidance_scale",
        "prior_steps",
        "prior_sampler",
        "prior_temperature",
        "prior_top_p",
    )
    priors = [name for name in of_prior if getattr(arguments, name) is not None]
    if priors and arguments.condition != "prior":
        raise UserError(
            f"--{priors[0].replace('_', '-')} is given, and --condition {arguments.condition} uses no prior: leave one of them out."
        )
    if arguments.strength is not None and arguments.init is None:
        raise UserError(
            "--strength is for --init: name a picture to start from, or leave --strength out."
        )
    prior = (arguments.prior or "diffusion") if arguments.condition == "prior" else None
    upsamplers = upsamplers_of(arguments)
    unclip = UnCLIP.load(
        arguments.decoder or DEFAULT_DECODER, prior, upsamplers=upsamplers, **placement(arguments)
    )
    decode = None if arguments.init is None else from_picture(unclip, arguments)
    sampling = chosen(arguments, unclip.decoder)
    by_size = {
        size: chosen(arguments, stage, "upsampler_")
        for size, stage in zip(unclip.cascade.sizes, unclip.cascade.stages)
    }
    prior_sampling = chosen(arguments, unclip.prior, "prior_") if unclip.prior else None
    for prompt in prompts:
        if cut := unclip.clip.truncated_text(prompt):
            print(
                f'unclip: "{prompt[:40]}..." is longer than CLIP reads ({unclip.clip.context_length} tokens), cut: "{cut}"',
                file=sys.stderr,
            )
    todo = [(prompt, arguments.seed + k) for prompt in prompts for k in range(arguments.num_images)]
    start = (
        f"start {arguments.init.name} at strength {arguments.strength}, " if arguments.init else ""
    )
    settings = f"generate, {start}condition {arguments.condition}, prior {prior} {prior_sampling}, decoder {arguments.decoder or 'of the package'} {sampling}"
    settings += "".join(
        f", upsampler {path} {used}" for path, used in zip(upsamplers, by_size.values())
    )
    names: dict[str, str] = {}
    for prompt in prompts:
        name = (
            re.sub(r"\W+", "-", prompt).strip("-")[:60].encode()[:NAME].decode(errors="ignore")
            or "picture"
        )
        names[prompt] = name if name not in names.values() else f"{name}-{len(names) + 1}"
    drawn: list[torch.Tensor] = []
    with tqdm(total=len(todo), unit="picture", file=sys.stderr) as bar:
        for first in range(0, len(todo), arguments.batch_size):
            captions, seeds = zip(*todo[first : first + arguments.batch_size], strict=True)
            images = unclip.generate(
                captions,
                seeds,
                arguments.condition,
                size=unclip.sizes[-1],
                prior_sampling=prior_sampling,
                sampling=sampling,
                upsampling=by_size,
                decode=decode,
                callback=lambda stage, step, steps: bar.set_postfix_str(
                    f"{stage} step {step}/{steps}"
                ),
            )
            for prompt, seed, image in zip(captions, seeds, images.cpu(), strict=True):
                path = save_png(
                    image,
                    arguments.out / f"{names[prompt]}-{seed}.png",
                    prompt=prompt,
                    seed=str(seed),
                    unclip=settings,
                )
                bar.write(str(path), file=sys.stdout)
                if arguments.grid:
                    drawn.append(
                        reduced(image[None], max(unclip.sizes[0], GRID // arguments.num_images))
                    )
            bar.update(len(images))
    if arguments.grid:
        rows = list(torch.cat(drawn).split(arguments.num_images))
        print(
            save_png(
                grid(rows, prompts),
                arguments.out / "grid.png",
                prompt="; ".join(prompts),
                seed=str(arguments.seed),
                unclip=settings,
            )
        )
