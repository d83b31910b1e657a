"""Where the time of one training step goes, by kind of operation.

The step has the forward and backward pass, the optimiser and the EMA of a stage of the training
benchmarks.

    python benchmarks/profile_step.py [decoder] [--dtype bf16] [--device cuda] [--compile]

It prints a Markdown table; `--results DIR` keeps the seconds.
"""

from _common import begin, make_parser

import decoder_train
import prior_train
import upsampler_train
from _results import save_rows
from _training import (
    apply_checkpointing,
    compile_blocks,
    plain_step,
    training_options,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STAGES = {
    "decoder": (decoder_train.decoder, decoder_train.batch_of, 4),
    "prior": (prior_train.prior, prior_train.batch_of, 32),
    "upsampler": (upsampler_train.upsampler, upsampler_train.batch_of, 4),
}
KINDS = {
    "convolution, backward": ("convolution_backward",),
    "convolution, forward": ("convolution", "conv2d"),
    "attention": (
        "scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention",
    ),
    "linear layers": ("aten::mm", "addmm", "bmm", "mkldnn::_linear"),
    "GroupNorm, LayerNorm": ("group_norm", "layer_norm", "var_mean"),
    "optimiser, EMA, clipping": ("adamw", "lerp", "foreach", "vector_norm"),
    "fused by the compiler": ("triton", "cpp_fused", "CompiledFunction", "Torch-Compiled"),
    "copies, concatenation, casts": ("copy_", "aten::cat", "clone", "_to_copy"),
}  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of an operation by its name, the first that fits."""
    kinds = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
    return next(kinds, "element by element, and other")


def main() -> None:
    """Profile the training steps of a stage, and print a Markdown table of operations."""
    parser = make_parser(__doc__, repeats=3, warmup=2)
    parser.add_argument("stage", nargs="?", choices=list(STAGES), default="decoder")
    parser.add_argument("--batch", type=int, help="by default that of the training benchmark")
    training_options(parser)
    arguments = parser.parse_args()
    begin(arguments)
    make, batch_of, size = STAGES[arguments.stage]
    stage, size = make().train().to(arguments.device), arguments.batch or size
    apply_checkpointing(stage, arguments.checkpointing)
    if arguments.compile:
        compile_blocks(stage, arguments.device)
    step = plain_step(stage, batch_of(size), arguments)
    for _ in range(arguments.warmup):
        step()
    cuda = arguments.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(arguments.repeats):
            step()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time the operation that started it has too
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + took / arguments.repeats / 1e6
    total = sum(spent.values())
    about = f"{arguments.stage}, {arguments.dtype}, {arguments.device}"
    print(f"{total:.3f} s per step of {size}, {about}\n")
    print("| part | s | share |\n|---|---|---|")
    for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {seconds:.3f} | {seconds / total:.0%} |")
    mode = "compiled" if arguments.compile else "eager"
    job = f"profile_{arguments.stage}_{arguments.dtype}_{mode}_{arguments.checkpointing}"
    settings = {"batch": size, "threads": arguments.threads}
    save_rows(job, arguments.results, settings | {"seconds": spent}, arguments.device)


if __name__ == "__main__":
    main()
