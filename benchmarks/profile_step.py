"""Where the time of one training step goes: forward, backward, optimiser and EMA of the decoder of `decoder_train.py`, by kind of operation.

    python benchmarks/profile_step.py [--dtype bf16] [--device cuda]        prints a Markdown table
"""

from _training import plain_step  # sets what must be set before torch

# isort: split
from _common import begin, parser
from decoder_train import batch_of, decoder
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "convolution, backward": ("convolution_backward",),
    "convolution, forward": ("convolution", "conv2d"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "linear layers": ("aten::mm", "addmm", "bmm"),
    "GroupNorm, LayerNorm": ("group_norm", "layer_norm", "var_mean"),
    "optimiser, EMA, clipping": ("adamw", "lerp", "foreach", "vector_norm"),
    "copies, concatenation, casts": ("copy_", "aten::cat", "clone", "_to_copy"),
}


def kind_of(name: str, shapes: list[list[int]]) -> str:
    """The kind of an operation by its name, the first that fits; products of tiles and with the small matrices that transform them by their shapes."""
    if name in ("aten::mm", "aten::bmm", "aten::baddbmm_") and shapes and shapes[0]:
        if len(shapes[0]) == 3 and shapes[0][0] == 36:
            return "convolution by tiles, products"
        if max(shapes[0]) <= 6:
            return "convolution by tiles, transforms"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "element by element, and other")


def main() -> None:
    given = parser(__doc__, repeats=3, warmup=2, batch=4).parse_args()
    begin(given)
    step = plain_step(decoder().train(), batch_of(given.batch), given)
    for _ in range(given.warmup):
        step()
    cuda = given.device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], record_shapes=True) as found:
        for _ in range(given.repeats):
            step()
    spent: dict[str, float] = {}
    for event in found.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:  # a kernel, whose time the operation that started it has too
            continue
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key, event.input_shapes)
        spent[kind] = spent.get(kind, 0.0) + took / given.repeats / 1e6
    total = sum(spent.values())
    print(f"{total:.2f} s a step of {given.batch} images, {given.dtype}, {given.device}\n\n| part | s | share |\n|---|---|---|")
    for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {seconds:.3f} | {seconds / total:.0%} |")


if __name__ == "__main__":
    main()
