"""Decode tar shards of JPEGs to float tensors of 64 pixels, as the loaders do it.

No network and no CLIP take part. It runs in this process or in workers.
"""

from typing import Any

from _common import begin, make_parser, report, timed

from unclip_pl.data.loader import ValidationLoader
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import expand
from unclip_pl.data.reader import SequentialShards
from unclip_pl.data.shards import count_samples


def as_is(sample: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Return a sample unchanged."""
    return sample


def main() -> None:
    """Time the reading of all samples of the shards, and report images per second."""
    parser = make_parser(__doc__, repeats=5, warmup=1, batch=64)
    parser.add_argument("--shards", required=True, help="brace pattern of tars")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument(
        "--workers", type=int, choices=[0, 1], default=0,
        help="loader processes; for more see loader_rates.py",
    )  # fmt: skip
    arguments = parser.parse_args()
    before = begin(arguments)
    shards = expand(arguments.shards)
    total = sum(map(count_samples, shards))
    config = LoaderConfig(batch_size=arguments.batch, num_workers=arguments.workers)
    seen = 0

    def step() -> None:
        nonlocal seen
        samples = SequentialShards(shards, arguments.image_size, config, as_is, total=total)
        seen = sum(len(batch["key"]) for batch in ValidationLoader(samples))

    times = timed(step, arguments)
    impl = f"unclip_pl/{arguments.image_size}/w{arguments.workers}"
    report("decode", arguments, times, seen, before, impl)


if __name__ == "__main__":
    main()
