"""Noise schedules and their respacing (IDDPM, Nichol and Dhariwal 2021), as float64 on the CPU.

Position i holds the original timestep `timesteps[i]`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Spacing = int | tuple[int, ...] | str
"""Steps of a sampler as settings and YAML have them: a number, numbers by section, or a name. See
`Schedule.respaced`."""
FAST27 = (10, 10, 3, 2, 2)
"""The sections of GLIDE's "fast27"."""


def cosine_betas(T: int) -> Tensor:
    """Make the cosine schedule (IDDPM eq. 17): (T,) float64 betas in (0, 0.999].

    abar_t = cos^2((t/T + 0.008) / 1.008 * pi/2). ValueError for T < 1.
    """
    _require_timesteps("cosine", T, 1)

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return _float64([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)])


def linear_betas(T: int) -> Tensor:
    """Make the linear schedule: (T,) float64 betas, evenly from 0.1/T to 20/T.

    At T = 1000 it is that of Ho et al. 2020. ValueError for T < 21, where beta would reach 1.
    """
    _require_timesteps("linear", T, 21)
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64, device="cpu")


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"cosine": cosine_betas, "linear": linear_betas}


@dataclass(frozen=True, eq=False)
class Schedule:
    """The levels of noise that a sampler visits, cleanest first.

    `alphas_cumprod` (K,) float64; `timesteps` (K,) int64, original indices.
    """

    alphas_cumprod: Tensor
    timesteps: Tensor

    @classmethod
    def named(cls, name: str, T: int = 1000) -> "Schedule":
        """The full schedule "cosine" or "linear" with T timesteps. ValueError for another name."""
        if name not in SCHEDULES:
            raise ValueError(
                f"there is no noise schedule {name!r}: choose one of {', '.join(SCHEDULES)}"
            )
        return cls(torch.cumprod(1 - SCHEDULES[name](T), 0), torch.arange(T, device="cpu"))

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """(K,) abar of the next cleaner position; 1 (the clean image) in front of position 0."""
        return torch.cat([_float64([1.0]), self.alphas_cumprod[:-1]])

    @cached_property
    def betas(self) -> Tensor:
        """(K,) beta of the step between neighbours, 1 - abar_i / abar_{i-1}.

        It is respaced where the schedule is.
        """
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    @cached_property
    def posterior_variance(self) -> Tensor:
        """(K,) variance of q(x_{t-1} | x_t, x_0), btilde = beta (1 - abar_prev) / (1 - abar).

        Entry 0 is 0.
        """
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """(K,) log btilde, with entry 1 in place of entry 0, whose logarithm is -inf.

        Where there is one step, it is log beta.
        """
        first = self.posterior_variance[1:2] if len(self) > 1 else self.betas
        return torch.cat([first, self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_x0_weight(self) -> Tensor:
        """(K,) weight of x_0 in the posterior mean, beta sqrt(abar_prev) / (1 - abar).

        It is exactly 1 at position 0 of the full schedule.
        """
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_xt_weight(self) -> Tensor:
        """(K,) weight of x_t in the posterior mean, (1 - abar_prev) sqrt(alpha) / (1 - abar)."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    def respaced(self, spec: int | str | Sequence[int]) -> "Schedule":
        """The same abar at fewer positions. ValueError says why a spec is impossible.

        Args:
            spec: int K, evenly round(i (T-1)/(K-1)), for K = 1 the noisiest; a list or tuple of
                counts, one for each equal section; "ddimK", the smallest stride r with K positions
                0, r, 2r, ...; "fast27", GLIDE's 27 steps for DDIM: the sections 10, 10, 3, 2, 2,
                with T-3 in place of the noisiest position T-1.
        """
        return self.at(_positions(spec, len(self)))

    def at(self, positions: Sequence[int]) -> "Schedule":
        """The same abar at these positions. ValueError unless they rise within 0 .. T-1."""
        rising = all(a < b for a, b in pairwise(positions))
        if not positions or not rising or positions[0] < 0 or positions[-1] >= len(self):
            raise ValueError(
                f"positions must rise strictly within 0..{len(self) - 1}: got {positions}"
            )
        keep = torch.tensor(positions, dtype=torch.int64, device="cpu")
        return Schedule(self.alphas_cumprod[keep], self.timesteps[keep])


def check_spacing(spec: object, who: str) -> None:
    """ValueError unless `spec` is a spacing of a schedule; `who` begins the sentence."""
    if isinstance(spec, str):
        known = re.fullmatch(r"fast27|(ddim)?0*[1-9]\d*", spec) is not None
    else:
        counts = spec if isinstance(spec, (list, tuple)) else [spec]
        known = bool(counts) and all(type(count) is int and count > 0 for count in counts)
    if not known:
        raise ValueError(
            f"{who} cannot sample in {spec} steps: give a number of 1 or more, numbers for equal "
            'sections of the timesteps ([10, 10, 3, 2, 2]), "fast27", or "ddim" and a number '
            '("ddim25").'
        )


def _positions(spec: int | str | Sequence[int], T: int) -> list[int]:
    if isinstance(spec, str):
        return _from_text(spec, T)
    if isinstance(spec, int):
        _require_count(spec, T, f"a schedule of {T} timesteps")
        return _even(spec, T) if spec > 1 else [T - 1]
    return _sections(spec, T)


def _even(count: int, size: int) -> list[int]:
    """Space `count` positions evenly from 0 to size - 1, both ends included.

    The stride is summed up, as IDDPM does, which decides halves (499.5).
    """
    stride = (size - 1) / max(count - 1, 1)
    return [round(p) for p in accumulate([0.0] + [stride] * (count - 1))]


def _sections(counts: Sequence[int], T: int) -> list[int]:
    if not 1 <= len(counts) <= T:
        raise ValueError(
            f"{T} timesteps cannot be cut into {len(counts)} sections: give 1 to {T} counts"
        )
    positions: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        _require_count(count, size, f"section {i} of {size} timesteps")
        positions += [start + p for p in _even(count, size)]
        start += size
    return positions


def _from_text(spec: str, T: int) -> list[int]:
    if spec.isdigit():
        return _positions(int(spec), T)
    if spec == "fast27":
        return [*_sections(FAST27, T)[:-1], T - 3]
    match = re.fullmatch(r"ddim(\d+)", spec)
    if match is None:
        raise ValueError(
            f'respacing {spec!r} is not understood: write a number of steps ("250"), "fast27", or '
            '"ddim" and a number ("ddim27")'
        )
    for stride in range(1, T + 1):
        if len(range(0, T, stride)) == int(match[1]):
            return list(range(0, T, stride))
    raise ValueError(
        f"no integer stride takes {match[1]} of {T} timesteps: write {match[1]} instead of "
        f"{spec!r} for even spacing"
    )


def _require_count(count: int, size: int, where: str) -> None:
    if not 1 <= count <= size:
        raise ValueError(f"{where} has no {count} steps: ask for a number between 1 and {size}")


def _require_timesteps(name: str, T: int, least: int) -> None:
    if least > T:
        raise ValueError(f"the {name} schedule needs at least {least} timesteps: got {T}")


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
