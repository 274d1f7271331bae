"""Neural Cleanse's trigger: a mask says where, a pattern says what, the mask is to be small.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019,
equations 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.seeding import generator


def target_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """(A,): the mean cross entropy of each pair's target class over its images; logits are (A, n, K)."""
    wanted = pairs[:, 1, None].expand(-1, logits.shape[1])
    return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)


@dataclass(frozen=True)
class MaskedPattern:
    """x' = (1 - m) x + m p: an :class:`~untrojan.inversion.engine.Problem`.

    Parameters are (P, 1 + C, H, W): the mask and the pattern before tanh brings them into [0, 1].
    """

    seed: int = 0
    both_sides: ClassVar[bool] = False

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Mask and pattern uniform in [0, 1], drawn for each target."""
        channels, height, width = image_shape
        drawn = [
            torch.rand(1 + channels, height, width, generator=generator(self.seed, "mask", target))
            for target in pairs[:, 1].tolist()
        ]
        return torch.stack(drawn).clamp(0.01, 0.99).mul(2).sub(1).atanh()

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return self.embed(parameters, sources)

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        return target_loss(logits, pairs)

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        mask, pattern = self.trigger(parameters)
        return (1 - mask[:, None]) * images + (mask * pattern)[:, None]

    def size(self, parameters: Tensor) -> Tensor:
        """L1 norms of the masks, in pixels."""
        return self.trigger(parameters)[0].flatten(1).sum(1)

    def trigger(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (P, 1, H, W) and patterns (P, C, H, W), in [0, 1]."""
        values = parameters.tanh().add(1).div(2)
        return values[:, :1], values[:, 1:]
