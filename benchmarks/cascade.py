"""From captions to 1024x1024 pictures with the weights of the package.

For each stage it measures the seconds, the seconds of the processor (all threads), and on Linux
the peak resident memory.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from _common import (
    begin,
    make_parser,
    peak_mib,
    report,
    sampling_options,
)

from torch import Tensor

from unclip_pl.cli.demo import PROMPTS
from unclip_pl.pipeline.unclip import UnCLIP

CLEAR_REFS = Path("/proc/self/clear_refs")


class Stages:
    """Time and memory of each stage of a cascade."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}
        self.peaks: dict[str, float] = {}

    def run(self, name: str, draw: Callable[[], Tensor]) -> Tensor:
        """Measure a call of `draw`; returns its result on the CPU."""
        with contextlib.suppress(OSError):  # not on Linux, or a container does not allow it
            # VmHWM begins again at what is resident now.
            CLEAR_REFS.write_text("5", encoding="ascii")
        start, used = time.perf_counter(), time.process_time()
        drawn = draw().cpu()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        self.processor.setdefault(name, []).append(time.process_time() - used)
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak_mib())
        return drawn


def measure(arguments: argparse.Namespace, before: float) -> None:
    """Time the cascade, and print the line."""
    unclip = UnCLIP.load(
        prior=arguments.prior,
        device=arguments.device,
        upsamplers=arguments.upsamplers,
        precision=arguments.dtype,
        compile=arguments.compile,
        cuda_graphs=arguments.cuda_graphs,
    )
    unclip.embed_text(PROMPTS[:1])  # loads the CLIP
    captions = [PROMPTS[i % len(PROMPTS)] for i in range(arguments.batch)]
    seeds, stages = range(arguments.batch), Stages()
    for _ in range(arguments.warmup + arguments.repeats):
        embed = stages.run("prior", lambda: unclip.sample_prior(captions, seeds))
        images = stages.run("decoder", lambda z=embed: unclip.decode(z, seeds, captions))
        for size in unclip.cascade.sizes:
            images = stages.run(str(size), lambda x=images: unclip.upsample(x, seeds, 4))
    seconds = {name: spent[arguments.warmup :] for name, spent in stages.seconds.items()}
    busy = {name: spent[arguments.warmup :] for name, spent in stages.processor.items()}
    report(
        f"cascade_{unclip.sizes[-1]}", arguments, [sum(times) for times in zip(*seconds.values())],
        arguments.batch, before, peak_rss_mib=max(stages.peaks.values()),
        stage_s={name: statistics.median(spent) for name, spent in seconds.items()},
        stage_cpu_s={name: statistics.median(spent) for name, spent in busy.items()},
        stage_peak_mib=stages.peaks,
    )  # fmt: skip


def main() -> None:
    """Time the prior, the decoder and the upsamplers of the command line, and report each stage."""
    parser = make_parser(__doc__, repeats=1, warmup=0, batch=1)
    parser.add_argument("--prior", default="diffusion")
    parser.add_argument(
        "--upsamplers", nargs="*", default=["256", "1024"],
        help="checkpoints or releases, in order; by default those in the package",
    )  # fmt: skip
    sampling_options(parser)
    arguments = parser.parse_args()
    measure(arguments, begin(arguments))


if __name__ == "__main__":
    main()
