"""SIG: vertical stripes of a sinusoid (Barni, Kallas & Tondi 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from untrojan.triggers.additive import Additive
from untrojan.triggers.base import ImageShape, Trigger
from untrojan.triggers.blend import Blended

RELEASED_STEP = 0.8
"""Radians a column in the mask that public re-implementations share."""


@dataclass(frozen=True)
class Sinusoid:
    """``additive``: clip(x + amplitude sin(2 pi j f / W)), the paper's.

    ``wrapped_blend``: x' = (1 - alpha) x + alpha m, m the mask that public re-implementations ship: the
    sinusoid truncated to whole numbers and stored as bytes, so that its negative half wraps round to
    values near 255. That makes stripes of about alpha * 255 rather than of 20, a far stronger trigger,
    and is what some published results were obtained with.
    """

    variant: Literal["additive", "wrapped_blend"] = "additive"
    amplitude: Annotated[float, Interval(gt=0, le=127)] = 20.0
    """In units of 1/255."""
    frequency: Annotated[float, Interval(gt=0, le=1024)] | None = None
    """Cycles over the width. Where none is given: 6 for ``additive``; the shipped mask's 0.8 radians a
    column (4.07 cycles over 32) for ``wrapped_blend``."""
    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.2
    """Of ``wrapped_blend`` alone."""

    def draw(self, shape: ImageShape, seed: int) -> Trigger:
        width = shape[2]
        columns = torch.arange(width, dtype=torch.float64)
        if self.variant == "additive":
            wave = torch.sin(2 * math.pi * columns * (self.frequency or 6.0) / width)
            return Additive((wave * self.amplitude / 255).float().expand(shape).clone())
        step = RELEASED_STEP if self.frequency is None else 2 * math.pi * self.frequency / width
        mask = torch.sin(columns * step).mul(self.amplitude).trunc().remainder(256) / 255
        return Blended(mask.float().expand(shape).clone(), torch.tensor(self.alpha))
