"""`unclip invert | vary | interpolate | edit | inpaint`: what unCLIP section 3 does with pictures; the functions stand in `unclip_pl/manipulate.py`."""

import argparse
import csv
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from unclip_pl.cli.options import Command
from unclip_pl.cli.session import Studio, at_least, check_files, enlarged, numbers, options
from unclip_pl.utils.errors import UserError

PICTURE = (
    "a picture of any size (its centre square is taken), or a latent that `unclip invert` wrote"
)


def add(command: Command) -> None:
    """The five commands."""
    invert = command(
        "invert",
        run_invert,
        "Take pictures apart into z_i and x_T, save these latents, and show how well they draw the pictures again.",
    )
    invert.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="pictures of any size (the centre square is taken)",
    )
    options(invert)

    vary = command(
        "vary",
        run_vary,
        "Draw variations of pictures: around the picture itself (--eta), or of all that CLIP sees the same in.",
    )
    vary.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=PICTURE)
    vary.add_argument(
        "--eta",
        type=float,
        nargs="+",
        help="noise of DDIM, 0 (the picture again) to 1: a row of the figure for each",
    )
    vary.add_argument(
        "--noise",
        choices=["inverted", "fresh"],
        help="start from the inverted picture or from fresh noise; by default inverted with --eta",
    )
    vary.add_argument(
        "--num-images",
        type=int,
        default=4,
        help="variations of each picture (and each eta); picture k uses seed + k",
    )
    vary.add_argument(
        "--caption", help="a caption to draw with; without it the picture alone decides"
    )
    options(vary)

    interpolate = command(
        "interpolate", run_interpolate, "Draw the way from one picture to another."
    )
    interpolate.add_argument("a", type=Path, metavar="A", help=PICTURE)
    interpolate.add_argument("b", type=Path, metavar="B", help=PICTURE)
    interpolate.add_argument(
        "--steps", type=int, default=8, help="pictures on the way, both ends included"
    )
    interpolate.add_argument(
        "--noise",
        choices=["inverted", "fresh"],
        default="inverted",
        help="x_T between those of A and B, so that the ends are A and B; or one noise for all, of a seed",
    )
    interpolate.add_argument(
        "--num-images",
        type=int,
        help="ways with fresh noise, a row each: way k uses seed + k; by default 1",
    )
    options(interpolate, "--sampling-steps")

    edit = command("edit", run_edit, "Change a picture as the difference of two captions says.")
    edit.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help=PICTURE)
    edit.add_argument(
        "--from", dest="source", default="a photo", help='what the picture is; "" leaves it out'
    )
    edit.add_argument("--to", dest="target", help="what it shall be")
    edit.add_argument(
        "--theta",
        type=numbers,
        nargs="+",
        default=["0..0.5"],
        help="how far to go, 0 to 1: numbers, or a range for five of them",
    )
    edit.add_argument(
        "--file",
        type=Path,
        help="a UTF-8 file of edits, one a line: picture, from, to, with tabs between; pictures beside the file",
    )
    options(edit)

    inpaint = command("inpaint", run_inpaint, "Draw a part of a picture anew and keep the rest.")
    inpaint.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help="a picture of any size (its centre square is taken)",
    )
    inpaint.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="what the whole picture shall show; without it, what CLIP sees in it now",
    )
    inpaint.add_argument(
        "--mask", type=Path, required=True, help="a picture of the same size, white where to draw"
    )
    inpaint.add_argument(
        "--prior",
        help='for PROMPT: "diffusion" (the default) or "ar", those in the package; or a checkpoint or release',
    )
    inpaint.add_argument("--num-images", type=int, default=4, help="picture k uses seed + k")
    options(inpaint)


def label(path: Path) -> str:
    """How a picture is called in a figure."""
    return path.stem


def run_invert(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import reconstruct
    from unclip_pl.utils.images import psnr

    check_files(arguments.images)
    studio = Studio(arguments)
    rows = []
    for path in arguments.images:
        if path.suffix == ".safetensors":
            raise UserError(f"{path} is a latent already: give a picture.")
        original, latent = studio.latent(path)
        latent.save(file := studio.out / f"{path.stem}.safetensors", studio.unclip)
        print(file)
        with studio.progress(f"draw {path.name} again") as callback:
            again = reconstruct(studio.unclip, latent, callback).cpu()
        print(
            f"{path.name}: drawn again at {float(psnr(again, original)):.1f} dB PSNR ({latent.steps} steps)"
        )
        finished = studio.finish(again, [arguments.seed])
        studio.save(
            finished,
            [f"{path.stem}-again"],
            source=path.name,
            unclip=f"invert, {latent.steps} steps",
        )
        rows.append(
            torch.cat(
                [enlarged(original, finished), finished, enlarged(latent.x_T.cpu(), finished)]
            )
        )
    studio.figure(
        "inversions",
        rows,
        [label(path) for path in arguments.images],
        ["original", "drawn again", "x_T"],
    )


def run_vary(arguments: argparse.Namespace) -> None:
    from unclip_pl.manipulate import decode

    at_least(arguments, num_images=1)
    inverted = (arguments.noise or ("inverted" if arguments.eta else "fresh")) == "inverted"
    etas = arguments.eta or ([0.0] if inverted else [None])
    if outside := [eta for eta in etas if eta is not None and not 0 <= eta <= 1]:
        raise UserError(
            f"--eta is {outside[0]}: give 0 (no noise on the way) to 1 (as much as DDPM)."
        )
    check_files(arguments.images)
    studio = Studio(arguments)
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    captions = [arguments.caption] * len(seeds) if arguments.caption else None
    rows, labels = [], []
    for path in arguments.images:
        original, source = studio.latent(path) if inverted else studio.embed(path)
        source = source[[0] * len(seeds)] if inverted else source.expand(len(seeds), -1)
        rows.append(original)
        labels.append(label(path))
        for eta in etas:
            sampling = studio.following(source, eta) if inverted else studio.sampling(eta)
            with studio.progress(
                path.name if eta is None else f"{path.name}, eta {eta:g}"
            ) as callback:
                if inverted:
                    drawn = decode(studio.unclip, source, seeds, captions, sampling, callback)
                else:
                    drawn = studio.unclip.decode(source, seeds, captions, sampling, callback)
            drawn = studio.finish(drawn, seeds)
            middle = f"-eta{eta:g}" if len(etas) > 1 else ""
            text = f"vary, {'inverted' if inverted else 'fresh'} noise, {sampling}, caption {arguments.caption!r}"
            for seed, image in zip(seeds, drawn):
                studio.save(
                    [image],
                    [f"{path.stem}{middle}-{seed}"],
                    source=path.name,
                    seed=str(seed),
                    unclip=text,
                )
            rows.append(drawn)
            labels.append("variations" if eta is None else f"eta {eta:g}")
    studio.figure("variations", rows, labels)


def run_interpolate(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import Latent, interpolate

    at_least(arguments, steps=2)
    fresh = arguments.noise == "fresh"
    if arguments.num_images is not None:
        at_least(arguments, num_images=1)
        if not fresh:
            raise UserError(
                "--num-images is for --noise fresh: with inverted noise there is one way from A to B."
            )
    check_files([arguments.a, arguments.b])
    studio = Studio(arguments)
    ends = []
    for path in (arguments.a, arguments.b):
        if fresh:
            original, embed = studio.embed(path)
            ends.append((original, Latent(embed, torch.zeros(1, *studio.unclip.decoder.shape), 0)))
        else:
            ends.append(studio.latent(path))
    (first, a), (last, b) = ends
    sampling = studio.sampling() if fresh else studio.following(a)
    theta = torch.linspace(0, 1, arguments.steps)
    many = [0] * arguments.steps
    rows, labels = [], []
    for seed in [arguments.seed + k for k in range(arguments.num_images or 1)]:
        with studio.progress(f"{arguments.a.name} to {arguments.b.name}") as callback:
            drawn = interpolate(
                studio.unclip, a[many], b[many], theta, seed if fresh else None, sampling, callback
            )
        drawn = studio.finish(drawn, [seed] * arguments.steps)
        text = f"interpolate, {arguments.noise} noise, {sampling}"
        names = [
            f"{arguments.a.stem}-{arguments.b.stem}-{seed}-{k}" for k in range(arguments.steps)
        ]
        studio.save(
            drawn,
            names,
            source=f"{arguments.a.name} to {arguments.b.name}",
            seed=str(seed),
            unclip=text,
        )
        rows.append(torch.cat([enlarged(first, drawn), drawn, enlarged(last, drawn)]))
        labels.append(f"seed {seed}" if fresh else "inverted x_T")
    studio.figure(
        "interpolation", rows, labels, ["A", *(f"{value:.2f}" for value in theta.tolist()), "B"]
    )


class Edit(NamedTuple):
    """One line of work: what picture, and from what to what."""

    path: Path
    source: str
    target: str


def edits_of(arguments: argparse.Namespace) -> list[Edit]:
    """The edits of the options and of the file; one sentence where one of them is incomplete or goes nowhere."""
    if arguments.images and arguments.target is None:
        raise UserError("There is no --to: say what the picture shall be.")
    edits = [Edit(path, arguments.source, arguments.target) for path in arguments.images]
    if arguments.file:
        try:
            lines = list(
                csv.reader(
                    arguments.file.read_text(encoding="utf-8-sig").splitlines(),
                    delimiter="\t",
                    quoting=csv.QUOTE_NONE,
                )
            )
        except OSError as error:
            raise UserError(
                f"The file of edits {arguments.file} cannot be read ({error.strerror}): check --file."
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"The file of edits {arguments.file} is not UTF-8 (byte {error.start}): save it as UTF-8."
            ) from None
        for number, line in enumerate(lines, start=1):
            if line and len(line) != 3:
                raise UserError(
                    f"Line {number} of {arguments.file} has {len(line)} parts: write picture, from and to with tabs between."
                )
            if line:
                edits.append(
                    Edit(arguments.file.parent / line[0].strip(), line[1].strip(), line[2].strip())
                )
    if not edits:
        raise UserError(
            "There is no picture to edit: name one with --from and --to, or a file with one edit a line (--file)."
        )
    for edit in edits:
        if not edit.target.strip():
            raise UserError(
                f"The caption to go to is empty for {edit.path}: say what the picture shall be."
            )
        if edit.source.strip() == edit.target.strip():
            raise UserError(
                f'From and to are the same for {edit.path} ("{edit.target}"), which is no change: make them differ.'
            )
    return edits


def run_edit(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import check_theta, text_diff

    edits = edits_of(arguments)
    check_files([edit.path for edit in edits])
    given = [
        value
        for part in arguments.theta
        for value in (numbers(part) if isinstance(part, str) else part)
    ]
    theta = torch.tensor(given)
    check_theta(theta)
    studio = Studio(arguments)
    latents = {path: studio.latent(path) for path in dict.fromkeys(edit.path for edit in edits)}
    rows, labels = [], []
    for number, edit in enumerate(edits):
        original, latent = latents[edit.path]
        sampling = studio.following(latent)
        count = len(given)
        with studio.progress(f"{edit.path.name}: {edit.target}") as callback:
            source = [edit.source] * count if edit.source.strip() else None
            drawn = text_diff(
                studio.unclip,
                latent[[0] * count],
                source,
                [edit.target] * count,
                theta,
                sampling,
                callback,
            )
        drawn = studio.finish(drawn, [arguments.seed] * count)
        name = edit.path.stem if len(edits) == 1 else f"{number:02d}-{edit.path.stem}"
        for value, image in zip(given, drawn):
            studio.save(
                [image],
                [f"{name}-theta{value:g}"],
                source=edit.path.name,
                unclip=f'edit, from "{edit.source}" to "{edit.target}", {sampling}',
            )
        rows.append(torch.cat([enlarged(original, drawn), drawn]))
        labels.append(
            f"{edit.source} > {edit.target}" if edit.source.strip() else f"> {edit.target}"
        )
    studio.figure("edits", rows, labels, ["original", *(f"theta {value:g}" for value in given)])


def run_inpaint(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import inpaint
    from unclip_pl.utils.images import load_image

    at_least(arguments, num_images=1)
    if arguments.prior and not arguments.prompt:
        raise UserError(
            "--prior is given, and without a PROMPT no prior is used: write one, or leave --prior out."
        )
    sizes = [load_image(path).shape[1:] for path in (arguments.image, arguments.mask)]
    if sizes[0] != sizes[1]:
        (h, w), (mask_h, mask_w) = sizes
        raise UserError(
            f"The mask {arguments.mask} is {mask_w} x {mask_h} pixels and the picture {w} x {h}: make it of the same size."
        )
    studio = Studio(arguments, (arguments.prior or "diffusion") if arguments.prompt else None)
    sampling, unclip = studio.sampling(), studio.unclip
    if sampling.sampler == "ddim":  # noise on the way heeds what is known better
        sampling = replace(sampling, eta=1.0)
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    original, whole = studio.picture(arguments.image)
    mask = load_image(arguments.mask, studio.size).mean(0, keepdim=True)[None] > 0
    captions = [arguments.prompt] * len(seeds) if arguments.prompt else None
    embed = (
        unclip.sample_prior(captions, seeds)
        if captions
        else unclip.embed_images(whole).expand(len(seeds), -1)
    )
    with studio.progress(arguments.image.name) as callback:
        images, masks = original.expand(len(seeds), -1, -1, -1), mask.expand(len(seeds), -1, -1, -1)
        drawn = inpaint(
            unclip, embed, seeds, captions, sampling, callback, images=images, mask=masks
        )
    drawn = studio.finish(drawn, seeds)
    text = f"inpaint, mask {arguments.mask.name}, prompt {arguments.prompt!r}, {sampling}"
    for seed, image in zip(seeds, drawn):
        studio.save(
            [image],
            [f"{arguments.image.stem}-{seed}"],
            source=arguments.image.name,
            seed=str(seed),
            unclip=text,
        )
    grey = torch.where(mask, torch.zeros(()), original)
    rows = [torch.cat([enlarged(original, drawn), enlarged(grey, drawn), drawn])]
    studio.figure(
        "inpainting",
        rows,
        [arguments.prompt or label(arguments.image)],
        ["original", "known", *(f"seed {seed}" for seed in seeds)],
    )
