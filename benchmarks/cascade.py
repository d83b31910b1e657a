"""From captions to 1024x1024 pictures by the weights of the package: seconds, those of the processor (all threads), and on Linux
peak resident memory of each stage.

Also what the activations of one picture take in the 1024 stage's network (float32), in the package and at the paper's size: counted on the meta device.
"""

from _common import begin, parser, peak_mib, report  # sets what must be set before torch

# isort: split
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from unclip_pl.demo import PROMPTS
from unclip_pl.networks.memory import forward_bytes
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import UnCLIP
from unclip_pl.stages.upsampler import NET

PAPER = UNetConfig(image_size=1024, width=192, mults=(1, 1, 2, 2, 4, 4), depth=2, **NET)  # 300 million parameters, Table 3


def main() -> None:
    arguments = parser(__doc__, repeats=1, warmup=0, batch=1)
    arguments.add_argument("--prior", default="diffusion")
    arguments.add_argument("--upsamplers", nargs=2, default=["256", "1024"], help="checkpoints or releases; by default those in the package")
    given = arguments.parse_args()
    before = begin(given)
    unclip = UnCLIP.load(prior=given.prior, device=given.device, upsamplers=given.upsamplers, precision=given.dtype)
    unclip.embed_text(PROMPTS[:1])  # loads the CLIP
    captions, seeds = PROMPTS[: given.batch], range(given.batch)
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    highest = 0.0

    def stage(name: str, draw: Callable[[], Tensor]) -> Tensor:
        nonlocal highest
        refs = Path("/proc/self/clear_refs")
        if refs.exists():
            refs.write_text("5", encoding="ascii")  # VmHWM begins again at what is resident now
        start, used = time.perf_counter(), time.process_time()
        drawn = draw().cpu()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        processor.setdefault(name, []).append(time.process_time() - used)
        peaks[name] = max(peaks.get(name, 0.0), peak_mib())
        highest = max(highest, peaks[name])
        return drawn

    for _ in range(given.warmup + given.repeats):
        embed = stage("prior", lambda: unclip.sample_prior(captions, seeds))
        images = stage("decoder", lambda embed=embed: unclip.decode(embed, seeds, captions))
        for size in unclip.cascade.sizes:
            images = stage(str(size), lambda images=images: unclip.upsample(images, seeds, 4))
    timed, busy = ({name: spent[given.warmup :] for name, spent in kind.items()} for kind in (seconds, processor))
    networks = {"package": unclip.cascade.stages[-1].net_config, "paper": PAPER}
    activations = {name: forward_bytes(net, 1024, 1024) / 2**20 for name, net in networks.items()}
    report(
        "cascade", given, [sum(round_s) for round_s in zip(*timed.values())], len(captions), before, peak_rss_mib=highest,
        stage_s={name: statistics.median(spent) for name, spent in timed.items()},
        stage_cpu_s={name: statistics.median(spent) for name, spent in busy.items()}, stage_peak_mib=peaks, activations_1024_mib=activations,
    )  # fmt: skip


if __name__ == "__main__":
    main()
