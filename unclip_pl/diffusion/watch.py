"""Look at what a sampler draws while it draws."""

from collections.abc import Callable

from torch import Tensor

from unclip_pl.diffusion.process import Predict, Prediction


def watched(predict: Predict, watch: Callable[[Tensor], object]) -> Predict:
    """`predict`, of which `watch` is shown each x0, shaped as x."""

    def predict_shown(x: Tensor, t: Tensor) -> Prediction:
        prediction = predict(x, t)
        watch(prediction.x0)
        return prediction

    return predict_shown
