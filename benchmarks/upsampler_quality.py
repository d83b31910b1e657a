"""How near an upsampler comes to held-out images, next to bicubic enlargement.

It enlarges whole images from their antialiased reduction (not degraded), with its own sampler.

    python benchmarks/upsampler_quality.py 256          that of the package, 64 held-out drawings
    python benchmarks/upsampler_quality.py 1024 --count 12 --picture upsampler.png
    python benchmarks/upsampler_quality.py 256 --weights FOLDER_OR_CKPT --val data/99.tar

It prints a Markdown table: mean PSNR in dB; sharpness, the root mean square difference of
neighbouring pixels as a share of the original's; grain, the median distance from white where the
original is white, in levels of 255; drift, how far the mean colour of the output is from that of
its low-resolution condition, the largest of red, green and blue in levels of 255 (mean and worst
image).
"""

import argparse
import itertools
import time
from dataclasses import replace

from _common import results_option

import torch
import torch.nn.functional as F
from _results import save_rows
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip_pl.data.degradation import DegradationConfig
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.datamodules.upsampler import UpsamplerData
from unclip_pl.diffusion.noise import Noise
from unclip_pl.pipeline.locate import ASSETS
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024
from unclip_pl.utils.images import grid, psnr, save_png

KINDS = {256: Upsampler256, 1024: Upsampler1024}
SHOWN = 4  # drawings in the picture
WHITE = 0.99
LEVELS = 127.5  # of 255, per unit of [-1, 1]


def steepness(images: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels: (B, C, H, W) -> (B,)."""
    squares = (images.diff(dim=dim).square().flatten(1).mean(1) for dim in (-1, -2))
    return sum(squares).sqrt()


def drift(images: Tensor, low_res: Tensor) -> Tensor:
    """Largest difference of the mean colours, in levels of 255: (B,)."""
    return (images.mean((2, 3)) - low_res.mean((2, 3))).abs().amax(1) * LEVELS


def grain(images: Tensor, original: Tensor) -> Tensor:
    """Median distance from white where the original is white, in levels of 255.

    A number; NaN where nothing is white, which the means leave out.
    """
    return (1 - images).abs().mean(1)[original.amin(1) > WHITE].median() * LEVELS


def closest(rows: dict[str, Tensor], side: int = 128) -> Image.Image:
    """A labelled picture of the part of each image where the last row has the most edges.

    The part has `side` x `side` pixels and is enlarged to at most 256.
    """
    target = list(rows.values())[-1]
    corners = []
    for image in target:
        edges = (image[:, 1:, 1:] - image[:, :-1, :-1]).abs().mean(0, keepdim=True)
        edges = F.avg_pool2d(edges, side, stride=16)[0]
        top, left = divmod(int(edges.argmax()), edges.shape[1])
        corners.append((16 * top, 16 * left))

    def cut(row: Tensor) -> Tensor:
        places = zip(row, corners)
        parts = [x[:, top : top + side, left : left + side] for x, (top, left) in places]
        return F.interpolate(torch.stack(parts), scale_factor=256 // side, mode="nearest")

    return grid([cut(row) for row in rows.values()], list(rows))


def draw_examples(rows: list[tuple[Tensor, ...]], size: int, path: str) -> None:
    """Write a picture of (bicubic, drawn, original) images."""
    bicubic, drawn, original = (torch.cat(row).cpu() for row in zip(*rows))
    shown = {
        f"bicubic, {psnr(bicubic, original).mean():.1f} dB": bicubic,
        f"drawn, {psnr(drawn, original).mean():.1f} dB": drawn,
        "original": original,
    }
    save_png(closest(shown, 128 if size < 512 else 216), path)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", type=int, choices=list(KINDS))
    parser.add_argument("--weights", help="a release or checkpoint; default: that of the package")
    parser.add_argument("--val", default=["openmoji"], nargs="+")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--start", type=int, default=0, help="skip this many images")
    parser.add_argument(
        "--degradation", choices=["none", "blur", "bsr"], default="none",
        help="degrade the conditions",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="of sampling; default: the upsampler's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", help="write a picture of the first ones here")
    results_option(parser)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Enlarge the chosen images, print the mean figures as a Markdown table and save the rows."""
    arguments = parse_arguments()
    weights = arguments.weights or ASSETS / f"upsampler-{arguments.size}-openmoji"
    stage = load_stage(weights, KINDS[arguments.size]).to(arguments.device)
    if arguments.steps:
        stage.sampling = replace(stage.sampling, steps=arguments.steps)
    val = arguments.val[0] if len(arguments.val) == 1 else arguments.val
    data = UpsamplerData(
        val,
        val,
        arguments.size,
        val_crop=arguments.size,
        degradation=DegradationConfig(arguments.degradation),
        loader=LoaderConfig(batch_size=1, num_workers=0),
    )
    data.prepare_data()
    data.setup("validate")
    columns: dict[str, list[float]] = {}
    images, rows, start = 0, [], time.perf_counter()
    chosen = itertools.islice(
        data.val_dataloader(), arguments.start, arguments.start + arguments.count
    )
    bar = tqdm(chosen, unit="image", total=arguments.count)
    for loaded in bar:
        batch = data.on_before_batch_transfer(loaded, 0)
        low_res, image = batch["low_res"].to(arguments.device), batch["image"].to(arguments.device)
        bicubic = stage.enlarged(low_res).clamp(-1, 1)
        drawn = stage.sample({"low_res": low_res}, Noise([arguments.start + images]))
        for name, output in {"bicubic": bicubic, "drawn": drawn}.items():
            values = {
                "psnr": psnr(output, image),
                "sharpness": steepness(output) / steepness(image),
                "grain": grain(output, image),
                "drift": drift(output, low_res),
            }
            for column, value in values.items():
                columns.setdefault(f"{name} {column}", []).append(value.item())
        images += 1
        means = {name: torch.tensor(each).nanmean().item() for name, each in columns.items()}
        bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
        if images <= SHOWN:
            rows.append((bicubic, drawn, image))
        if arguments.picture and images == min(SHOWN, arguments.count):
            draw_examples(rows, arguments.size, arguments.picture)
    seconds, sampling = (time.perf_counter() - start) / images, stage.sampling
    how = f"{sampling.sampler} with {sampling.steps} steps, {seconds:.1f} s per image"
    print(f"{images} held-out images at {arguments.size}, {how}\n")
    print("| | PSNR | sharpness | grain | drift, mean | drift, worst |\n|---|---|---|---|---|---|")
    for name in ("bicubic", "drawn"):
        mean = [means[f"{name} {column}"] for column in ("psnr", "sharpness", "grain", "drift")]
        cells = (f"{value:.3f}" for value in (*mean, max(columns[f"{name} drift"])))
        print(f"| {name} | {' | '.join(cells)} |")
    save_rows(f"upsampler_quality_{arguments.size}", arguments.results, means, arguments.device)


if __name__ == "__main__":
    main()
