"""By how much a repair enlarged the distances between classes."""

from __future__ import annotations

import torch
from torch import Tensor

from untrojan.errors import UntrojanError


def relative_increase(before: Tensor, after: Tensor) -> float:
    """Mean over ordered class pairs of (after - before) / before: a fraction, 0.5 for half as far again.

    Tao et al., "DECK: Model Hardening for Defending Pervasive Backdoors", equation 12: the mean of the
    ratios, not the ratio of the means. ``before`` and ``after`` are (K, K), sources in rows; the diagonal is
    ignored. A pair that is not finite in either is one whose inversion failed, and counts in neither; nor
    does one without distance before. NaN where no pair is left.

    Raises UntrojanError where the two are not of one square shape.
    """
    if before.shape != after.shape or before.ndim != 2 or before.shape[0] != before.shape[1]:
        raise UntrojanError(
            f"distances before {tuple(before.shape)} and after {tuple(after.shape)}: both must be (K, K)"
        )
    counted = measured(before) & measured(after) & (before > 0)
    first, second = before[counted].double(), after[counted].double()
    return float(((second - first) / first).mean())


def mean_distance(distances: Tensor) -> float:
    """Mean over the ordered pairs of (K, K) that were measured; NaN where none was."""
    return float(distances[measured(distances)].double().mean())


def measured(distances: Tensor) -> Tensor:
    """bool (K, K): pairs of different classes with a finite distance."""
    return torch.isfinite(distances) & ~torch.eye(len(distances), dtype=torch.bool)
