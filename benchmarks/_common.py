"""What the benchmarks share: arguments, memory, operations, and the JSON line that each prints.

Import this module first: it sets what must be set before torch and lightning.
"""

import argparse
import gc
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _results import about, save

from unclip_pl.utils.precision import supported_precision

STATUS = Path("/proc/self/status")


def make_parser(
    doc: str | None, repeats: int, warmup: int, batch: int | None = None
) -> argparse.ArgumentParser:
    """A parser of the arguments that every timed job has; the numbers are defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="timed steps")
    parser.add_argument("--warmup", type=int, default=warmup, help="steps before, not timed")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32",
        help="bf16: autocast (embed: weights in bfloat16); float32 on a CPU without it",
    )  # fmt: skip
    if batch is not None:
        parser.add_argument("--batch", type=int, default=batch)
    results_option(parser)
    return parser


def results_option(parser: argparse.ArgumentParser) -> None:
    """Add the folder for results."""
    parser.add_argument(
        "--results", metavar="DIR", help="write a JSON file here (of the table: benchmarks/results)"
    )


def compile_option(parser: argparse.ArgumentParser) -> None:
    """Add whether the networks are compiled."""
    parser.add_argument(
        "--compile", action="store_true",
        help="torch.compile of the repeated blocks, done in the steps of the warm-up",
    )  # fmt: skip


def sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add what speeds up drawing."""
    compile_option(parser)
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="record a sampling step once and replay it"
    )


def begin(arguments: argparse.Namespace) -> float:
    """Set threads and seed; returns the memory used so far in MiB, which is that of the imports."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return peak_mib()


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB.

    VmHWM, which unlike ru_maxrss is not inherited from the parent; but only Linux has it, and
    sandboxes such as gVisor leave it out.
    """
    status = STATUS.read_text(encoding="utf-8") if STATUS.exists() else ""
    if match := re.search(r"VmHWM:\s*(\d+)", status):
        return int(match[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def wait(device: str) -> None:
    """Wait until a GPU has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], arguments: argparse.Namespace) -> list[float]:
    """The seconds of each of `repeats` calls after the warm-up.

    The time of the very first call, which compiles, is stored as `first_s` of the arguments.
    """
    times = []
    for i in range(arguments.warmup + arguments.repeats):
        if i == arguments.warmup:
            gc.collect()
        wait(arguments.device)
        start = time.perf_counter()
        step()
        wait(arguments.device)
        times.append(time.perf_counter() - start)
    arguments.first_s = times[0]
    return times[arguments.warmup :]


def flops_of(step: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, as torch counts.

    A multiply-add counts as two. Compiled code runs uncompiled here, for its kernels hide them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def report(
    job: str,
    arguments: argparse.Namespace,
    times: list[float],
    items: int,
    before: float,
    impl: str = "unclip_pl",
    **more: Any,
) -> dict[str, Any]:
    """Print the JSON line, and write it to a file in the folder `--results`.

    Args:
        job: its name.
        arguments: of the command line; their device, dtype and other settings go into the line.
        times: seconds of each step.
        items: samples or images per step.
        before: memory of the imports in MiB, see `begin`.
        impl: whose code was measured; settings other than the defaults are added to it.
        more: further keys of the line. With `peak_tflops` of the device the line has `mfu`.
    """
    median, device = statistics.median(times), arguments.device
    mode = "compiled" if getattr(arguments, "compile", False) else "eager"
    checkpointing = getattr(arguments, "checkpointing", "none")
    graphs = getattr(arguments, "cuda_graphs", False)
    settings = [mode] * (mode != "eager") + [checkpointing] * (checkpointing != "none")
    settings += ["cuda_graphs"] * graphs
    flops, peak = more.get("flops_per_step"), more.pop("peak_tflops", None)
    line = {
        "job": job, "impl": "/".join([impl, *settings]),
        "median_s": median, "min_s": min(times), "max_s": max(times), "n": len(times),
        "items": items, "items_per_s": items / median, "params": None, "flops_per_step": None,
        "gflop_per_s": flops / median / 1e9 if flops else None,
        "first_s": getattr(arguments, "first_s", None),
        "peak_rss_mib": peak_mib(), "rss_before_mib": before,
        "dtype": arguments.dtype, "computed_in": supported_precision(arguments.dtype, device),
        "mode": mode, "checkpointing": checkpointing, "cuda_graphs": graphs,
        "threads": arguments.threads, **about(device), **more, "times_s": times,
    }  # fmt: skip
    if peak and flops:
        line["mfu"] = flops / median / (peak * 1e12)
    if device.startswith("cuda"):
        line["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    sys.stdout.flush()
    print(json.dumps(line), flush=True)
    save(line, arguments.results)
    return line
