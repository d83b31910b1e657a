"""Functions from Predict to Predict: guidance, thresholds of x0, and known pixels.

Apply them in this order: adapt (`Process.adapt`), guide, threshold, repaint.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Predict, Prediction, Process


def classifier_free_guidance(predict: Predict, scale: float) -> Predict:
    """Classifier-free guidance (Ho and Salimans 2022): uncond + scale (cond - uncond).

    Args:
        predict: has the conditions of a doubled batch, the conditional rows first, then the
            unconditional ones. Both come from one pass.
        scale: 1 is the conditional prediction, 0 the unconditional one.

    Returns:
        `predict` for a single batch, with x0 and eps guided; the variance is that of the
        conditional prediction.
    """

    def guided(x: Tensor, t: Tensor) -> Prediction:
        both = predict(torch.cat([x, x]), torch.cat([t, t]))
        x0, eps, log_var = (value.chunk(2) for value in both)
        guided_x0 = torch.lerp(x0[1], x0[0], scale)
        guided_eps = torch.lerp(eps[1], eps[0], scale)
        return Prediction(guided_x0, guided_eps, log_var[0])

    return guided


def static_threshold(x0: Tensor, limit: float = 1.0) -> Tensor:
    """x0 clamped to [-limit, limit]."""
    return x0.clamp(-limit, limit)


def dynamic_threshold(x0: Tensor, limit: float = 1.0, quantile: float = 0.995) -> Tensor:
    """Keep x0 in range by dynamic thresholding (Imagen, section 2.3).

    Each sample of x0 is clamped to the `quantile` s of its |x0|. Where s > limit, the sample is
    then scaled back into [-limit, limit].

    Args:
        x0: (B, ...), the predicted clean samples.
        limit: the result lies in [-limit, limit].
        quantile: 0 to 1.
    """
    # One sample at a time: torch.quantile refuses more than 2^24 elements.
    s = torch.stack([torch.quantile(row, quantile) for row in x0.abs().flatten(1)])
    s = s.clamp(min=limit).view((-1,) + (1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) * (limit / s)


THRESHOLDS: dict[str, Callable[..., Tensor]] = {
    "static": static_threshold,
    "dynamic": dynamic_threshold,
}


def thresholded(
    predict: Predict, process: Process, mode: str | None = "static", limit: float = 1.0
) -> Predict:
    """`predict` with x0 kept in range, and eps computed again to match x0 and x_t.

    Args:
        predict: (x, t) -> Prediction.
        process: computes eps from x0 and x_t.
        mode: "static", "dynamic", or None for `predict` itself.
        limit: x0 is kept in [-limit, limit].

    Raises:
        ValueError: there is no such mode.
    """
    if mode is None:
        return predict
    if mode not in THRESHOLDS:
        raise ValueError(
            f"there is no threshold {mode!r}: choose one of {', '.join(THRESHOLDS)} or none"
        )
    threshold = THRESHOLDS[mode]

    def predict_within(x: Tensor, t: Tensor) -> Prediction:
        prediction = predict(x, t)
        x0 = threshold(prediction.x0, limit)
        return prediction._replace(x0=x0, eps=process.x0_to_eps(x0, x, t))

    return predict_within


def repainted(predict: Predict, process: Process, known: Tensor, mask: Tensor) -> Predict:
    """`predict` for a sample of which a part is known (after RePaint, Lugmayr et al. 2022).

    Where `mask` is False, x0 is `known` and eps is what x_t then contains; `predict` sees all of
    x_t. The posterior of DDPM and the step of DDIM, given x0, are those of the forward process, so
    the known part passes through noisy versions of itself that belong together, and ends as
    `known` exactly. RePaint (eq. 8) draws each of them independently instead.

    Args:
        predict: (x, t) -> Prediction.
        process: computes eps from x0 and x_t.
        known: (B, ...), the clean sample.
        mask: bool, broadcastable to x_t; True where `predict` decides.
    """

    def predict_rest(x: Tensor, t: Tensor) -> Prediction:
        prediction = predict(x, t)
        x0 = torch.where(mask, prediction.x0, known)
        eps = torch.where(mask, prediction.eps, process.x0_to_eps(x0, x, t))
        return prediction._replace(x0=x0, eps=eps)

    return predict_rest
