"""Random numbers per sample, so that sample k is the same on any device and in any batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Noise:
    """Normal and uniform random numbers for a batch, from one CPU generator per sample.

    Each draw advances the generators; make a new Noise to repeat the numbers.

    Args:
        seeds: integers >= 0, one per sample.

    Raises:
        ValueError: no seeds, or a negative one.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if len(seeds) == 0 or any(seed < 0 for seed in seeds):
            raise ValueError(f"noise needs one seed >= 0 per sample: got {list(seeds)}")
        # torch's CPU generator reads only 32 bits of a seed: fold the upper ones in
        folded = [int(seed) ^ (int(seed) >> 32) for seed in seeds]
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in folded]

    def __len__(self) -> int:
        return len(self.generators)

    def __getitem__(self, index: slice | int) -> "Noise":
        """The Noise of some samples. It shares their generators with this one."""
        part = object.__new__(Noise)
        generators = self.generators[index]
        part.generators = generators if isinstance(generators, list) else [generators]
        return part

    def __call__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal (B, *shape) float32 on `device`; `shape` is that of one sample."""
        return self._draw(torch.randn, shape, device)

    def uniform(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) float32 in [0, 1) on `device`, from the same generators."""
        return self._draw(torch.rand, shape, device)

    def like(self, x: Tensor) -> Tensor:
        """Standard normal float32, shaped as x (B, ...) and on its device.

        Raises:
            ValueError: B is not the number of seeds.
        """
        if len(x) != len(self):
            raise ValueError(
                f"noise for {len(self)} samples was asked for {len(x)}: give one seed per sample"
            )
        return self(x.shape[1:], x.device)

    def _draw(
        self, random: Callable[..., Tensor], shape: Sequence[int], device: torch.device | str
    ) -> Tensor:
        options = {"dtype": torch.float32, "device": "cpu"}
        rows = [random(tuple(shape), generator=g, **options) for g in self.generators]
        return torch.stack(rows).to(device)
