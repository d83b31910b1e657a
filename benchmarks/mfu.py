"""A training step of a stage at the paper's size, and the share of the GPU's peak (MFU) it reaches.

    python benchmarks/mfu.py decoder --batch 32 --device cuda --dtype bf16 --mode bare --compile

MFU is 3 x forward operations x samples per second / peak; `_flops.py` says what counts. Goals on
an H100: 0.45 for the priors, 0.40 for the decoder, 0.35 for the upsamplers.
"""

import argparse
import gc
from typing import Any

from _common import make_parser

import torch
from _flops import forward_flops
from _paper import KINDS, batch_for, build, side_of
from _training import measure, parse_arguments, plain_step

PEAKS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}
"""Dense bfloat16 TFLOP/s of the SXM modules."""


def peak_of(device: str) -> float | None:
    """TFLOP/s of a GPU that is known here."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def train(name: str, arguments: argparse.Namespace, before: float, tiny: bool = False) -> None:
    """Time a stage with micro-batches of `arguments.batch`, and print the line."""
    stage: Any = build(name, arguments.device, arguments.checkpointing, tiny)
    batch = batch_for(name, stage, arguments.batch, tiny)
    flops = 3 * arguments.batch * forward_flops(stage, side_of(name, tiny))
    job = f"{'tiny' if tiny else 'paper'}_{name}_train"
    more = {"flops_per_step": flops, "peak_tflops": peak_of(arguments.device)}
    measure(job, stage, batch, arguments, before, **more)


def largest_batch(name: str, arguments: argparse.Namespace, size: int, tiny: bool = False) -> int:
    """The first micro-batch of `size`, size / 2, ... that fits without checkpointing.

    It fits if the allocator does not have to give memory back, either; one sample may do that.
    """
    while True:
        stage: Any = build(name, arguments.device, "none", tiny)
        try:
            step = plain_step(stage.train(), batch_for(name, stage, size, tiny), arguments)
            for _ in range(2):  # in the second AdamW's state is there from the start
                step()
            if size == 1 or not retried(arguments.device):
                return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        del stage
        step = None  # not inside `except`, where the error holds on to the tensors
        free()
        size //= 2
        print(f"out of memory: trying micro-batches of {size}", flush=True)


def retried(device: str) -> bool:
    """Whether the allocator had to give memory back since `free`, which makes steps slow."""
    return device.startswith("cuda") and torch.cuda.memory_stats()["num_alloc_retries"] > 0


def free() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()  # of which the allocator's retries are one


def main() -> None:
    """Time the training steps of a stage, and report its share of the peak of the GPU."""
    parser = make_parser(__doc__, repeats=8, warmup=4, batch=16)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage", choices=list(KINDS))
    parser.add_argument("--tiny", action="store_true", help="a tiny stage, to try the script")
    arguments, before = parse_arguments(parser)
    train(arguments.stage, arguments, before, arguments.tiny)


if __name__ == "__main__":
    main()
