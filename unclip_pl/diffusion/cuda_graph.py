"""A predictor that a GPU runs as one CUDA graph instead of a thousand kernels started one by one.

It pays where kernels finish sooner than Python can start them: small networks, few pictures, and
more than a few steps, since the first two steps of each run take as long as without it.
`torch.compile(mode="reduce-overhead")` records graphs too, one per compiled block; this wrapper
records a whole denoising step, compiled or not.
"""

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Predict, Prediction


class CUDAGraphPredict:
    """`predict` for one sampling run: the first step runs as usual, the second is recorded.

    All calls must have the shapes of the second; other shapes, and other devices than GPUs, are
    passed on to `predict`. `predict` may not wait for the GPU. Results are equal up to rounding,
    since libraries may choose other kernels while they are recorded. The recording and its memory
    live as long as this object.
    """

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        if x.device.type != "cuda" or torch.is_grad_enabled():
            return self.predict(x, t)
        if not self.warm:  # also loads what cuDNN and cuBLAS need, which cannot be recorded
            self.warm = True
            with _autocast_without_cache():
                return self.predict(x, t)
        if self.graph is None:
            self._record(x, t)
        elif (x.shape, x.dtype) != (self.x.shape, self.x.dtype):
            return self.predict(x, t)
        self.x.copy_(x)
        self.t.copy_(t)
        assert self.graph is not None
        self.graph.replay()
        # Copies, because samplers look back at earlier steps and the next replay overwrites these.
        return Prediction(*(value.clone() for value in self.output))

    def _record(self, x: Tensor, t: Tensor) -> None:
        self.x, self.t = x.clone(), t.clone()
        graph = torch.cuda.CUDAGraph()
        with (
            _autocast_without_cache(),
            torch.cuda.device(x.device),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            self.output = self.predict(self.x, self.t)
        self.graph = graph


def _autocast_without_cache() -> torch.autocast:
    """autocast as it is, but without its cache, which would keep weights cast in the recording.

    The first step has it as well: compiled networks would be compiled again while they are
    recorded if anything about autocast differed.
    """
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)
