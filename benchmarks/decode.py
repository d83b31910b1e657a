"""Tar shards of JPEGs to float tensors of 64 pixels, as the loaders decode them (no network, no
CLIP), in this process or in workers."""

from _common import begin, parser, report, timed

# isort: split
from typing import Any

from unclip_pl.data.loader import ValidationLoader
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import expand
from unclip_pl.data.reader import SequentialShards
from unclip_pl.data.shards import count_samples


def as_is(sample: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Nothing is added to the samples."""
    return sample


def main() -> None:
    arguments = parser(__doc__, repeats=5, warmup=1, batch=64)
    arguments.add_argument("--shards", required=True, help="brace pattern of tars")
    arguments.add_argument("--image-size", type=int, default=64)
    arguments.add_argument(
        "--workers", type=int, choices=[0, 1], default=0,
        help="loader processes; for more see loader_rates.py",
    )  # fmt: skip
    given = arguments.parse_args()
    before = begin(given)
    shards = expand(given.shards)
    total = sum(map(count_samples, shards))
    config = LoaderConfig(batch_size=given.batch, num_workers=given.workers)
    seen = 0

    def step() -> None:
        nonlocal seen
        samples = SequentialShards(shards, given.image_size, config, as_is, total=total)
        seen = sum(len(batch["key"]) for batch in ValidationLoader(samples))

    times = timed(step, given)
    impl = f"unclip_pl/{given.image_size}/w{given.workers}"
    report("decode", given, times, seen, before, impl)


if __name__ == "__main__":
    main()
