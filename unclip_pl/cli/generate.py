"""`unclip generate`: pictures from captions."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from unclip_pl.cli.options import DeviceOptions, OutputOptions, UpsamplerOptions, read_file
from unclip_pl.cli.pictures import GRID_PIXELS, load_square, require_files
from unclip_pl.cli.progress import DrawingBar
from unclip_pl.pipeline.locate import require_weights
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count, GuidedSamplingOptions, PriorSamplingOptions, Seed
from unclip_pl.utils.text import repair_text

NAME_BYTES = 150
"""Bytes of a prompt in the name of a file, which has 255 at most."""
STRENGTH = 0.7


def generate(
    prompts: Sequence[str] = (),
    *,
    file: Path | None = None,
    condition: Literal["prior", "text", "caption"] = "prior",
    prior: str | None = None,
    prior_sampling: PriorSamplingOptions,
    num_images: Count = 4,
    decoder: str | None = None,
    sampling: GuidedSamplingOptions,
    seed: Seed = 0,
    output: OutputOptions,
    init: Path | None = None,
    strength: float | None = None,
    upsamplers: UpsamplerOptions,
    compute: DeviceOptions,
    batch_size: Count = 16,
    grid: bool = False,
) -> None:
    """Draw pictures from captions.

    A prior makes a CLIP image embedding of each, the decoder draws it.

    Args:
        prompts: captions
        file: a UTF-8 text file with one more prompt per line
        condition: what the decoder gets as its image embedding: the prior's, CLIP's text
            embedding, or none
        prior: "diffusion" (the default) or "ar", those in the package; or a checkpoint or release
        num_images: pictures of each prompt
        decoder: a checkpoint or release; by default the one in the package
        seed: picture k of each prompt uses seed + k
        init: a picture to start from, of any size (its centre square is taken)
        strength: how much of --init is drawn again, 0 (it stays) to 1 (nothing of it stays); by
            default 0.7
        batch_size: pictures drawn at a time
        grid: also write grid.png, a row for each prompt, at most 2048 pixels wide
        prior_sampling: how the prior samples
        sampling: how the decoder samples
        upsamplers: how large the pictures become
        compute: where and how the networks run
        output: where the pictures go
    """
    captions = read_prompts(prompts, file)
    out = output.open()
    check_conditions(condition, prior, prior_sampling)
    check_start(init, strength)
    strength = STRENGTH if strength is None else strength
    prior = (prior or "diffusion") if condition == "prior" else None
    prior_sampling.require_prior(prior)
    require_weights(decoder, prior, upsamplers.paths)
    placement = compute.kwargs()
    import torch

    from unclip_pl.manipulate import count_last_steps
    from unclip_pl.pipeline.unclip import UnCLIP
    from unclip_pl.utils import images

    unclip = UnCLIP.load(decoder or "openmoji", prior, upsamplers=upsamplers.paths, **placement)
    decoding = sampling.of(unclip.decoder)
    upsampling = upsamplers.sampling(unclip.cascade)
    drawing_prior = prior_sampling.of(unclip.prior) if unclip.prior else None
    warn_of_cut_prompts(unclip, captions)

    decode, start = None, ""
    if init is not None:
        decode = decode_from_picture(unclip, init, strength)
        start = f"start {init.name} at strength {strength}, "
    settings = (
        f"generate, {start}condition {condition}, prior {prior} {drawing_prior}, "
        f"decoder {decoder or 'of the package'} {decoding}"
    )
    for path, stage_sampling in zip(upsamplers.paths, upsampling.values()):
        settings += f", upsampler {path} {stage_sampling}"

    names = file_names(captions)
    seeds = range(seed, seed + num_images)
    samples = [(prompt, number) for prompt in captions for number in seeds]
    cell = max(unclip.sizes[0], GRID_PIXELS // num_images)  # more is not shown
    cells: list[torch.Tensor] = []
    batches = [samples[k : k + batch_size] for k in range(0, len(samples), batch_size)]

    steps = unclip.decoder.count_steps(decoding)
    steps = steps if init is None else count_last_steps(steps, strength)
    steps += unclip.prior.count_steps(drawing_prior) if unclip.prior else 0
    larger = [count_upsampling(unclip, len(batch), upsampling) for batch in batches]
    with DrawingBar(len(batches) * steps + sum(larger), len(samples)) as bar:
        for batch in batches:
            drawn = unclip.generate(
                [prompt for prompt, _ in batch],
                [number for _, number in batch],
                condition,
                size=unclip.sizes[-1],
                prior_sampling=drawing_prior,
                sampling=decoding,
                upsampling=upsampling,
                decode=decode,
                callback=bar.report,
            )
            for (prompt, number), image in zip(batch, drawn.cpu(), strict=True):
                name = f"{names[prompt]}-{number}.png"
                metadata = {"prompt": prompt, "seed": str(number), "unclip": settings}
                bar.add(out.write_picture(name, image, **metadata))
                if grid:
                    cells.append(images.shrink(image[None], cell))
    if grid:
        rows = list(torch.cat(cells).split(num_images))
        metadata = {"prompt": "; ".join(captions), "seed": str(seed), "unclip": settings}
        figure = images.grid(rows, captions, max_width=GRID_PIXELS)
        print(out.write_picture("grid.png", figure, **metadata))


def count_upsampling(unclip: Any, count: int, upsampling: Mapping[int, Any]) -> int:
    """How many steps the upsamplers take for `count` pictures; 0 without upsamplers."""
    first, last = unclip.sizes[0], unclip.sizes[-1]
    if first == last:
        return 0
    return unclip.cascade.count_steps(count, (first, first), last // first, upsampling)


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


def check_conditions(
    condition: str, prior: str | None, prior_sampling: PriorSamplingOptions
) -> None:
    """Raise a UserError if an option is for a prior, and none is used."""
    used = [*(["--prior"] if prior is not None else []), *prior_sampling.given()]
    if used and condition != "prior":
        raise UserError(
            f"{used[0]} is given, and --condition {condition} uses no prior: leave one of them out."
        )


def check_start(init: Path | None, strength: float | None) -> None:
    """Raise a UserError if a picture to start from is not there, or its strength is impossible."""
    if strength is not None and init is None:
        raise UserError(
            "--strength is for --init: name a picture to start from, or leave --strength out."
        )
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(
            f"--strength is {strength}: give 0 (the picture itself) to 1 (nothing of it)."
        )
    require_files([init] if init else [])


def warn_of_cut_prompts(unclip: Any, prompts: Sequence[str]) -> None:
    """A line on stderr for each prompt that is longer than the model reads."""
    from unclip_pl.pipeline.compatibility import cut_note

    for prompt in prompts:
        if note := cut_note(unclip.decoder, unclip.clip, prompt):
            print(f"unclip: {note}", file=sys.stderr)


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
