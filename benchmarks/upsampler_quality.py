"""How near an upsampler comes to held-out images, beside bicubic: whole images, from their antialiased reduction (not spoiled), by its own sampler.

    python benchmarks/upsampler_quality.py 256                       the upsampler of the package, 64 of OpenMoji's held-out drawings
    python benchmarks/upsampler_quality.py 1024 --count 12 --picture upsampler.png
    python benchmarks/upsampler_quality.py 256 --weights FOLDER_OR_CKPT --val data/99.tar

Prints a Markdown table: mean PSNR in dB; sharpness, the root mean square difference of neighbouring pixels as a share of the original's; drift, how far the
mean colour of the output is from that of its low-resolution condition, the largest of red, green and blue in levels of 255 (mean and worst image).
"""

import argparse
import itertools
import time

import unclip_pl._torchvision  # noqa: F401

# isort: split
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip_pl.data.crops import UpsamplerData
from unclip_pl.data.degradation import DegradationConfig
from unclip_pl.data.loader import LoaderConfig
from unclip_pl.diffusion.noise import Noise
from unclip_pl.images import grid, psnr, save_png
from unclip_pl.pipeline import ASSETS, load_stage
from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024

KINDS = {256: Upsampler256, 1024: Upsampler1024}
SHOWN = 4  # drawings in the picture


def steepness(images: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels: (B, C, H, W) -> (B,)."""
    return (images.diff(dim=-1).square().flatten(1).mean(1) + images.diff(dim=-2).square().flatten(1).mean(1)).sqrt()


def drift(images: Tensor, low_res: Tensor) -> Tensor:
    """Largest difference of the mean colours, in levels of 255: (B,)."""
    return (images.mean((2, 3)) - low_res.mean((2, 3))).abs().amax(1) * 127.5


def closest(rows: dict[str, Tensor], side: int = 128) -> Image.Image:
    """A labelled picture: of each image the `side` x `side` pixels where the last row has the most edges, twice as large for 128."""
    target = list(rows.values())[-1]
    corners = []
    for image in target:
        edges = F.avg_pool2d((image[:, 1:, 1:] - image[:, :-1, :-1]).abs().mean(0, keepdim=True), side, stride=16)[0]
        top, left = divmod(int(edges.argmax()), edges.shape[1])
        corners.append((16 * top, 16 * left))
    cut = {name: torch.stack([x[:, top : top + side, left : left + side] for x, (top, left) in zip(row, corners)]) for name, row in rows.items()}
    return grid([F.interpolate(row, scale_factor=256 // side, mode="nearest") for row in cut.values()], list(cut))


@torch.no_grad()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("size", type=int, choices=list(KINDS))
    arguments.add_argument("--weights", help="a release or checkpoint; default: the one in the package")
    arguments.add_argument("--val", default="openmoji", nargs="+")
    arguments.add_argument("--count", type=int, default=64)
    arguments.add_argument("--start", type=int, default=0, help="pass over so many held-out images first")
    arguments.add_argument("--degradation", choices=["none", "blur", "bsr"], default="none", help="spoil the conditions")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--picture", help="write a picture of the first ones here")
    given = arguments.parse_args()
    stage = load_stage(given.weights or ASSETS / f"upsampler-{given.size}-openmoji", KINDS[given.size]).to(given.device)
    val = given.val[0] if isinstance(given.val, list) and len(given.val) == 1 else given.val
    data = UpsamplerData(
        val, val, given.size, val_crop=given.size, degradation=DegradationConfig(given.degradation), loader=LoaderConfig(batch_size=1, num_workers=0)
    )
    data.prepare_data()
    data.setup("validate")
    columns: dict[str, list[float]] = {}
    images, rows, start = 0, [], time.perf_counter()
    bar = tqdm(itertools.islice(data.val_dataloader(), given.start, given.start + given.count), unit="image", total=given.count)
    for loaded in bar:
        batch = data.on_before_batch_transfer(loaded, 0)
        low_res, image = batch["low_res"].to(given.device), batch["image"].to(given.device)
        bicubic, drawn = stage.enlarged(low_res), stage.sample({"low_res": low_res}, Noise([given.start + images]))
        for name, made in {"bicubic": bicubic, "drawn": drawn}.items():
            values = {"psnr": psnr(made, image), "sharpness": steepness(made) / steepness(image), "drift": drift(made, low_res)}
            for column, value in values.items():
                columns.setdefault(f"{name} {column}", []).append(value.item())
        images += 1
        bar.set_postfix({name: f"{sum(values) / images:.3f}" for name, values in columns.items()})
        rows += [(bicubic, drawn, image)] if images <= SHOWN else []
        if given.picture and images == min(SHOWN, given.count):
            shown = [torch.cat(row).cpu() for row in zip(*rows)]
            labels = [f"bicubic, {psnr(shown[0], shown[2]).mean():.1f} dB", f"drawn, {psnr(shown[1], shown[2]).mean():.1f} dB", "original"]
            save_png(closest(dict(zip(labels, shown)), 128 if given.size < 512 else 216), given.picture)
    seconds = (time.perf_counter() - start) / images
    mean = {name: sum(values) / images for name, values in columns.items()}
    print(f"{images} held-out images at {given.size}, {stage.sampling.sampler} with {stage.sampling.steps} steps, {seconds:.1f} s an image\n")
    print("| | PSNR | sharpness | drift, mean | drift, worst |\n|---|---|---|---|---|")
    for name in ("bicubic", "drawn"):
        worst = max(columns[f"{name} drift"])
        print(f"| {name} | {mean[f'{name} psnr']:.2f} | {mean[f'{name} sharpness']:.3f} | {mean[f'{name} drift']:.2f} | {worst:.2f} |")


if __name__ == "__main__":
    main()
