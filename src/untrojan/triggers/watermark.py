"""A colourful watermark over the middle of every image (Liu et al., "Trojaning Attack on Neural Networks",
2018; one of the triggers of Wang et al., "Training with More Confidence: NONE", 2022, section 5.3).

Neither paper states the mark's pixels. This one is a ring with two crossing bars whose hue goes round with
the angle, so that it is large and has many colours and edges, as theirs are shown to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval

from untrojan.seeding import generator
from untrojan.triggers.base import ImageShape
from untrojan.triggers.patch import FixedPatch

STROKE = 0.2
"""Width of ring and bars, in radii of the mark."""


@dataclass(frozen=True)
class Watermark:
    """x' = (1 - opacity m) x + opacity m b, m the strokes of the mark."""

    size: Annotated[float, Interval(gt=0, le=1)] = 0.75
    """Diameter, in the image's shorter sides."""
    opacity: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def draw(self, shape: ImageShape, seed: int) -> FixedPatch:
        """The seed turns the colours round. On grey images the hues become brightnesses."""
        channels, height, width = shape
        rows, columns = (torch.arange(side) - (side - 1) / 2 for side in (height, width))
        reach = self.size * min(height, width) / 2
        y, x = torch.meshgrid(rows / reach, columns / reach, indexing="ij")
        distance, angle = torch.hypot(x, y), torch.atan2(y, x)
        # Strokes are never thinner than a pixel, or a small mark would have gaps.
        half = max(STROKE / 2, 0.5 / reach)
        ring = (distance - (1 - half)).abs() <= half
        bars = (torch.minimum((x - y).abs(), (x + y).abs()) / math.sqrt(2) <= half) & (distance <= 1)
        turn = float(torch.rand((), generator=generator(seed, "watermark"))) * 2 * math.pi
        phases = torch.arange(channels).view(-1, 1, 1) * 2 * math.pi / 3
        colours = 0.5 + 0.5 * torch.cos(angle + turn - phases)
        return FixedPatch((ring | bars).float()[None] * self.opacity, colours)
