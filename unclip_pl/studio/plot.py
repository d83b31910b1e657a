"""Curves of a training run as plain SVG, which needs no script and fits any width."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Curve = Sequence[tuple[int, float]]
COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#be123c", "#0e7490")
LINES = 4
"""Lines across the plot, with a value at each."""


def limits(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """The lowest and the highest value to show: high ones in a curve's first 2 % are cut off."""
    values = sorted(
        value for curve in curves.values() for _, value in curve if math.isfinite(value)
    )
    if not values:
        return 0, 1
    settled = (v for c in curves.values() for _, v in c[len(c) // 50 :] if math.isfinite(v))
    low, high = values[0], max(settled, default=values[-1])
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def plot(curves: Mapping[str, Curve]) -> str:
    """Curves of (step, value) by their names, over one axis of steps."""
    low, high = limits(curves)
    last = max((step for curve in curves.values() for step, _ in curve), default=0) or 1
    drawn, names = "", ""
    for k, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        drawn += f'<polyline stroke="{colour}" points="{points(curve, last, low, high)}"/>'
        names += f'<li><span style="background:{colour}"></span>{escape(name)}</li>'
    across = [k / LINES for k in range(LINES + 1)]
    lines = "".join(f'<line x1="0" x2="1000" y1="{1000 * y:g}" y2="{1000 * y:g}"/>' for y in across)
    values = "".join(f"<span>{high - (high - low) * y:.3g}</span>" for y in across)
    steps = "".join(f"<span>{round(last * x)}</span>" for x in across)
    what = escape(f"Curves of {', '.join(curves)} up to step {last}")
    return (
        f'<div class="plot"><ul>{names}</ul><div class="values" aria-hidden="true">{values}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{what}">'
        f"{lines}{drawn}</svg>"
        f'<div class="steps" aria-hidden="true">{steps}</div></div>'
    )


def points(curve: Curve, last: int, low: float, high: float) -> str:
    """A curve in the coordinates of the SVG, whose sides are 1000; y grows downwards."""
    return " ".join(
        f"{1000 * step / last:.0f},{1000 * (high - value) / (high - low):.0f}"
        for step, value in curve
        if math.isfinite(value)
    )
