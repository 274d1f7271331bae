"""The histogram of reciprocal statistics with the fitted null, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch import Tensor

from untrojan.report import svg
from untrojan.report.text import number, shown

Null = tuple[float, float, float]
"""A Gamma density's (shape, location, scale)."""

_LEFT, _WIDTH, _HEIGHT = 46.0, 570.0, 200.0
_LABELLED = 6


def reciprocal_histogram(
    reciprocals: Tensor,
    null: Null | None = None,
    outliers: Mapping[str, Sequence[float]] | None = None,
    background: Tensor | None = None,
) -> Markup:
    """Histogram of the reciprocal statistics (any shape; not-finite left out) with the fitted null.

    ``null`` is drawn as the count it expects in each bin. ``background`` holds the reciprocals the null
    speaks of (all of them when None). ``outliers`` maps a label to the values it marks. The axis is
    logarithmic where the largest value would push the rest into a corner. Empty without finite values.
    """
    values = reciprocals[torch.isfinite(reciprocals)].double().flatten()
    if not len(values):
        return Markup("")
    rest = values if background is None else background[torch.isfinite(background)].double().flatten()
    finite = {label: [v for v in found if math.isfinite(v)] for label, found in (outliers or {}).items()}
    # The furthest label on top: its line then passes the others' text on the right.
    marks = dict(sorted(finite.items(), key=lambda item: max(item[1], default=0.0)))
    axis = _Axis.over(values, rest if len(rest) else values)
    counts, inside = axis.histogram(values), axis.histogram(rest)
    expected = axis.expected(null, len(rest)) if null else []
    tallest = max(float(counts.max()), max((y for _, y in expected), default=0.0), 1.0)
    plot = _Plot(34 + 17 * min(len(marks), _LABELLED), counts, tallest)
    body = [*_axes(plot, axis), *_bars(plot, counts, "outside"), *_bars(plot, inside, "inside")]
    if expected:
        body.append(svg.path("M" + "L".join(f"{plot.x(u):.1f} {plot.y(y):.1f}" for u, y in expected), "null"))
    body += _marks(plot, axis, marks)
    body += _key(plot, bool(expected), bool((counts > inside).any()))
    alt = (
        f"Histogram of {len(values)} reciprocal pattern norms from {number(float(values.min()))} to "
        f"{number(float(values.max()))}{', with the fitted null density' if expected else ''}; "
        f"{sum(map(len, marks.values()))} outliers marked."
    )
    return svg.figure(_LEFT + _WIDTH + 16, plot.base + 72, alt, body, 450)


@dataclass(frozen=True)
class _Axis:
    """The horizontal axis, linear from 0 or logarithmic; a place on it lies in [0, 1]."""

    low: float
    high: float
    logarithmic: bool
    bins: int

    @classmethod
    def over(cls, values: Tensor, rest: Tensor) -> _Axis:
        # Subsampled: torch.quantile refuses more than 16 million values.
        high, bulk = float(values.max()), float(torch.quantile(rest[:1_000_000], 0.95))
        positive = values[values > 0]
        bins = max(24, min(60, round(math.sqrt(len(values)) * 2.5)))
        if len(positive) and high > 8 * max(bulk, 1e-12):
            return cls(float(positive.min()) / 1.3, high * 1.3, True, bins)
        return cls(0.0, high * 1.06 or 1.0, False, bins)

    def place(self, values: Tensor) -> Tensor:
        if self.logarithmic:
            span = math.log(self.high / self.low)
            return ((values.clamp_min(self.low) / self.low).log() / span).clamp(0, 1)
        return ((values - self.low) / (self.high - self.low)).clamp(0, 1)

    def place_of(self, value: float) -> float:
        return float(self.place(torch.tensor(value, dtype=torch.float64)))

    def value(self, place: float) -> float:
        if self.logarithmic:
            return float(self.low * (self.high / self.low) ** place)
        return self.low + (self.high - self.low) * place

    def histogram(self, values: Tensor) -> Tensor:
        """float (bins,) counts."""
        return torch.histc(self.place(values), self.bins, 0, 1)

    def expected(self, null: Null, count: int) -> list[tuple[float, float]]:
        """(place, count the Gamma null expects in a bin centred there), at 241 places."""
        from scipy.special import gammainc

        shape, location, scale = null
        if not (shape > 0 and scale > 0 and all(map(math.isfinite, null))):
            return []

        def below(place: float) -> float:
            return float(gammainc(shape, max(0.0, (self.value(place) - location) / scale)))

        half = 0.5 / self.bins
        return [(i / 240, count * (below(i / 240 + half) - below(i / 240 - half))) for i in range(241)]

    def ticks(self) -> list[float]:
        if self.logarithmic:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if high - low <= 3 else (1,)
            every = [step * 10.0**power for power in range(low, high + 1) for step in steps]
        else:
            step = svg.round_step((self.high - self.low) / 6)
            every = [step * i for i in range(math.floor(self.high / step) + 1)]
        return [tick for tick in every if self.low <= tick <= self.high]


@dataclass(frozen=True, eq=False)
class _Plot:
    """Places in [0, 1] and counts to pixels; ``counts`` are the bars."""

    top: float
    counts: Tensor
    tallest: float

    @property
    def base(self) -> float:
        return self.top + _HEIGHT

    def x(self, place: float) -> float:
        return _LEFT + _WIDTH * place

    def y(self, amount: float) -> float:
        return self.top + _HEIGHT * (1 - amount / self.tallest)

    def above(self, place: float) -> float:
        """Just over the bar at a place."""
        return self.y(float(self.counts[min(len(self.counts) - 1, int(place * len(self.counts)))])) - 3


def _axes(plot: _Plot, axis: _Axis) -> list[str]:
    out = []
    step = max(1.0, svg.round_step(plot.tallest / 5))
    for i in range(math.floor(plot.tallest / step) + 1):
        y = plot.y(step * i)
        out.append(svg.path(f"M{_LEFT:g} {y:.1f}h{_WIDTH:g}", "grid"))
        out.append(svg.text(_LEFT - 7, y + 4, f"{step * i:,.0f}", "small", "end"))
    for tick in axis.ticks():
        x = plot.x(axis.place_of(tick))
        out.append(svg.path(f"M{x:.1f} {plot.base:g}v5", "tick"))
        out.append(svg.text(x, plot.base + 18, f"{tick:g}", "small", "middle"))
    label = f"reciprocal of the pattern norm, 1/‖v‖₂{', logarithmic scale' if axis.logarithmic else ''}"
    out.append(svg.text(plot.x(0.5), plot.base + 38, label, "axis", "middle"))
    out.append(svg.text(11, plot.top + _HEIGHT / 2, "class pairs", "axis", "middle", turn=-90))
    return out


def _bars(plot: _Plot, counts: Tensor, css: str) -> list[str]:
    wide = _WIDTH / len(counts)
    talls = [
        (i, max(2.0, plot.base - plot.y(amount))) for i, amount in enumerate(counts.tolist()) if amount > 0
    ]
    return [svg.rect(_LEFT + wide * i, plot.base - tall, wide - 0.8, tall, css) for i, tall in talls]


def _marks(plot: _Plot, axis: _Axis, marks: Mapping[str, Sequence[float]]) -> list[str]:
    """A triangle on the bar that holds each value, and one line and label for each name."""
    out = []
    for row, (label, values) in enumerate(marks.items()):
        places = [axis.place_of(value) for value in values]
        out += [svg.path(f"M{plot.x(u):.1f} {plot.above(u):.1f}l-4.5 -8h9z", "outlier") for u in places]
        if row >= _LABELLED or not places:
            continue
        furthest = max(places)
        x, y = plot.x(furthest), plot.top - 20 - 17 * row
        out.append(svg.path(f"M{x:.1f} {plot.above(furthest) - 9:.1f}V{y + 4:g}", "leader"))
        anchor, shift = ("end", 4) if furthest > 0.5 else ("start", -4)
        out.append(svg.text(x + shift, y, shown(label, 60), "outlier-label", anchor))
    return out


def _key(plot: _Plot, with_null: bool, with_outside: bool) -> list[str]:
    y, x = plot.base + 58, _LEFT
    out = [svg.rect(x, y - 9, 12, 10, "inside"), svg.text(x + 18, y, "class pairs", "small")]
    x += 104
    if with_outside:
        out.append(svg.rect(x, y - 9, 12, 10, "outside"))
        out.append(svg.text(x + 18, y, "pairs into a detected target", "small"))
        x += 204
    if with_null:
        out.append(svg.path(f"M{x:g} {y - 4:g}h20", "null"))
        out.append(svg.text(x + 26, y, "what a clean set would show (fitted null)", "small"))
    return out
