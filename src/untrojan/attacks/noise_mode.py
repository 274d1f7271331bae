"""WaNet's noise mode: the training loop warps a share of every mini-batch (section 3.3; cross-ratio mode).

A network that sees only the one warping may learn any warping as the trigger. So some images are warped
by a disturbed grid and keep their labels, which leaves the exact grid as the only one that pays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.triggers.warp import Warping, noisy_grids, warped


@dataclass(frozen=True, eq=False)
class NoiseMode:
    """A batch hook: ``(images, labels, random) -> (images, labels)``, before augmentation.

    Of B images the first floor(rate B) are warped and labelled ``target``; the next ``cross_ratio`` times
    as many are warped with noise, fresh for each image, and keep their labels; the rest stay.
    """

    warping: Warping
    target: int
    rate: float = 0.1
    cross_ratio: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.rate * (1 + self.cross_ratio) <= 1 or self.cross_ratio < 0:
            raise UntrojanError(
                "noise mode warps rate * (1 + cross_ratio) of a batch: "
                f"{self.rate} * (1 + {self.cross_ratio}) must lie above 0 and up to 1"
            )

    def __call__(self, images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """float (B, C, H, W) in [0, 1] and int64 (B,), a shuffled batch; neither is modified."""
        attacked = int(self.rate * len(images))
        disturbed = attacked * self.cross_ratio
        grids = noisy_grids(self.warping.grid.to(images), disturbed, random)
        end = attacked + disturbed
        mixed = torch.cat(
            [self.warping(images[:attacked]), warped(images[attacked:end], grids), images[end:]]
        )
        relabelled = labels.clone()
        relabelled[:attacked] = self.target
        return mixed, relabelled
