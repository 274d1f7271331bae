"""The distributed backdoor attack's trigger: four strips, each stamped by another attacker.

Xie et al., "DBA: Distributed Backdoor Attacks against Federated Learning", ICLR 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval, Len

from untrojan.errors import UntrojanError
from untrojan.triggers.base import ImageShape
from untrojan.triggers.patch import FixedPatch

PARTS = 4
SMALL_SIDE = 28
"""Images up to this many pixels a side get MNIST's strips, larger ones CIFAR-10's."""

Pixels = Annotated[int, Interval(ge=0, le=1024)]
Part = Annotated[int, Interval(ge=0, lt=PARTS)]


@dataclass(frozen=True)
class Strips:
    """White strips one pixel high, two in each of two rows, at the upper left.

    The sizes are the attack's own: for 28x28, 1x4 in rows 0 and 3 at columns 0..3 and 6..9; for 32x32, 1x6 in
    rows 0 and 4 at columns 0..5 and 9..14. ``parts`` are the strips that are there, numbered row by row; an
    attacker stamps its own while training, and all four are stamped at test time.
    """

    parts: Annotated[tuple[Part, ...], Len(1, PARTS)] = (0, 1, 2, 3)
    length: Annotated[int, Interval(ge=1, le=1024)] | None = None
    """Pixels; 4 or 6 by default, by the image's size, or fewer where no more fit."""
    column_gap: Pixels | None = None
    """Pixels between the strips of a row; 2 or 3 by default."""
    row_gap: Pixels | None = None
    """Rows between the two; 2 or 3 by default."""

    def draw(self, shape: ImageShape, seed: int) -> FixedPatch:
        channels, height, width = shape
        small = min(height, width) <= SMALL_SIDE
        column_gap = _given(self.column_gap, 2 if small else 3)
        length = self.length or max(1, min(4 if small else 6, (width - column_gap) // 2))
        across, down = length + column_gap, 1 + _given(self.row_gap, 2 if small else 3)
        if across + length > width or down + 1 > height:
            raise UntrojanError(f"strips of {length} pixels do not fit into {height}x{width}: give a length")
        mask = torch.zeros(1, height, width)
        for part in self.parts:
            row, column = part // 2 * down, part % 2 * across
            mask[:, row, column : column + length] = 1
        return FixedPatch(mask, mask.expand(channels, -1, -1).clone())


def _given(value: int | None, default: int) -> int:
    return default if value is None else value
