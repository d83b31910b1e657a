"""Randomness a sample: one CPU generator each, so that sample k is the same whatever the batch around it and the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Standard normal (and uniform) draws for a batch, one stream of numbers a sample. Each draw advances the streams: make a new Noise to repeat.

    seeds: ints >= 0, one a sample; ValueError for none or negative ones.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if len(seeds) == 0 or any(seed < 0 for seed in seeds):
            raise ValueError(f"noise needs one seed >= 0 a sample: got {list(seeds)}")
        # torch's CPU generator reads only 32 bits of a seed: fold the upper ones in
        self.generators = [
            torch.Generator("cpu").manual_seed(int(seed) ^ (int(seed) >> 32)) for seed in seeds
        ]

    def __len__(self) -> int:
        return len(self.generators)

    def __getitem__(self, index: slice | int) -> "Noise":
        """The Noise of some samples; their streams are shared with this one."""
        part = object.__new__(Noise)
        part.generators = (
            self.generators[index] if isinstance(index, slice) else [self.generators[index]]
        )
        return part

    def __call__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) float32 on `device`; `shape` is that of one sample."""
        draws = [
            torch.randn(tuple(shape), generator=g, dtype=torch.float32, device="cpu")
            for g in self.generators
        ]
        return torch.stack(draws).to(device)

    def uniform(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) float32 in [0, 1) on `device`, from the same streams."""
        return torch.stack(
            [
                torch.rand(tuple(shape), generator=g, dtype=torch.float32, device="cpu")
                for g in self.generators
            ]
        ).to(device)

    def like(self, x: Tensor) -> Tensor:
        """float32, shaped as x (B, ...) and on its device. ValueError where B is not the number of seeds."""
        if len(x) != len(self):
            raise ValueError(
                f"noise for {len(self)} samples was asked for {len(x)}: give one seed a sample"
            )
        return self(x.shape[1:], x.device)
