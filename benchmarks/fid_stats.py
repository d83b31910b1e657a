"""FID without its network: 2 x 5,000 features of width 2,048, in batches of 50, to the distance.

`--impl` is ours, cleanfid or torchmetrics; `value` is the same. `stage_s` is the share of each
part: accumulate (features to mean and covariance) and distance.
"""

import argparse
import importlib
import time
import warnings
from collections.abc import Callable

from _common import begin, make_parser, report, timed

import numpy as np
import torch
from torch import Tensor

Sides = tuple[Tensor, Tensor]
MODULES = {
    "ours": "eval.metrics",
    "cleanfid": "cleanfid.fid",
    "torchmetrics": "torchmetrics.image.fid",
}


def features(rng: np.random.Generator, n: int, dim: int, shift: float) -> Tensor:
    """(N, D) float32 with a decaying spectrum, not negative, as Inception's are."""
    base = np.random.default_rng(1).standard_normal((256, dim), dtype=np.float32) / 16
    z = rng.standard_normal((n, 256), dtype=np.float32)
    z = z / np.sqrt(1 + np.arange(256, dtype=np.float32))
    noise = 0.05 * rng.standard_normal((n, dim), dtype=np.float32)
    return torch.from_numpy(np.maximum(z @ base + 0.3 + shift + noise, 0))


class Rows(torch.nn.Module):
    """Replaces torchmetrics' network: an image is its own features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def clean_fid(sides: Sides, arguments: argparse.Namespace) -> Callable[[], float]:
    """Accumulates as clean-fid does, and returns what computes the distance."""
    from cleanfid.fid import frechet_distance

    moments = []
    for x in sides:
        whole = np.concatenate([rows.numpy() for rows in x.split(arguments.batch)])
        moments += [np.mean(whole, axis=0), np.cov(whole, rowvar=False)]

    def distance() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(frechet_distance(*moments))

    return distance


def running(sides: Sides, arguments: argparse.Namespace) -> Callable[[], float]:
    """Accumulates in our metric or torchmetrics', and returns what computes the distance."""
    if arguments.impl == "ours":
        from eval.metrics import FrechetDistance

        metric = FrechetDistance(arguments.dim)
    else:
        from torchmetrics.image.fid import FrechetInceptionDistance

        shape = (1, 1, arguments.dim)
        metric = FrechetInceptionDistance(feature=Rows(arguments.dim), input_img_size=shape)
    metric.to(arguments.device)
    for x, is_real in zip(sides, (True, False)):
        for rows in x.split(arguments.batch):
            metric.update(rows.to(arguments.device), real=is_real)

    def distance() -> float:
        value = metric.compute()
        return value["fd"] if arguments.impl == "ours" else value.item()

    return distance


def main() -> None:
    """Time one implementation of the statistics and the distance, and report both parts."""
    parser = make_parser(__doc__, repeats=3, warmup=1, batch=50)
    parser.add_argument("--impl", choices=list(MODULES), default="ours")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=2048)
    arguments = parser.parse_args()
    importlib.import_module(MODULES[arguments.impl])  # neither its time nor its memory is counted
    before, rng = begin(arguments), np.random.default_rng(0)
    sides = tuple(features(rng, arguments.n, arguments.dim, shift) for shift in (0.0, 0.02))
    accumulate = clean_fid if arguments.impl == "cleanfid" else running
    stage, value = {"accumulate": 0.0, "distance": 0.0}, 0.0

    def step() -> None:
        nonlocal value
        start = time.perf_counter()
        distance = accumulate(sides, arguments)
        middle = time.perf_counter()
        value = distance()
        stage["accumulate"] += middle - start
        stage["distance"] += time.perf_counter() - middle

    times = timed(step, arguments)
    steps = arguments.repeats + arguments.warmup
    impl = "unclip_pl" if arguments.impl == "ours" else arguments.impl
    parts = {name: seconds / steps for name, seconds in stage.items()}
    report("fid_stats", arguments, times, 2 * arguments.n, before, impl, value=value, stage_s=parts)


if __name__ == "__main__":
    main()
