"""Figures as inline SVG, coloured by the page's style sheet so that they follow its light and dark scheme.

All functions are pure: the same numbers give the same text. Every name is escaped and cut to length here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from untrojan.report.images import data_uri
from untrojan.report.text import number, shown

HEAT = (208, 66, 27)
"""The heat map's one ink, laid on with an opacity: it stands out on white and on near-black alike."""

_VECTOR_CLASSES = 30
_NUMBERED_CLASSES = 12
_MOST_CELLS = 200


def heat_map(
    norms: Tensor,
    class_names: Sequence[str],
    marked: Sequence[tuple[int, int]] = (),
) -> Markup:
    """Pattern norms (K, K) of all class pairs, sources in rows and targets in columns.

    A cell's ink is the reciprocal of its norm, from none at 0 to full at the largest; up to twelve classes the
    norm is also written in the cell. Not-finite cells off the diagonal are pairs for which no pattern was
    found and are hatched. ``marked`` pairs (source, target) are outlined. Past thirty classes the cells are
    one embedded bitmap; past two hundred each cell is the largest of a block.
    """
    reciprocals = 1 / norms.double()
    count = len(class_names)
    wide, high, font = _cell_size(count)
    left, top = (118.0, 92.0) if count <= _VECTOR_CLASSES else (104.0, 104.0)
    width, height = left + wide * count + 14, top + high * count + 56
    strongest = _largest(reciprocals)
    body = [_heat_labels(class_names, {t for _, t in marked}, left, top, wide, high, font)]
    if count <= _VECTOR_CLASSES:
        body.append(_heat_cells(norms, reciprocals / strongest, class_names, left, top, wide, high))
    else:
        box = f'x="{left:g}" y="{top:g}" width="{wide * count:g}" height="{high * count:g}"'
        uri = data_uri(_heat_bitmap(reciprocals / strongest))
        body.append(f'<image class="pixels" {box} preserveAspectRatio="none" href="{uri}"/>')
        body.append(f'<rect class="frame" {box}/>')
    for source, target in marked:
        x, y = left + wide * target, top + high * source
        body.append(f'<rect class="marked" stroke-width="{1.2 if high < 16 else 2}" x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}"/>')
    body.append(_heat_legend(strongest, left, top + high * count + 22))
    finite = norms[torch.isfinite(norms)]
    spread = f"from {number(float(finite.min()))} to {number(float(finite.max()))}" if len(finite) else "none"
    alt = f"Heat map of {count} by {count} class pairs; pattern norms {spread}; {len(marked)} pairs outlined."
    least = width if count > _VECTOR_CLASSES else 0.8 * width
    return _svg(width, height, alt, body, least)


def _cell_size(count: int) -> tuple[float, float, float]:
    if count <= _NUMBERED_CLASSES:
        return min(76.0, 760 / count), 34.0, 12.5
    if count <= _VECTOR_CLASSES:
        return 840 / count, min(32.0, 780 / count), 12.0
    side = max(900 / count, 9.0) if count <= 120 else 900 / count
    return side, side, 8.5 if count > 60 else 10.0


def _largest(values: Tensor) -> float:
    finite = values[torch.isfinite(values)]
    return float(finite.max()) if len(finite) and float(finite.max()) > 0 else 1.0


def _heat_labels(
    names: Sequence[str], targets: set[int], left: float, top: float, wide: float, high: float, font: float
) -> str:
    """Row and column names; where they would run into each other, every n-th and each marked one."""
    step = max(1, math.ceil((font + 0.3) / high))
    turn = -90 if len(names) > _VECTOR_CLASSES else -38
    out = [
        f'<text class="axis" x="{left + wide * len(names) / 2:g}" y="13" text-anchor="middle">target class '
        "(the label the pattern forces)</text>",
        f'<text class="axis" x="0" y="0" text-anchor="middle" transform="translate(12 '
        f'{top + high * len(names) / 2:g}) rotate(-90)">source class</text>',
    ]
    for index, name in enumerate(names):
        if index % step and index not in targets:
            continue
        label = escape(shown(name, 14))
        strong = ' class="strong"' if index in targets else ""
        if not index % step:
            y = top + high * (index + 0.5) + font * 0.35
            out.append(f'<text x="{left - 7:g}" y="{y:g}" font-size="{font:g}" text-anchor="end">{label}</text>')
        x = left + wide * (index + 0.5) + (font * 0.35 if turn == -90 else 0)
        out.append(
            f'<text{strong} font-size="{font:g}" transform="translate({x:g} {top - 7:g}) rotate({turn})">'
            f"{label}</text>"
        )
    return "".join(out)


def _heat_cells(
    norms: Tensor, ink: Tensor, names: Sequence[str], left: float, top: float, wide: float, high: float
) -> str:
    out = []
    labels = [escape(shown(name, 32)) for name in names]
    for source, row in enumerate(norms.tolist()):
        for target, norm in enumerate(row):
            box = (
                f'x="{left + wide * target:g}" y="{top + high * source:g}" '
                f'width="{wide - 1:g}" height="{high - 1:g}"'
            )
            if source == target:
                out.append(f'<rect class="diagonal" {box}/>')
                continue
            pair = f"{labels[source]} → {labels[target]}"
            if not math.isfinite(norm):
                out.append(f'<rect class="failed" {box}><title>{pair}: no pattern found</title></rect>')
                continue
            strength = max(0.0, min(1.0, float(ink[source, target])))
            out.append(
                f'<rect class="heat" {box} fill-opacity="{0.03 + 0.97 * strength:.3f}">'
                f"<title>{pair}: norm {number(norm)}</title></rect>"
            )
            if len(names) <= _NUMBERED_CLASSES:
                x, y = left + wide * (target + 0.5), top + high * (source + 0.5) + 4
                tone = "on-heat" if strength > 0.6 else "in-cell"
                out.append(f'<text class="{tone}" x="{x:g}" y="{y:g}" text-anchor="middle">{number(norm)}</text>')
    return "".join(out)


def _heat_bitmap(ink: Tensor) -> Tensor:
    """uint8 (4, K, K): the one ink with an opacity a cell; grey where no pattern was found."""
    block = math.ceil(len(ink) / _MOST_CELLS)
    missing = ~torch.isfinite(ink) & ~torch.eye(len(ink), dtype=torch.bool)
    filled = torch.nan_to_num(ink, nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1).float()
    filled = F.max_pool2d(filled[None], block, ceil_mode=True)[0]
    missing = F.max_pool2d(missing[None].float(), block, ceil_mode=True)[0].bool() & (filled == 0)
    opacity = torch.where(missing, 0.28, 0.03 + 0.97 * filled)
    colours = [torch.where(missing, 128.0, float(level)) for level in HEAT]
    return torch.stack([*colours, opacity * 255]).round().to(torch.uint8)


def _heat_legend(strongest: float, left: float, y: float) -> str:
    steps = "".join(
        f'<rect class="heat" x="{left + 9 * i:g}" y="{y:g}" width="9" height="10" '
        f'fill-opacity="{0.03 + 0.97 * i / 19:.3f}"/>'
        for i in range(20)
    )
    smallest = number(1 / strongest)
    return (
        f"{steps}"
        f'<text class="small" x="{left:g}" y="{y + 24:g}">large pattern needed</text>'
        f'<text class="small" x="{left + 192:g}" y="{y + 9:g}">norm {smallest}: the smallest pattern</text>'
    )


def reciprocal_histogram(
    reciprocals: Tensor,
    null: tuple[float, float, float] | None = None,
    outliers: Mapping[str, Sequence[float]] | None = None,
    background: Tensor | None = None,
) -> Markup:
    """Histogram of the reciprocal statistics (any shape; not-finite left out) with the fitted null.

    ``null`` is the Gamma density's (shape, location, scale), drawn as the count it expects in each bin.
    ``background`` holds the reciprocals the null was fitted to (all of them when None). ``outliers`` maps a
    label to the values it marks. The axis is logarithmic where the largest value would leave the rest in a
    corner.
    """
    values = reciprocals[torch.isfinite(reciprocals)].double().flatten()
    if not len(values):
        return Markup("")
    rest = values if background is None else background[torch.isfinite(background)].double().flatten()
    marks = {label: [v for v in found if math.isfinite(v)] for label, found in (outliers or {}).items()}
    axis = _Axis.over(values, rest if len(rest) else values)
    others = torch.histc(axis.place(rest), axis.bins, 0, 1)
    all_bins = torch.histc(axis.place(values), axis.bins, 0, 1)
    expected = axis.expected(null, len(rest)) if null else []
    tallest = max(float(all_bins.max()), max((y for _, y in expected), default=0.0), 1.0)
    plot = _Plot(34 + 17 * min(len(marks), 6), all_bins, tallest)
    body = [_histogram_axes(plot, axis), _bars(plot, all_bins, "outside"), _bars(plot, others, "inside")]
    if expected:
        path = "L".join(f"{plot.x(u):.1f} {plot.y(min(y, tallest)):.1f}" for u, y in expected)
        body.append(f'<path class="null" d="M{path}"/>')
    body.append(_outlier_marks(plot, axis, marks))
    body.append(_histogram_key(plot, bool(expected), len(others) and bool((all_bins > others).any())))
    marked = sum(map(len, marks.values()))
    alt = (
        f"Histogram of {len(values)} reciprocal pattern norms from {number(float(values.min()))} to "
        f"{number(float(values.max()))}{', with the fitted null density' if expected else ''}; "
        f"{marked} outliers marked."
    )
    return _svg(plot.left + plot.width + 16, plot.top + plot.height + 72, alt, body, 540)


class _Axis:
    """The horizontal axis, linear from 0 or logarithmic; a place on it lies in [0, 1]."""

    def __init__(self, low: float, high: float, logarithmic: bool, bins: int) -> None:
        self.low, self.high, self.logarithmic, self.bins = low, high, logarithmic, bins

    @classmethod
    def over(cls, values: Tensor, rest: Tensor) -> _Axis:
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

    def value(self, place: float) -> float:
        if self.logarithmic:
            return float(self.low * (self.high / self.low) ** place)
        return self.low + (self.high - self.low) * place

    def expected(self, null: tuple[float, float, float], count: int) -> list[tuple[float, float]]:
        """The count the Gamma null expects in a bin centred at each of 240 places."""
        from scipy.special import gammainc

        shape, location, scale = null
        if not (shape > 0 and scale > 0 and all(map(math.isfinite, null))):
            return []

        def below(place: float) -> float:
            return float(gammainc(shape, max(0.0, (self.value(place) - location) / scale)))

        half = 0.5 / self.bins
        places = [i / 240 for i in range(241)]
        return [(u, count * (below(min(1, u + half)) - below(max(0, u - half)))) for u in places]

    def ticks(self) -> list[float]:
        if self.logarithmic:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if high - low <= 3 else (1,)
            every = [step * 10.0**power for power in range(low, high + 1) for step in steps]
        else:
            step = _round_step((self.high - self.low) / 6)
            every = [step * i for i in range(math.floor(self.high / step) + 1)]
        return [tick for tick in every if self.low <= tick <= self.high]


class _Plot:
    """Places in [0, 1] and counts to user units; ``counts`` are the bars."""

    def __init__(self, top: float, counts: Tensor, tallest: float) -> None:
        self.left, self.top, self.width, self.height = 46.0, top, 640.0, 210.0
        self.counts, self.tallest = counts, tallest

    def x(self, place: float) -> float:
        return self.left + self.width * place

    def y(self, amount: float) -> float:
        return self.top + self.height * (1 - amount / self.tallest)

    def above(self, x: float) -> float:
        """Just over the bar at ``x``."""
        bin_ = min(len(self.counts) - 1, int((x - self.left) / self.width * len(self.counts)))
        return self.y(float(self.counts[bin_])) - 3


def _round_step(rough: float) -> float:
    """The round number (1, 2, 5 times a power of ten) at or above ``rough``."""
    decade = 10.0 ** math.floor(math.log10(max(rough, 1e-12)))
    return next(step * decade for step in (1, 2, 5, 10) if step * decade >= rough * (1 - 1e-9))


def _histogram_axes(plot: _Plot, axis: _Axis) -> str:
    base = plot.top + plot.height
    out = []
    step = max(1.0, _round_step(plot.tallest / 5))
    for i in range(math.floor(plot.tallest / step) + 1):
        y = plot.y(step * i)
        out.append(f'<path class="grid" d="M{plot.left:g} {y:.1f}h{plot.width:g}"/>')
        out.append(f'<text class="small" x="{plot.left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{step * i:,.0f}</text>')
    for tick in axis.ticks():
        x = plot.x(float(axis.place(torch.tensor([tick], dtype=torch.float64))))
        out.append(f'<path class="tick" d="M{x:.1f} {base:g}v5"/>')
        out.append(f'<text class="small" x="{x:.1f}" y="{base + 18:g}" text-anchor="middle">{tick:g}</text>')
    scale = ", logarithmic scale" if axis.logarithmic else ""
    out.append(
        f'<text class="axis" x="{plot.x(0.5):g}" y="{base + 38:g}" text-anchor="middle">'
        f"reciprocal of the pattern norm, 1/‖v‖₂{scale}</text>"
    )
    out.append(
        f'<text class="axis" transform="translate(11 {plot.top + plot.height / 2:g}) rotate(-90)" '
        'text-anchor="middle">class pairs</text>'
    )
    return "".join(out)


def _bars(plot: _Plot, counts: Tensor, kind: str) -> str:
    wide = plot.width / len(counts)
    out = []
    for i, amount in enumerate(counts.tolist()):
        if amount > 0:
            tall = max(2.0, plot.top + plot.height - plot.y(amount))
            out.append(
                f'<rect class="{kind}" x="{plot.left + wide * i:.2f}" y="{plot.top + plot.height - tall:.2f}" '
                f'width="{wide - 0.8:.2f}" height="{tall:.2f}"/>'
            )
    return "".join(out)


def _outlier_marks(plot: _Plot, axis: _Axis, marks: Mapping[str, Sequence[float]]) -> str:
    """A triangle on the bar that holds each value, and one line and label for each name."""
    out = []
    for row, (label, values) in enumerate(marks.items()):
        places = [plot.x(float(axis.place(torch.tensor([v], dtype=torch.float64)))) for v in values]
        out += [f'<path class="outlier" d="M{x:.1f} {plot.above(x):.1f}l-4.5 -8h9z"/>' for x in places]
        if row >= 6 or not places:
            continue
        furthest, y = max(places), plot.top - 20 - 17 * row
        out.append(f'<path class="leader" d="M{furthest:.1f} {plot.above(furthest) - 9:.1f}V{y + 4:g}"/>')
        anchor, shift = ("end", 4) if furthest > plot.left + plot.width * 0.5 else ("start", -4)
        out.append(
            f'<text class="outlier-label" x="{furthest + shift:.1f}" y="{y:g}" text-anchor="{anchor}">'
            f"{escape(shown(label, 60))}</text>"
        )
    return "".join(out)


def _histogram_key(plot: _Plot, with_null: bool, with_outside: bool | int) -> str:
    y, x = plot.top + plot.height + 58, plot.left
    out = [f'<rect class="inside" x="{x:g}" y="{y - 9:g}" width="12" height="10"/>']
    out.append(f'<text class="small" x="{x + 18:g}" y="{y:g}">class pairs</text>')
    x += 104
    if with_outside:
        out.append(f'<rect class="outside" x="{x:g}" y="{y - 9:g}" width="12" height="10"/>')
        out.append(f'<text class="small" x="{x + 18:g}" y="{y:g}">pairs into a detected target</text>')
        x += 204
    if with_null:
        out.append(f'<path class="null" d="M{x:g} {y - 4:g}h20"/>')
        out.append(f'<text class="small" x="{x + 26:g}" y="{y:g}">what a clean set would show (fitted null)</text>')
    return "".join(out)


def curves(series: Mapping[str, Sequence[float]], y_label: str, x_label: str = "epoch") -> Markup:
    """Lines over steps 1, 2, ...; told apart by dashes and by a name at each line's end, not by colour alone.

    Not-finite values break a line. Fractions are drawn as they are: scale them first.
    """
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    if not finite:
        return Markup("")
    longest = max(map(len, series.values()))
    step = _round_step((max(*finite, 0.0) - min(*finite, 0.0) or 1) / 5)
    low, high = step * math.floor(min(*finite, 0.0) / step), step * math.ceil(max(*finite, 0.0) / step)
    high = high if high > low else low + step
    left, top, width, height = 46.0, 14.0, 330.0, 150.0

    def at(index: int, value: float) -> tuple[float, float]:
        along = index / max(1, longest - 1)
        return left + width * along, top + height * (1 - (value - low) / (high - low))

    body = []
    for i in range(round((high - low) / step) + 1):
        y = at(0, low + step * i)[1]
        body.append(f'<path class="grid" d="M{left:g} {y:.1f}h{width:g}"/>')
        body.append(f'<text class="small" x="{left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{low + step * i:g}</text>')
    every = max(1, round(_round_step(longest / 6)))
    for i in [0, *range(every - 1, longest, every)] if every > 1 else range(longest):
        x = at(i, low)[0]
        body.append(f'<text class="small" x="{x:.1f}" y="{top + height + 16:g}" text-anchor="middle">{i + 1}</text>')
    body.append(
        f'<text class="axis" x="{left + width / 2:g}" y="{top + height + 34:g}" text-anchor="middle">'
        f"{escape(shown(x_label))}</text>"
    )
    heights: list[float] = []
    for order, (name, values) in enumerate(series.items()):
        body.append(_curve(order, name, [at(i, v) for i, v in enumerate(values)], heights))
    last = "; ".join(f"{shown(name)} ends at {number(values[-1])}" for name, values in series.items() if values)
    return _svg(left + width + 112, top + height + 42, f"{shown(y_label)} by {shown(x_label)}: {last}.", body, 300)


def _curve(order: int, name: str, points: list[tuple[float, float]], heights: list[float]) -> str:
    path, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            path.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = math.isfinite(y)
    ends = [(x, y) for x, y in points if math.isfinite(y)]
    if not ends:
        return ""
    x, y = ends[-1]
    while any(abs(y - taken) < 14 for taken in heights):
        y += 14
    heights.append(y)
    return (
        f'<path class="curve curve-{order % 3}" d="{"".join(path)}"/>'
        f'<circle class="dot-{order % 3}" cx="{x:.1f}" cy="{ends[-1][1]:.1f}" r="2.6"/>'
        f'<text class="small" x="{x + 8:.1f}" y="{y + 4:.1f}">{escape(shown(name, 18))}</text>'
    )


def _svg(width: float, height: float, alt: str, body: Sequence[str], least_width: float) -> Markup:
    style = f"max-width:{width:.0f}px;min-width:{least_width:.0f}px"
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" style="{style}" role="img" aria-label="{escape(alt)}">'
        f"{''.join(body)}</svg>"
    )
