"""What becomes of a class's images when an estimated pattern is removed from them, and which of them had it.

RE flags the images that the model reads otherwise once the pattern is removed (Xiang, Miller & Kesidis,
equation 12). Whether an image crosses over depends on how near to the border it was, poisoned or not. How
far it moves does not: an image that carries the pattern moves as far back as the pattern moves images of the
source class forth, and an image without it hardly moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import frozen


@dataclass(frozen=True, eq=False)
class Removal:
    """All images labelled with the target class, less the pattern."""

    rows: Tensor
    """int64 (n,)."""
    readings: Tensor
    """int64 (n,): the class predicted without the pattern. Equation 12 flags those that leave the target."""
    drops: Tensor
    """float (n,): by how much removing the pattern lowers the target's margin, the target's logit less the
    largest other."""
    gains: Tensor
    """float (m,): by how much adding it to images labelled with the source class raises that margin."""


def remove(model: Classifier, train: ImageSet, source: int, target: int, pattern: Tensor) -> Removal:
    """Remove ``pattern`` (C, H, W), found for this pair of classes, from all images labelled ``target``."""
    fast = frozen(model)
    rows = train.indices_of(target)
    images, others = train.images[rows], train.images[train.indices_of(source)]
    nothing = torch.zeros_like(pattern)
    before, _ = _margins(fast, images, nothing, target)
    after, readings = _margins(fast, images, -pattern, target)
    without, _ = _margins(fast, others, nothing, target)
    with_pattern, _ = _margins(fast, others, pattern, target)
    return Removal(rows, readings, before - after, with_pattern - without)


@torch.no_grad()
def _margins(model: Classifier, images: Tensor, pattern: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Margins of ``target`` and the classes predicted, (n,) each, with ``pattern`` added."""
    pattern, margins, readings = pattern.to(model.device), [], []
    for batch in images.split(512):
        logits = model((to_float(batch, model.device) + pattern).clamp(0, 1)).cpu()
        readings.append(logits.argmax(1))
        own = logits[:, target].clone()
        logits[:, target] = float("-inf")
        margins.append(own - logits.amax(1))
    return torch.cat(margins), torch.cat(readings)


@dataclass(frozen=True)
class Threshold:
    """A drop of ``at`` is as many deviations from clean images' as from carriers'."""

    at: float
    spread: float
    """The harmonic sum of the two deviations: the scale on which one kind passes into the other."""
    separation: float
    """So many deviations the threshold lies from either kind: how well the two can be told apart."""


def threshold_between(drops: Tensor, gains: Tensor) -> Threshold:
    """Where drops (n,) pass from clean images' to those that ``gains`` (m,) lead to expect of poisoned ones.

    Median and median absolute deviation describe either kind. Clean images are those below the threshold
    itself, found by repetition from half the median gain on: without the pattern there is little to lose.
    So nothing is assumed of how many images of the class are poisoned.
    """
    expected, expected_deviation = _centre(gains)
    at, spread, separation = expected / 2, 0.0, 0.0
    for _ in range(50):
        centre, deviation = _centre(drops[drops < at])
        total = max(deviation + expected_deviation, 1e-12)
        separation = (expected - centre) / total
        before, spread = at, deviation * expected_deviation / total
        at = centre + (expected - centre) * (deviation / total if spread else 0.5)
        if abs(at - before) < 1e-6:
            break
    return Threshold(at, spread, separation)


def _centre(values: Tensor) -> tuple[float, float]:
    """Median, and the deviation of a normal distribution of the same median absolute deviation."""
    if not len(values):
        return 0.0, 0.0
    median = values.double().median()
    return float(median), 1.4826 * float((values.double() - median).abs().median())
