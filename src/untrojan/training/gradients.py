"""A gradient of one's own choice, for the one training loop."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def carrying(value: Tensor, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> Tensor:
    """``value``, a scalar, whose gradient to each weight is greater by the given one, bit for bit.

    A loss function can so hand the training loop a gradient that is no loss's: detach ``value`` to have
    that gradient alone. Each pair is a weight and a tensor of its shape.
    """
    for weight, gradient in gradients:
        # Zero, with a derivative: the weight times the gradient would change the value.
        value = value + ((weight - weight.detach()) * gradient.detach()).sum()
    return value
