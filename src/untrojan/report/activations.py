"""Two histograms of one channel's activations, one above the other's ground, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from untrojan.report import svg
from untrojan.report.text import number, shown

_LEFT, _TOP, _WIDTH, _HEIGHT = 46.0, 12.0, 380.0, 130.0


def activation_histogram(edges: Sequence[float], groups: Sequence[tuple[str, Sequence[int]]]) -> Markup:
    """Counts between ``edges`` (B + 1,) of two ``groups``, each a name and (B,) counts.

    Each group's bars are shares of that group, in per cent: the first is filled, the second an outline.
    A line marks zero, the bend of ReLU.
    """
    shares = [[100 * count / max(1, sum(counts)) for count in counts] for _, counts in groups]
    tallest = max((share for each in shares for share in each), default=0.0) or 1.0
    low, span = edges[0], (edges[-1] - edges[0]) or 1.0
    base = _TOP + _HEIGHT

    def x(value: float) -> float:
        return _LEFT + _WIDTH * (value - low) / span

    def y(share: float) -> float:
        return base - _HEIGHT * share / tallest

    body = []
    step = svg.round_step(tallest / 4)
    for i in range(int(tallest / step) + 1):
        body.append(svg.path(f"M{_LEFT:g} {y(step * i):.1f}h{_WIDTH:g}", "grid"))
        body.append(svg.text(_LEFT - 7, y(step * i) + 4, f"{step * i:g} %", "small", "end"))
    wide = _WIDTH / max(1, len(edges) - 1)
    for i, share in enumerate(shares[0]):
        if share:
            tall = max(1.5, base - y(share))
            body.append(svg.rect(_LEFT + wide * i, base - tall, wide - 0.6, tall, "outlier"))
    outline = "".join(f"V{y(share):.1f}h{wide:.2f}" for share in shares[1])
    body.append(svg.path(f"M{_LEFT:g} {base:g}{outline}V{base:g}", "null"))
    for value in (edges[0], edges[-1]):
        body.append(svg.text(x(value), base + 17, number(value), "small", "middle"))
    if edges[0] < 0 < edges[-1]:
        body.append(svg.path(f"M{x(0):.1f} {_TOP:g}V{base + 4:g}", "tick"))
        if 0.12 < -edges[0] / span < 0.88:
            body.append(svg.text(x(0), base + 17, "0", "small", "middle"))
    key = base + 36
    body += [
        svg.rect(_LEFT, key - 9, 12, 10, "outlier"),
        svg.path(f"M{_LEFT + 160:g} {key - 4:g}h20", "null"),
    ]
    for place, (name, counts) in zip((_LEFT + 18, _LEFT + 186), groups, strict=True):
        body.append(svg.text(place, key, f"{shown(name, 20)} ({sum(counts):,})", "small"))
    alt = "Activations from {} to {} of {}.".format(
        number(edges[0]), number(edges[-1]),
        " and of ".join(f"{sum(counts)} {shown(name, 40)}" for name, counts in groups),
    )  # fmt: skip
    return svg.figure(_LEFT + _WIDTH + 24, key + 8, alt, body, 300)
