"""How fast the loaders are.

Measured are images/s of the train loader by image size and number of workers, and rows/s of the
priors' loader and of the store. The output is Markdown.

    python benchmarks/loader_rates.py                                   OpenMoji, drawn on first use
    python benchmarks/loader_rates.py --sizes 64 --workers 0 4 8        other sizes and workers
    python benchmarks/loader_rates.py --data 'data/{00000..00009}.tar'  other images

An image counts from the tar to the batch: read, decoded, resized, its caption varied and tokenised.
Nothing else should run meanwhile.
"""

import argparse
import itertools
import os
import random
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

from _common import results_option

import torch
from _results import save_rows

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.loader_config import EmbeddingLoaderConfig, LoaderConfig
from unclip_pl.data.names import expand
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.datamodules.base import resolve_shards
from unclip_pl.datamodules.image_embedding import EmbeddingTransform
from unclip_pl.datamodules.image_text import ImageTextData
from unclip_pl.datamodules.prior import PriorData

warnings.filterwarnings("ignore", module="torchdata")
PRIOR_BATCHES = (64, 512, 2048)


def loader_rate(
    shards: list[str], size: int, workers: int, batch_size: int, seconds: float
) -> float:
    """Images/s after the first batch and those that were prefetched with it."""
    config = LoaderConfig(
        batch_size=batch_size, num_workers=workers, max_bad_rate=0.5, steps_per_epoch=1 << 40
    )
    data = ImageTextData(shards, None, size, loader=config)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for _ in range(1 + 2 * workers):
        next(batches)
    start, images = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        images += len(next(batches)["key"])
    return images / (time.monotonic() - start)


def store_rates(shard: str, samples: int, seconds: float) -> tuple[float, float]:
    """(rows/s written, rows/s read) of the embedding store.

    Writing goes from the tar through CLIP to the file. Reading is by key in random order, as
    tensors.
    """
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.tar"
        with tarfile.open(shard) as whole, tarfile.open(part, "w") as tar:
            for member in itertools.islice(whole, 3 * samples):
                tar.addfile(member, whole.extractfile(member))
        store, clip = EmbeddingStore(Path(folder) / "store"), FrozenCLIP(CLIPConfig())
        clip.fingerprint()  # not counted: the first call loads the weights
        start = time.monotonic()
        store.ensure([str(part)], clip, progress=False)
        keys = store.shard(str(part)).keys
        written = len(keys) / (time.monotonic() - start)
        row, order, read = EmbeddingTransform(store), random.Random(0), 0
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            row({"shard": str(part), "key": order.choice(keys), "caption": "", "image": None}, 0)
            read += 1
        return written, read / (time.monotonic() - start)


def prior_rate(batch_size: int, seconds: float) -> float:
    """Rows/s of the priors' loader over OpenMoji's store."""
    data = PriorData(loader=EmbeddingLoaderConfig(batch_size=batch_size, steps_per_epoch=1 << 40))
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    start, rows = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        rows += len(next(batches)["key"])
    return rows / (time.monotonic() - start)


def shards_of(data: list[str] | None, size: int) -> list[str]:
    """The given shards, or those of OpenMoji at `size` pixels."""
    return expand(data) if data else resolve_shards("openmoji", "train", size)


def main() -> None:
    """Measure every loader for each image size and number of workers, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512, help="samples embedded for the store")
    parser.add_argument("--data", nargs="+", help="shards; OpenMoji without it")
    results_option(parser)
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    threads = torch.get_num_threads()
    print(
        f"{os.cpu_count()} CPU cores, {threads} threads of torch, batches of {arguments.batch_size}"
    )
    print("\nImages/s:\n\n| px | " + " | ".join(f"{n} workers" for n in arguments.workers) + " |")
    print("|---" * (1 + len(arguments.workers)) + "|")
    for size in arguments.sizes:
        shards = shards_of(arguments.data, size)
        rates = [
            loader_rate(shards, size, workers, arguments.batch_size, arguments.seconds)
            for workers in arguments.workers
        ]
        results |= {f"{size} px, {n} workers": rate for n, rate in zip(arguments.workers, rates)}
        print(f"| {size} | " + " | ".join(f"{rate:.0f}" for rate in rates) + " |", flush=True)
    first_shards = shards_of(arguments.data, arguments.sizes[0])
    written, read = store_rates(first_shards[0], arguments.rows, arguments.seconds)
    prior = {f"{size}": prior_rate(size, arguments.seconds) for size in PRIOR_BATCHES}
    summary = ", ".join(f"{rate:,.0f} rows/s in batches of {size}" for size, rate in prior.items())
    print(f"\nPriors' loader: {summary}.")
    print(f"Embedding store: {written:.0f} rows/s written by the embedded CLIP, {read:.0f} read.")
    results |= {f"priors, batches of {size}": rate for size, rate in prior.items()}
    save_rows("loader_rates", arguments.results, results | {"written": written, "read": read})


if __name__ == "__main__":
    main()
