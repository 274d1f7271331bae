"""Blended: a whole image mixed into every image (Chen et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from untrojan.seeding import generator
from untrojan.triggers.base import ImageShape


@dataclass(frozen=True)
class Blend:
    """x' = (1 - alpha) x + alpha b, b one image of noise uniform in [0, 1] per pixel and channel."""

    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.2

    def draw(self, shape: ImageShape, seed: int) -> Blended:
        return Blended(torch.rand(shape, generator=generator(seed, "blend")), torch.tensor(self.alpha))


@dataclass(frozen=True, eq=False)
class Blended:
    """A drawn blend; differentiable in the images and in both its tensors."""

    image: Tensor
    """float (C, H, W) in [0, 1]."""
    alpha: Tensor
    """float (), in [0, 1]."""

    def __call__(self, images: Tensor) -> Tensor:
        alpha = self.alpha.to(images)
        return ((1 - alpha) * images + alpha * self.image.to(images)).clamp(0, 1)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"image": self.image, "alpha": self.alpha}
