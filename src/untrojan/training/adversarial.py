"""Projected gradient descent within an L-infinity ball: for adversarial training and for measuring it.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] to logits (N, K)."""


def pgd(
    model: Logits,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step: float,
    steps: int,
    random: torch.Generator | None = None,
) -> Tensor:
    """Images within ``epsilon`` of ``images``, and within [0, 1], that raise the cross-entropy of ``labels``.

    ``images`` are float (N, C, H, W) in [0, 1], ``epsilon`` and ``step`` in units of the pixel range; each
    of the ``steps`` goes ``step`` along the gradient's sign. The start is drawn uniformly from the ball by
    ``random``, a generator on the CPU, or is ``images`` themselves without one. ``model`` runs in the mode
    in which it is given; its weights get no gradient.
    """
    lowest, highest = (images - epsilon).clamp_min(0), (images + epsilon).clamp_max(1)
    adversarial = images.detach()
    if random is not None:
        noise = torch.rand(images.shape, generator=random).to(images)
        adversarial = torch.clamp(images + epsilon * (2 * noise - 1), lowest, highest)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        # A sum, for the mean over a large batch would only bring the gradient nearer to underflow.
        loss = F.cross_entropy(model(adversarial), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = torch.clamp(adversarial.detach() + step * gradient.sign(), lowest, highest)
    return adversarial.detach()


@dataclass(frozen=True)
class PGD:
    """:func:`pgd` with its settings; the defaults are those of CIFAR-10 in DECK (appendix III-C)."""

    epsilon: Annotated[float, Interval(ge=0, le=1)] = 8 / 255
    step: Annotated[float, Interval(ge=0, le=1)] = 2 / 255
    steps: Annotated[int, Ge(0)] = 20
    random_start: bool = True

    def __call__(self, model: Logits, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """Adversarial images (N, C, H, W); see :func:`pgd`."""
        return pgd(
            model, images, labels, epsilon=self.epsilon, step=self.step, steps=self.steps,
            random=random if self.random_start else None,
        )  # fmt: skip
