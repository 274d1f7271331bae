"""What every trigger is: drawn once from a seed, then applied to any number of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

ImageShape = tuple[int, int, int]
"""(C, H, W)."""


class Trigger(Protocol):
    """A drawn trigger: pure application, no randomness left but what its own tensors hold."""

    def __call__(self, images: Tensor) -> Tensor:
        """float (N, C, H, W) in [0, 1] to the same shape and range."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What was drawn (pattern, mask, warping grid, ...): enough to apply it again, or to show it."""
        ...


class TriggerRecipe(Protocol):
    """A frozen dataclass of a trigger's settings, registered by name in ``triggers.registry``."""

    def draw(self, shape: ImageShape, seed: int) -> Trigger:
        """The trigger for images of ``shape``, every random choice taken from ``seed``."""
        ...


def stamp(trigger: Trigger, images: Tensor, batch_size: int = 4096) -> Tensor:
    """uint8 images (N, C, H, W) with the trigger, as the exact bytes a trainer would receive.

    Clipped before the cast: a value of 258 that is cast first wraps round to 2, which turns a faint
    pattern into black specks.
    """
    if not len(images):
        return images.clone()
    batches = [to_bytes(trigger(batch.float() / 255)) for batch in images.split(batch_size)]
    return torch.cat(batches)


def to_bytes(images: Tensor) -> Tensor:
    """float images in [0, 1] as uint8: clipped, then rounded, then cast."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def json_safe(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without tensors, for a record that is written as JSON."""
    return {key: value for key, value in options.items() if not isinstance(value, Tensor)}
