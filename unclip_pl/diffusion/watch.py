"""Watch a sampler: see x0 after each step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from unclip_pl.diffusion.process import Predict, Prediction


def watched(predict: Predict, watch: Callable[[Tensor], object]) -> Predict:
    """`predict`, which also calls `watch` with each x0, shaped as x."""

    def predict_shown(x: Tensor, t: Tensor) -> Prediction:
        prediction = predict(x, t)
        watch(prediction.x0)
        return prediction

    return predict_shown


@contextmanager
def watching(stages: Iterable[Any], watch: Callable[[Tensor], object]) -> Iterator[None]:
    """While the body runs, `watch` is called with each x0 that these stages predict."""
    stages = [*stages]
    try:
        for stage in stages:
            stage.watch = watch
        yield
    finally:
        for stage in stages:
            stage.watch = None
