"""Functions from Predict to Predict: classifier-free guidance (Ho and Salimans 2022), thresholds of x0, and known pixels (as RePaint keeps them).

Order: adapt, guide, threshold, repaint.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Predict, Prediction, Process

Both = Callable[[Tensor, Tensor], tuple[Prediction, Prediction]]


def guided(both: Both, scale: float) -> Predict:
    """null + scale (conditional - null), for x0 and eps alike; scale 1 is the conditional, 0 the null. Variance: the conditional's.

    `both(x, t) -> (conditional, null)`: one doubled batch or two passes over the same x_t, as the stage likes.
    """

    def predict(x: Tensor, t: Tensor) -> Prediction:
        cond, null = both(x, t)
        return cond._replace(
            x0=torch.lerp(null.x0, cond.x0, scale), eps=torch.lerp(null.eps, cond.eps, scale)
        )

    return predict


def halves(predict: Predict) -> Both:
    """`predict` whose conditions are a doubled batch, (conditional, null), as a pair for the x_t of a single one."""

    def both(x: Tensor, t: Tensor) -> tuple[Prediction, Prediction]:
        conditional, null = zip(
            *(value.chunk(2) for value in predict(torch.cat([x, x]), torch.cat([t, t]))),
            strict=True,
        )
        return Prediction(*conditional), Prediction(*null)

    return both


def static_threshold(x0: Tensor, limit: float = 1.0) -> Tensor:
    """x0 clamped to [-limit, limit]."""
    return x0.clamp(-limit, limit)


def dynamic_threshold(
    x0: Tensor, limit: float = 1.0, quantile: float = 0.995, ceiling: float | None = None
) -> Tensor:
    """x0 of each sample clamped to its `quantile` s of |x0| and divided back into [-limit, limit] where s > limit (Imagen, section 2.3).

    `ceiling`: s is at most this; None: no bound. x0 (B, ...).
    """
    # one sample at a time: torch.quantile refuses more than 2^24 elements
    s = torch.stack([torch.quantile(row, quantile) for row in x0.abs().flatten(1)]).clamp(
        limit, ceiling
    )
    s = s.view((-1,) + (1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) * (limit / s)


THRESHOLDS: dict[str, Callable[..., Tensor]] = {
    "static": static_threshold,
    "dynamic": dynamic_threshold,
}


def thresholded(
    predict: Predict, process: Process, mode: str | None = "static", **options: float | None
) -> Predict:
    """`predict` with x0 held in range and eps derived again from it, so that both still describe x_t.

    mode: "static", "dynamic" or None (unchanged); options: those of the threshold (limit; quantile, ceiling). ValueError for another mode.
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
        x0 = threshold(prediction.x0, **options)
        return prediction._replace(x0=x0, eps=process.x0_to_eps(x0, x, t))

    return predict_within


def repainted(predict: Predict, process: Process, known: Tensor, mask: Tensor) -> Predict:
    """`predict` for a sample of which a part is known: where `mask` is False, x0 is `known` and eps what x_t then holds; `predict` sees all of x_t.

    The posterior of DDPM and the step of DDIM, given x0, are those of the forward process: so the known part passes through its own noisy versions, drawn
    jointly over the steps, where RePaint (Lugmayr et al. 2022, eq. 8) draws each anew, and ends as `known` exactly. known (B, ...), mask broadcastable.
    """

    def predict_rest(x: Tensor, t: Tensor) -> Prediction:
        prediction = predict(x, t)
        x0 = torch.where(mask, prediction.x0, known)
        return prediction._replace(
            x0=x0, eps=torch.where(mask, prediction.eps, process.x0_to_eps(x0, x, t))
        )

    return predict_rest
