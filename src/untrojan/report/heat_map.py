"""The class-pair heat map, as inline SVG coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from untrojan.report import svg
from untrojan.report.images import data_uri
from untrojan.report.text import number, shown

INK = (208, 66, 27)
"""The map's one colour, laid on with an opacity: it stands out on white and on near-black alike."""

_NUMBERED_CLASSES = 12
_VECTOR_CLASSES = 30
_MOST_CELLS = 200
_LABEL = 14
"""Characters of a class name beside the map."""


def reciprocals_of(norms: Tensor) -> Tensor:
    """1 / norm as float64, NaN where the norm is not finite; 1/255 (a grey level of a pixel) stands for 0."""
    norms = norms.double()
    return torch.where(torch.isfinite(norms), 1 / norms.clamp_min(1 / 255), torch.nan)


def heat_map(
    norms: Tensor, class_names: Sequence[str], marked: Sequence[tuple[int, int]] = (), measure: str = "norm"
) -> Markup:
    """Pattern norms (K, K) of all class pairs, sources in rows and targets in columns.

    A cell's ink is the reciprocal of its norm, from none at 0 to full at the largest, or at four times the
    median where none is as large, so that a clean set looks pale. Up to twelve classes the norm is also
    written in the cell. Not-finite cells off the diagonal are pairs for which no pattern was found: grey.
    ``marked`` pairs (source, target) are outlined. Past thirty classes the cells are one embedded bitmap;
    past two hundred each of its cells is the largest of a block. Names are escaped and cut to length.
    ``measure`` is what the values are called.
    """
    grid = _Grid.fitting(class_names)
    reciprocals = reciprocals_of(norms)
    full = _full_ink(reciprocals)
    strength = (reciprocals / full).clamp(0, 1)
    body = [_labels(grid, class_names, {target for _, target in marked})]
    if grid.count <= _VECTOR_CLASSES:
        body += _cells(grid, norms, strength, class_names, measure)
    else:
        box = (grid.left, grid.top, grid.wide * grid.count, grid.high * grid.count)
        href = data_uri(_bitmap(strength))
        body.append(f'<image class="pixels" {svg.box_of(*box)} preserveAspectRatio="none" href="{href}"/>')
        body.append(svg.rect(*box, css="frame"))
    stroke = f'stroke-width="{1.2 if grid.high < 16 else 2}"'
    body += [svg.rect(*grid.cell(s, t), grid.wide, grid.high, "marked", stroke) for s, t in marked]
    body.append(_legend(grid, full, measure))
    finite = norms[torch.isfinite(norms)]
    spread = f"from {number(float(finite.min()))} to {number(float(finite.max()))}" if len(finite) else "none"
    alt = (
        f"Heat map of {grid.count} by {grid.count} class pairs; {measure}s {spread}; "
        f"{len(marked)} pairs outlined."
    )
    least = grid.width * (1 if grid.count > _VECTOR_CLASSES else 0.72)
    return svg.figure(grid.width, grid.height, alt, body, least)


@dataclass(frozen=True)
class _Grid:
    """Where the cells lie, in pixels."""

    count: int
    left: float
    top: float
    right: float
    wide: float
    high: float
    font: float
    turn: float

    @classmethod
    def fitting(cls, names: Sequence[str]) -> _Grid:
        """Cells as large as a page allows, margins as the labels need."""
        count = len(names)
        if count <= _NUMBERED_CLASSES:
            wide, high, font = min(62.0, 740 / count), 34.0, 12.5
        elif count <= _VECTOR_CLASSES:
            wide, high, font = 840 / count, min(32.0, 780 / count), 12.0
        else:
            wide = high = 900 / count
            font = 8.5 if count > 60 else 10.0
        # A letter is taken as 0.62 of the font size wide.
        reach = 0.62 * font * max(len(shown(name, _LABEL)) for name in names)
        if count > _VECTOR_CLASSES:
            return cls(count, reach + 36, reach + 34, 14, wide, high, font, -90)
        right = max(14.0, 0.8 * reach - wide / 2 + 6)
        return cls(count, reach + 36, 0.64 * reach + 42, right, wide, high, font, -38)

    @property
    def width(self) -> float:
        return self.left + self.wide * self.count + self.right

    @property
    def height(self) -> float:
        return self.top + self.high * self.count + 40

    def cell(self, source: float, target: float) -> tuple[float, float]:
        """The upper left corner of a cell."""
        return self.left + self.wide * target, self.top + self.high * source


def _full_ink(reciprocals: Tensor) -> float:
    """The reciprocal that gets full ink."""
    finite = reciprocals[torch.isfinite(reciprocals)]
    strongest = max(float(finite.max()), 4 * float(finite.median())) if len(finite) else 0.0
    return strongest if strongest > 0 else 1.0


def _labels(grid: _Grid, names: Sequence[str], targets: set[int]) -> str:
    """Row and column names; where they would run into each other, every n-th and each marked column."""
    step = max(1, math.ceil((grid.font + 0.3) / grid.high))
    middle_y, middle_x = grid.cell(0, grid.count / 2)[0], grid.cell(grid.count / 2, 0)[1]
    out = [
        svg.text(middle_y, 13, "target class (the label the pattern forces)", "axis", "middle"),
        svg.text(12, middle_x, "source class", "axis", "middle", turn=-90),
    ]
    drop = grid.font * 0.35
    for index, name in enumerate(names):
        label = shown(name, _LABEL)
        if not index % step:
            y = grid.cell(index + 0.5, 0)[1] + drop
            out.append(svg.text(grid.left - 7, y, label, anchor="end", size=grid.font))
        if not index % step or index in targets:
            x = grid.cell(0, index + 0.5)[0] + (drop if grid.turn == -90 else 0)
            css = "strong" if index in targets else ""
            out.append(svg.text(x, grid.top - 7, label, css, turn=grid.turn, size=grid.font))
    return "".join(out)


def _cells(grid: _Grid, norms: Tensor, strength: Tensor, names: Sequence[str], measure: str) -> list[str]:
    out = []
    labels = [shown(name, 32) for name in names]
    for source, row in enumerate(norms.tolist()):
        for target, norm in enumerate(row):
            x, y = grid.cell(source, target)
            wide, high = grid.wide - 1, grid.high - 1
            pair = f"{labels[source]} → {labels[target]}"
            if source == target:
                continue
            if not math.isfinite(norm):
                out.append(svg.rect(x, y, wide, high, "failed", title=f"{pair}: no pattern found"))
                continue
            ink = float(strength[source, target])
            opacity = f'fill-opacity="{_opacity(ink):.3f}"'
            out.append(svg.rect(x, y, wide, high, "heat", opacity, f"{pair}: {measure} {number(norm)}"))
            if grid.count <= _NUMBERED_CLASSES:
                css = "on-heat" if ink > 0.85 else "in-cell"
                out.append(svg.text(x + wide / 2, y + high / 2 + 4, number(norm), css, "middle"))
    return out


def _opacity(strength: float) -> float:
    return 0.03 + 0.97 * strength


def _bitmap(strength: Tensor) -> Tensor:
    """uint8 (4, K, K): the one ink with an opacity a cell; grey where no pattern was found."""
    block = math.ceil(len(strength) / _MOST_CELLS)
    failed = torch.isnan(strength) & ~torch.eye(len(strength), dtype=torch.bool)
    filled = F.max_pool2d(torch.nan_to_num(strength, nan=0.0).float()[None], block, ceil_mode=True)[0]
    failed = F.max_pool2d(failed[None].float(), block, ceil_mode=True)[0].bool() & (filled == 0)
    opacity = torch.where(failed, 0.28, 0.03 + 0.97 * filled)
    colours = [torch.where(failed, 128.0, float(level)) for level in INK]
    return torch.stack([*colours, opacity * 255]).round().to(torch.uint8)


def _legend(grid: _Grid, full: float, measure: str) -> str:
    x, y = grid.left, grid.cell(grid.count, 0)[1] + 22
    steps = [
        svg.rect(x + 9 * i, y, 9, 10, "heat", f'fill-opacity="{_opacity(i / 19):.3f}"') for i in range(20)
    ]
    return "".join([
        svg.text(x - 7, y + 9, f"large {measure}", "small", "end"),
        *steps,
        svg.text(x + 190, y + 9, f"{measure} {number(1 / full)}", "small"),
    ])  # fmt: skip
