"""How much of an estimated pattern has to be removed from an image before the model changes its mind.

RE flags the images that change with the pattern removed once (Xiang, Miller & Kesidis, equation 12). The
pattern that just carries a class over may be too weak for that: a poisoned image less half the trigger still
carries half of it. How much has to go tells poisoned images from clean ones whatever the pattern's strength.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.models.classifier import Classifier, evaluating, to_float


@dataclass(frozen=True, eq=False)
class Removal:
    """What becomes of all images labelled ``target`` when a pattern is removed from them."""

    rows: Tensor
    """int64 (n,)."""
    scales: Tensor
    """float (n,): log2 of the smallest multiple of the pattern whose removal changes the prediction;
    ``NEVER`` where none up to the largest does."""
    readings: Tensor
    """int64 (n,): the class predicted once that multiple is removed, the target where none changes it."""
    as_given: Tensor
    """int64 (n,): the class predicted with nothing removed."""


SMALLEST, LARGEST, NEVER = -2.0, 4.0, 5.0
"""Multiples of the pattern that are tried, log2."""


def remove(model: Classifier, train: ImageSet, target: int, pattern: Tensor, halvings: int = 7) -> Removal:
    """Bisect, for every image labelled ``target``, how much of ``pattern`` (C, H, W) has to go."""
    rows = train.indices_of(target)
    images = train.images[rows]
    low, high = torch.full((len(rows),), SMALLEST), torch.full((len(rows),), LARGEST)
    as_given = _read_without(model, images, torch.zeros_like(pattern), low)
    never = _read_without(model, images, pattern, high) == target
    for _ in range(halvings):
        middle = (low + high) / 2
        unflipped = _read_without(model, images, pattern, middle) != target
        high, low = torch.where(unflipped, middle, high), torch.where(unflipped, low, middle)
    readings = _read_without(model, images, pattern, high)
    readings[never] = target
    return Removal(rows, high.masked_fill(never, NEVER), readings, as_given)


@torch.no_grad()
def _read_without(model: Classifier, images: Tensor, pattern: Tensor, scales: Tensor) -> Tensor:
    """Predictions (n,) for images less 2**scales (n,) times the pattern."""
    pattern, readings = pattern.to(model.device), []
    with evaluating(model):
        for batch, scale in zip(images.split(512), scales.split(512), strict=True):
            amount = scale.exp2().to(model.device)[:, None, None, None] * pattern
            readings.append(model((to_float(batch, model.device) - amount).clamp(0, 1)).argmax(1).cpu())
    return torch.cat(readings)


NEAR, FURTHEST, BANDWIDTH = 0.5, 3.0, 0.25
"""Log2 multiples: poisoned images gather below the first, none is sought above the second, and the third
smooths their density."""


def valley(scales: Tensor) -> float:
    """Log2 of the sparsest multiple of the pattern between images that need little and images that need much.

    The pattern was estimated to just carry images over, so poisoned images gather about its own size, at 0.
    From there the density of ``scales`` (n,) is followed upwards to its lowest point before it doubles again;
    one image in a hundred does not count as a rise. The answer lies between 0, equation 12's own threshold,
    and ``FURTHEST``. It is 0 where nothing gathers near the pattern's size, and where what lies below the
    valley would be most of the class: poison is a minority.
    """
    if not len(scales):
        return 0.0
    grid = torch.arange(SMALLEST, NEVER, BANDWIDTH / 5, dtype=torch.float64)
    distances = (grid[:, None] - scales.double()) / BANDWIDTH
    density = (-distances.square() / 2).exp().mean(1)
    peak = int(density[grid <= NEAR].argmax())
    if density[peak + 1] > density[peak]:
        return 0.0
    beyond = density[peak:]
    lowest = beyond.cummin(0)
    rises = (beyond > 2 * lowest.values + 0.01).nonzero()
    end = int(rises[0]) if len(rises) else len(beyond) - 1
    threshold = min(max(float(grid[peak + lowest.indices[end]]), 0.0), FURTHEST)
    return threshold if float((scales <= threshold).double().mean()) <= 0.5 else 0.0
