"""WaNet: a smooth, small, fixed warping of the image (Nguyen & Tran 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional

from untrojan.seeding import generator
from untrojan.triggers.base import ImageShape


@dataclass(frozen=True)
class Warp:
    """The warping grid of the paper's section 3.2, as released."""

    control_points: Annotated[int, Interval(ge=2, le=256)] = 4
    """The paper's k: control points a side."""
    strength: Annotated[float, Interval(ge=0, le=16)] = 0.5
    """The paper's s: the control points' mean displacement, in half pixels; 0 leaves images as they are."""
    rescale: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Factor on the finished grid, which shrinks what it samples towards the centre."""

    def draw(self, shape: ImageShape, seed: int) -> Warping:
        _, height, width = shape
        points = self.control_points
        field = torch.rand(1, 2, points, points, generator=generator(seed, "warp")) * 2 - 1
        field = field / field.abs().mean()
        flow = functional.interpolate(field, (height, width), mode="bicubic", align_corners=True)
        displacement = self.strength * flow[0].permute(1, 2, 0) / _size(height, width)
        return Warping((identity_grid(height, width) + displacement).clamp(-1, 1) * self.rescale)


@dataclass(frozen=True, eq=False)
class Warping:
    """A drawn warping, bilinear; differentiable in the images and in the grid."""

    grid: Tensor
    """float (H, W, 2): where each pixel is taken from, (x, y) in [-1, 1] with corners at -1 and 1."""

    def __call__(self, images: Tensor) -> Tensor:
        return warped(images, self.grid.to(images).expand(len(images), -1, -1, -1))

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"grid": self.grid}


def warped(images: Tensor, grids: Tensor) -> Tensor:
    """Images (N, C, H, W) sampled along grids (N, H, W, 2), in [0, 1]."""
    if not len(images):
        return images.clone()
    return functional.grid_sample(images, grids, padding_mode="zeros", align_corners=True).clamp(0, 1)


def noisy_grids(grid: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Noise mode's grids (count, H, W, 2): the warping's own plus U(-1, 1) half pixels, fresh per image."""
    height, width, _ = grid.shape
    noise = torch.rand(count, height, width, 2, generator=random) * 2 - 1
    return (grid + (noise / _size(height, width)).to(grid)).clamp(-1, 1)


def identity_grid(height: int, width: int) -> Tensor:
    """float (H, W, 2): the grid that takes every pixel from its own place."""
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], 2)


def _size(height: int, width: int) -> Tensor:
    return torch.tensor([width, height], dtype=torch.float32)
