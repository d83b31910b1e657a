"""Where the time of one training step goes: forward, backward, optimiser and EMA of a stage of the
training benchmarks, by kind of operation.

    python benchmarks/profile_step.py [decoder] [--dtype bf16] [--device cuda] [--compile]

It prints a Markdown table.
"""

from _training import (  # sets what must be set before torch
    apply_checkpointing,
    compile_blocks,
    plain_step,
    training_options,
)

# isort: split
import decoder_train
import prior_train
import upsampler_train
from _common import begin, parser
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
    arguments = parser(__doc__, repeats=3, warmup=2)
    arguments.add_argument("stage", nargs="?", choices=list(STAGES), default="decoder")
    arguments.add_argument("--batch", type=int, help="by default that of the training benchmark")
    training_options(arguments)
    given = arguments.parse_args()
    begin(given)
    make, batch_of, size = STAGES[given.stage]
    stage, size = make().train().to(given.device), given.batch or size
    apply_checkpointing(stage, given.checkpointing)
    if given.compile:
        compile_blocks(stage, given.device)
    step = plain_step(stage, batch_of(size), given)
    for _ in range(given.warmup):
        step()
    cuda = given.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(given.repeats):
            step()
    spent: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time the operation that started it has too
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + took / given.repeats / 1e6
    total = sum(spent.values())
    print(f"{total:.3f} s per step of {size}, {given.stage}, {given.dtype}, {given.device}\n")
    print("| part | s | share |\n|---|---|---|")
    for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {seconds:.3f} | {seconds / total:.0%} |")


if __name__ == "__main__":
    main()
