"""A smooth warping as a trigger: what WaNet's family of attacks hides, searched for.

The warping of Nguyen and Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021, section 3.2,
with control points that are sought instead of drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from untrojan.inversion.masked import target_loss
from untrojan.seeding import generator
from untrojan.triggers.warp import identity_grid, warped


@dataclass(frozen=True)
class SmoothWarp:
    """Pixels are taken from elsewhere, by a field through few control points: an
    :class:`~untrojan.inversion.engine.Problem`.

    Parameters are (P, 2, k, k): how far to the right and down, in pixels, what comes to the k x k control
    points lay; bicubic between them. What is to be small is the points' mean squared displacement, in
    squared pixels.
    """

    points: int = 4
    """k, as WaNet's."""
    seed: int = 0
    start: float = 1.0
    """Standard deviation of the displacements to begin with, in pixels. From farther away searches end in
    more different warpings."""
    both_sides: ClassVar[bool] = False

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        drawn = [
            torch.randn(2, self.points, self.points, generator=generator(self.seed, "warping", target))
            for target in pairs[:, 1].tolist()
        ]
        return self.start * torch.stack(drawn)

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return self.embed(parameters, sources)

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        return target_loss(logits, pairs)

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        flow = functional.interpolate(parameters, (height, width), mode="bicubic", align_corners=True)
        half = torch.tensor([width - 1, height - 1], device=images.device) / 2
        grids = identity_grid(height, width).to(images.device) + flow.permute(0, 2, 3, 1) / half
        # What would come from beyond the border is the border's.
        each = grids.clamp(-1, 1).repeat_interleave(images.shape[1], 0)
        moved: Tensor = warped(images.flatten(0, 1), each).unflatten(0, images.shape[:2])
        return moved

    def size(self, parameters: Tensor) -> Tensor:
        """Mean over the control points of the squared displacement, in squared pixels."""
        distance: Tensor = parameters.square().sum(1).mean((1, 2))
        return distance
