"""The resizing before Inception, 256 to 299 px: ours, or clean-fid's loop over images and channels; `off` is their largest difference, in levels."""

from _common import begin, parser, report, timed

# isort: split
import numpy as np
import torch

from eval.resize import clean_resize


def main() -> None:
    arguments = parser(__doc__, repeats=5, warmup=1, batch=32)
    arguments.add_argument("--impl", choices=["ours", "cleanfid"], default="ours")
    arguments.add_argument("--size", type=int, default=256)
    given = arguments.parse_args()
    from cleanfid.resize import build_resizer

    resizer, before = build_resizer("clean"), begin(given)
    pixels = np.random.default_rng(0).integers(0, 256, (given.batch, given.size, given.size, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(given.device)

    def theirs() -> torch.Tensor:
        return torch.stack([torch.from_numpy(resizer(image)).permute(2, 0, 1) for image in pixels])

    off = (clean_resize(images).cpu() - theirs()).abs().max().item()
    times = timed((lambda: clean_resize(images)) if given.impl == "ours" else theirs, given)
    report("fid_resize", given, times, given.batch, before, given.impl, off=off)


if __name__ == "__main__":
    main()
