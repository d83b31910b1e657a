"""Predictors that a GPU runs from a recording (a CUDA graph), so that a step does not wait for Python to start its thousand kernels one by one.

A recording is made in the run that first calls it often enough, and kept for all later runs of the same kind: same shapes, settings and weights in place.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from unclip_pl.diffusion.process import Predict, Prediction

log = logging.getLogger(__name__)
Make = Callable[[Any], Predict]


class Replay:
    """Keeps the newest recording. `replay(make, conditions, kind, weights)` is `make(conditions)`, from that recording where it pays.

    It pays on a GPU where kernels are done sooner than the host can start them: networks that are small, or few pictures. Elsewhere, with gradients, and on
    other devices nothing is recorded. Results are the same but for rounding: the libraries may pick other kernels in a recording.
    """

    def __init__(self) -> None:
        self._kept: _Recording | None = None

    def __call__(self, make: Make, conditions: Any, kind: Any, weights: Iterable[Tensor]) -> Predict:
        """A Predict for one sampling run.

        Args:
            make: gives the Predict for conditions; its calls may not wait for the device.
            conditions: tensors in tuples, lists and dicts, None among them: all that differs between runs of a kind.
            kind: what else `make` depends on, comparable by ==.
            weights: the tensors that `make` uses beside: a recording reads them where they lay.
        """
        leaves, spec = tree_flatten(conditions)
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
        if device.type != "cuda" or torch.is_grad_enabled():
            return make(conditions)
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        shapes = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = kind, spec, shapes, half, [weight.data_ptr() for weight in weights]
        if self._kept is None or self._kept.key != key:
            self._kept = None  # its memory first
            self._kept = _Recording(key, make, leaves, spec)
        return _Run(self._kept, leaves)

    def clear(self) -> None:
        """Drop the recording and its memory."""
        self._kept = None

    def __reduce__(self) -> tuple[type, tuple]:
        return Replay, ()  # a copy records anew


class _Run:
    """The predictor of one run: it puts its conditions in place if another one's are there."""

    def __init__(self, recording: "_Recording", leaves: list[Any]) -> None:
        self.recording, self.leaves = recording, leaves

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        if self.recording.owner is not self:
            self.recording.fill(self.leaves)
            self.recording.owner = self
        return self.recording(x, t)


class _Recording:
    """Calls plainly at first, looks whether the GPU had to wait, then records and replays."""

    def __init__(self, key: Any, make: Make, leaves: list[Any], spec: Any) -> None:
        self.key = key
        self.owner: _Run | None = None
        self.leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.predict = make(tree_unflatten(self.leaves, spec))
        self.calls = 0
        self.pays = True
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, leaves: list[Any]) -> None:
        for mine, theirs in zip(self.leaves, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs)

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        self.calls += 1
        if self.graph is not None and (x.shape, x.dtype) == (self.x.shape, self.x.dtype):
            return self._replayed(x, t)
        if not self.pays or self.graph is not None or self.calls == 1:  # the first call also prepares what the kernels' libraries need
            return self.predict(x, t)
        if self.calls == 2:
            return self._watched(x, t)
        try:
            self._record(x, t)
        except RuntimeError as error:
            self.pays, self.graph = False, None
            log.warning(f"Drawing goes on without a CUDA graph, which could not be recorded: {str(error).splitlines()[0]}")
            return self.predict(x, t)
        return self._replayed(x, t)

    def _watched(self, x: Tensor, t: Tensor) -> Prediction:
        """A plain call; it pays to record if the host takes longer to start the kernels than they then still run."""
        torch.cuda.synchronize(x.device)
        begun = time.perf_counter()
        found = self.predict(x, t)
        started = time.perf_counter()
        torch.cuda.synchronize(x.device)
        self.pays = time.perf_counter() - started < started - begun
        return found

    def _record(self, x: Tensor, t: Tensor) -> None:
        self.x, self.t, graph = x.clone(), t.clone(), torch.cuda.CUDAGraph()
        half, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with (
            torch.autocast("cuda", half, enabled=enabled, cache_enabled=False),  # a cast weight must not outlive or precede the recording
            torch.cuda.device(x.device), torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):  # fmt: skip
            self.found = self.predict(self.x, self.t)
        self.graph = graph

    def _replayed(self, x: Tensor, t: Tensor) -> Prediction:
        self.x.copy_(x)
        self.t.copy_(t)
        assert self.graph is not None
        self.graph.replay()
        return Prediction(*(value.clone() for value in self.found))  # the next replay writes over them, and samplers look back
