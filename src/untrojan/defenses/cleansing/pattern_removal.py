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


TWO_GROUPS = 0.8
"""Share of the scales' variance that a split must explain before the scales count as two groups."""


def split_scales(scales: Tensor) -> float:
    """Where the scales (n,) fall into two groups, log2: the split with the least variance within (Otsu).

    Between 0, equation 12's own threshold, and 1: twice the pattern as estimated. It is 0 where there is but
    one group, as where the pattern is no smaller than what changes the prediction for many a clean image.
    """
    ordered = scales.double().sort().values
    count = len(ordered)
    if count < 2 or float(ordered[0]) == float(ordered[-1]):
        return 0.0
    lower = torch.arange(1, count)
    sums = ordered.cumsum(0)
    mean_below = sums[:-1] / lower
    mean_above = (sums[-1] - sums[:-1]) / (count - lower)
    between = lower * (count - lower) * (mean_above - mean_below) ** 2 / count**2
    best = int(between.argmax())
    if float(between[best] / ordered.var(correction=0)) < TWO_GROUPS:
        return 0.0
    return float(((ordered[best] + ordered[best + 1]) / 2).clamp(0, 1))
