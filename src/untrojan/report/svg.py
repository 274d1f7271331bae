"""The few SVG elements the figures are made of; whatever text goes in is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from markupsafe import Markup


def text(
    x: float, y: float, words: str, css: str = "", anchor: str = "start", turn: float = 0, size: float = 0
) -> str:
    """A line of text at (x, y), turned by ``turn`` degrees about that point."""
    place = f'transform="translate({x:.4g} {y:.4g}) rotate({turn:g})"' if turn else f'x="{x:.4g}" y="{y:.4g}"'
    font = f' font-size="{size:g}"' if size else ""
    return f'<text class="{css}" {place} text-anchor="{anchor}"{font}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, css: str, extra: str = "", title: str = "") -> str:
    """A rectangle; ``extra`` is trusted attribute text, ``title`` what a pointer shows."""
    box = f'<rect class="{css}" {box_of(x, y, width, height)}{" " if extra else ""}{extra}'
    return f"{box}><title>{escape(title)}</title></rect>" if title else f"{box}/>"


def box_of(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}"'


def path(d: str, css: str) -> str:
    return f'<path class="{css}" d="{d}"/>'


def figure(width: float, height: float, alt: str, body: Sequence[str], least_width: float) -> Markup:
    """The whole drawing: scales with the page between ``least_width`` and its own width, in pixels."""
    style = f"max-width:{width:.0f}px;min-width:{least_width:.0f}px"
    return Markup(
        f'<svg viewBox="0 0 {width:.5g} {height:.5g}" style="{style}" role="img" aria-label="{escape(alt)}">'
        f"{''.join(body)}</svg>"
    )


def round_step(rough: float) -> float:
    """The round number (1, 2, 5 times a power of ten) at or above ``rough``."""
    decade = 10.0 ** math.floor(math.log10(max(rough, 1e-12)))
    return next(step * decade for step in (1, 2, 5, 10) if step * decade >= rough * (1 - 1e-9))
