"""The resizing before Inception, 256 to 299 px: ours, or clean-fid's loop over images and channels;
`off` is their largest difference, in levels."""

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
    shape = (given.batch, given.size, given.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(given.device)

    def ours() -> torch.Tensor:
        return clean_resize(images)

    def theirs() -> torch.Tensor:
        resized = (torch.from_numpy(resizer(image)) for image in pixels)
        return torch.stack([image.permute(2, 0, 1) for image in resized])

    off = (ours().cpu() - theirs()).abs().max().item()
    times = timed(ours if given.impl == "ours" else theirs, given)
    impl = "unclip_pl" if given.impl == "ours" else given.impl
    report("fid_resize", given, times, given.batch, before, impl, off=off)


if __name__ == "__main__":
    main()
