"""RE's pattern estimation: one additive pattern that flips a class when added and unflips it when removed.

Xiang, Miller & Kesidis, "Reverse Engineering Imperceptible Backdoor Attacks on Deep Neural Networks for
Detection and Training Set Cleansing", section 4.2.1, equation 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from untrojan.inversion.masked import target_loss


@dataclass(frozen=True)
class AdditivePattern:
    """v with x' = clip(x + v): an :class:`~untrojan.inversion.engine.Problem`."""

    balance: float = 1.0
    """RE's lambda: the weight of flipping the source against unflipping the target."""

    both_sides: ClassVar[bool] = True

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(len(pairs), *image_shape)

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([self.embed(parameters, sources), self.remove(parameters, targets)], 1)

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        half = logits.shape[1] // 2
        target = pairs[:, 1, None, None].expand(-1, logits.shape[1], 1)
        scores = logits.gather(2, target).squeeze(2)
        total = logits.logsumexp(2)
        # log(1 - p_t) from logits: 1 - p rounds to nothing where the model is sure, and it is sure.
        others = logits.scatter(2, target, float("-inf")).logsumexp(2)
        unflipped = (others - total)[:, half:].mean(1)
        flipped = (scores - total)[:, :half].mean(1)
        return -(unflipped + self.balance * flipped)

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        return (images + parameters[:, None]).clamp(0, 1)

    def remove(self, parameters: Tensor, images: Tensor) -> Tensor:
        return (images - parameters[:, None]).clamp(0, 1)

    def size(self, parameters: Tensor) -> Tensor:
        """L2 norms."""
        norms: Tensor = torch.linalg.vector_norm(parameters.flatten(1), dim=1)
        return norms


@dataclass(frozen=True)
class FlippingPattern(AdditivePattern):
    """An additive pattern that flips a class when added, and that is all: for clean images of the target,
    which no removal can unflip."""

    both_sides: ClassVar[bool] = False

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return self.embed(parameters, sources)

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        return target_loss(logits, pairs)
