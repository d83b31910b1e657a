"""FID without its network: 2 x 5,000 features of width 2,048, in batches of 50, to the distance. --impl ours, cleanfid or torchmetrics; `value` is the same.

`stage_s` is the share of each part: accumulate (features to mean and covariance) and distance.
"""

from _common import begin, parser, report, timed

# isort: split
import time
import warnings

import numpy as np
import torch


def features(rng: np.random.Generator, n: int, dim: int, shift: float) -> torch.Tensor:
    """(N, D) float32 with a decaying spectrum, not negative, as Inception's are."""
    base = np.random.default_rng(1).standard_normal((256, dim), dtype=np.float32) / 16
    z = rng.standard_normal((n, 256), dtype=np.float32) / np.sqrt(1 + np.arange(256, dtype=np.float32))
    return torch.from_numpy(np.maximum(z @ base + 0.3 + shift + 0.05 * rng.standard_normal((n, dim), dtype=np.float32), 0))


class Rows(torch.nn.Module):
    """In the place of torchmetrics' network: an image is its own features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def main() -> None:
    arguments = parser(__doc__, repeats=3, warmup=1, batch=50)
    arguments.add_argument("--impl", choices=["ours", "cleanfid", "torchmetrics"], default="ours")
    arguments.add_argument("--n", type=int, default=5000)
    arguments.add_argument("--dim", type=int, default=2048)
    given = arguments.parse_args()
    if given.impl == "cleanfid":
        from cleanfid.fid import frechet_distance
    elif given.impl == "torchmetrics":
        from torchmetrics.image.fid import FrechetInceptionDistance
    else:
        from eval.metrics import FrechetDistance
    before, rng = begin(given), np.random.default_rng(0)
    real, fake = features(rng, given.n, given.dim, 0.0), features(rng, given.n, given.dim, 0.02)
    stage, value = {"accumulate": 0.0, "distance": 0.0}, 0.0

    def step() -> None:
        nonlocal value
        start = time.perf_counter()
        if given.impl == "cleanfid":
            moments = []
            for x in (real, fake):
                whole = np.concatenate([rows.numpy() for rows in x.split(given.batch)])
                moments += [np.mean(whole, axis=0), np.cov(whole, rowvar=False)]
            middle = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = float(frechet_distance(*moments))
        else:
            ours = given.impl == "ours"
            metric = FrechetDistance(given.dim) if ours else FrechetInceptionDistance(feature=Rows(given.dim), input_img_size=(1, 1, given.dim))
            metric.to(given.device)
            for x, is_real in ((real, True), (fake, False)):
                for rows in x.split(given.batch):
                    metric.update(rows.to(given.device), real=is_real)
            middle = time.perf_counter()
            value = metric.compute()["fid"] if ours else metric.compute().item()
        stage["accumulate"] += middle - start
        stage["distance"] += time.perf_counter() - middle

    times = timed(step, given)
    steps = given.repeats + given.warmup
    report("fid_stats", given, times, 2 * given.n, before, given.impl, value=value, stage_s={name: seconds / steps for name, seconds in stage.items()})


if __name__ == "__main__":
    main()
