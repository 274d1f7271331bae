"""Learning curves, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from untrojan.report import svg
from untrojan.report.text import number, shown

_LEFT, _TOP, _WIDTH, _HEIGHT = 46.0, 14.0, 330.0, 150.0


def curves(series: Mapping[str, Sequence[float]], y_label: str, x_label: str = "epoch") -> Markup:
    """Lines over steps 1, 2, ...; told apart by dashes and by a name at each line's end, not by colour alone.

    Not-finite values break a line. Empty without a finite value.
    """
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    if not finite:
        return Markup("")
    longest = max(map(len, series.values()))
    step = svg.round_step((max(*finite, 0.0) - min(*finite, 0.0) or 1) / 5)
    low, high = step * math.floor(min(*finite, 0.0) / step), step * math.ceil(max(*finite, 0.0) / step)
    high = high if high > low else low + step

    def at(index: int, value: float) -> tuple[float, float]:
        along = index / max(1, longest - 1)
        return _LEFT + _WIDTH * along, _TOP + _HEIGHT * (1 - (value - low) / (high - low))

    body = []
    for i in range(round((high - low) / step) + 1):
        y = at(0, low + step * i)[1]
        body.append(svg.path(f"M{_LEFT:g} {y:.1f}h{_WIDTH:g}", "grid"))
        body.append(svg.text(_LEFT - 7, y + 4, f"{low + step * i:g}", "small", "end"))
    every = max(1, round(svg.round_step(longest / 6)))
    base = _TOP + _HEIGHT
    for i in sorted({0, *range(every - 1, longest, every)}):
        body.append(svg.text(at(i, low)[0], base + 16, f"{i + 1}", "small", "middle"))
    body.append(svg.text(_LEFT + _WIDTH / 2, base + 34, shown(x_label), "axis", "middle"))
    taken: list[float] = []
    for order, (name, values) in enumerate(series.items()):
        body.append(_curve(order, name, [at(i, v) for i, v in enumerate(values)], taken))
    last = "; ".join(
        f"{shown(name)} ends at {number(values[-1])}" for name, values in series.items() if values
    )
    alt = f"{shown(y_label)} by {shown(x_label)}: {last}."
    return svg.figure(_LEFT + _WIDTH + 112, base + 42, alt, body, 300)


def _curve(order: int, name: str, points: list[tuple[float, float]], taken: list[float]) -> str:
    """One line, a dot and a name at its end; ``taken`` are the heights of the names so far."""
    steps, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            steps.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = math.isfinite(y)
    ends = [(x, y) for x, y in points if math.isfinite(y)]
    if not ends:
        return ""
    x, y = ends[-1]
    height = y
    while any(abs(height - other) < 14 for other in taken):
        height += 14
    taken.append(height)
    return (
        svg.path("".join(steps), f"curve curve-{order % 3}")
        + f'<circle class="dot-{order % 3}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
        + svg.text(x + 8, height + 4, shown(name, 18), "small")
    )
