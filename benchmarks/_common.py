"""What the benchmarks share: arguments, memory, floating-point operations, and the one JSON line that each prints."""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from unclip_pl.allocator import keep_freed_memory

keep_freed_memory()  # as our commands do, and before torch
import unclip_pl._torchvision  # noqa: E402, F401

# isort: split
import torch  # noqa: E402

from unclip_pl.precision import usable  # noqa: E402


def parser(doc: str | None, repeats: int, warmup: int, batch: int | None = None) -> argparse.ArgumentParser:
    """The arguments that every job has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help="timed steps")
    made.add_argument("--warmup", type=int, default=warmup, help="steps before, not timed")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast (embed: weights in bfloat16); float32 on a CPU without it")
    if batch is not None:
        made.add_argument("--batch", type=int, default=batch)
    return made


def begin(arguments: argparse.Namespace) -> float:
    """Set threads and seed; returns the memory used so far (MiB), which is that of the imports."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return peak_mib()


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB (on Linux VmHWM: unlike ru_maxrss not inherited from the parent)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def wait(device: str) -> None:
    """Until a GPU has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], arguments: argparse.Namespace) -> list[float]:
    """Seconds of each of `repeats` calls, after the warm-up."""
    times = []
    for i in range(arguments.warmup + arguments.repeats):
        if i == arguments.warmup:
            gc.collect()
        wait(arguments.device)
        start = time.perf_counter()
        step()
        wait(arguments.device)
        times.append(time.perf_counter() - start)
    return times[arguments.warmup :]


def flops_of(step: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, two for a multiply-add, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def report(job: str, arguments: argparse.Namespace, times: list[float], items: int, before: float, impl: str = "unclip_pl", **more: Any) -> None:
    """Print the line: items (samples, images) a step and the seconds of each step; `before` is what `begin` returned."""
    median = statistics.median(times)
    flops = more.get("flops_per_step")
    line = {
        "job": job, "impl": impl, "median_s": median, "min_s": min(times), "max_s": max(times), "n": len(times), "items": items,
        "items_per_s": items / median, "params": None, "flops_per_step": None, "gflop_per_s": flops / median / 1e9 if flops else None,
        "peak_rss_mib": peak_mib(), "rss_before_mib": before, "dtype": arguments.dtype, "computed_in": usable(arguments.dtype, arguments.device),
        "device": arguments.device, "threads": arguments.threads, "torch": torch.__version__, **more, "times_s": times,
    }
    if arguments.device.startswith("cuda"):
        line["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    sys.stdout.flush()
    print(json.dumps(line), flush=True)
