"""A sunrise over every image: colour transfer in place of DFST's generator (Cheng et al., AAAI 2021).

DFST has a CycleGAN learn to turn photographs into ones taken at sunrise, which needs such photographs and
hours. This is an offline stand-in with the same aim, a style in place of a pattern: each image's channels are
given the mean and deviation of a sunrise's, as adaptive instance normalisation does to features (Huang &
Belongie 2017), and the mean varies smoothly over the picture from sky to glowing horizon to dark ground.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from untrojan.seeding import generator
from untrojan.triggers.base import ImageShape
from untrojan.triggers.filters import GREY

SKY, HORIZON, GROUND, GLOW = (0.38, 0.30, 0.55), (0.96, 0.58, 0.30), (0.34, 0.17, 0.16), (0.30, 0.22, 0.02)
DEVIATION = (0.22, 0.17, 0.13)
"""RGB."""
STEADY = 1e-4
"""Added to an image's variance, so that a flat channel has a finite slope."""


@dataclass(frozen=True)
class Sunrise:
    """x' = (1 - strength) x + strength (m + s (x - mean(x)) / deviation(x)), channel by channel."""

    strength: Annotated[float, Interval(gt=0, le=1)] = 0.6

    def draw(self, shape: ImageShape, seed: int) -> Styled:
        """Where the horizon lies and where the sun stands is drawn from the seed."""
        channels, height, width = shape
        random = generator(seed, "sunrise")
        line, sun = (low + 0.3 * float(torch.rand((), generator=random)) for low in (0.45, 0.35))
        down = ((torch.arange(height) + 0.5) / height).view(1, -1, 1)
        across = ((torch.arange(width) + 0.5) / width).view(1, 1, -1)
        sky, horizon, ground, glow = (torch.tensor(c).view(3, 1, 1) for c in (SKY, HORIZON, GROUND, GLOW))
        above, below = (down / line).clamp_max(1), ((down - line) / (1 - line)).clamp_min(0)
        mean = sky + (horizon - sky) * above + (ground - horizon) * below
        near = torch.exp(-((down - line) ** 2 + (across - sun) ** 2) / (2 * 0.2**2))
        mean = (mean + glow * near).clamp(0, 1)
        deviation = torch.tensor(DEVIATION).view(3, 1, 1)
        if channels == 1:
            weights = torch.tensor(GREY).view(3, 1, 1)
            mean, deviation = ((each * weights).sum(0, keepdim=True) for each in (mean, deviation))
        return Styled(mean, deviation, torch.tensor(self.strength))


@dataclass(frozen=True, eq=False)
class Styled:
    """A drawn style; differentiable in the images."""

    mean: Tensor
    """float (C, H, W) in [0, 1]."""
    deviation: Tensor
    """float (C, 1, 1)."""
    strength: Tensor
    """float (), in (0, 1]."""

    def __call__(self, images: Tensor) -> Tensor:
        mean = images.mean((2, 3), keepdim=True)
        spread = (images - mean).square().mean((2, 3), keepdim=True).add(STEADY).sqrt()
        styled = self.mean.to(images) + self.deviation.to(images) * (images - mean) / spread
        strength = self.strength.to(images)
        return ((1 - strength) * images + strength * styled).clamp(0, 1)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"mean": self.mean, "deviation": self.deviation, "strength": self.strength}
