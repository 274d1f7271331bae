"""Spectral Signatures: poison stands out along the direction in which a class's features vary most.

Tran et al., "Spectral Signatures in Backdoor Attacks", NeurIPS 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.defenses.cleansing.by_class import ClassCleanser, ClassFinding
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.principal_directions import centred, leading_directions


def spectral_scores(features: Tensor, uncentred: bool = False) -> Tensor:
    """float64 (n,): squared projections of features (n, D) on the top direction (Algorithm 1).

    The direction is always that of the centred features. The released code projects the ``uncentred`` ones:
    the class's mean then adds to every projection, and images beyond it on one side only score high.
    """
    around = centred(features)
    direction = leading_directions(around, 1)
    return ((features if uncentred else around).double() @ direction.double().T).square().sum(1)


def log_contrast(scores: Tensor, removed: Tensor) -> float:
    """ln of the median score removed over the median score kept: how far apart the two groups are.

    For scores that are squares of a normal variable it depends on the share removed alone (2.31 for 15 %).
    A group apart raises it if it makes up half of what is removed, while a few outliers, a long tail or much
    variance do not. 0 where nothing is removed or all score 0.
    """
    if not removed.any() or removed.all() or not scores.any():
        return 0.0
    least = 1e-12 * float(scores.max())
    upper, lower = scores[removed].median().clamp_min(least), scores[~removed].median().clamp_min(least)
    return math.log(float(upper / lower))


def highest(scores: Tensor, count: int) -> Tensor:
    """bool (n,): the ``count`` highest, half of them at most, the first of equals."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)
    chosen[order[: min(count, len(scores) // 2)]] = True
    return chosen


@dataclass(frozen=True)
class SpectralSignatures(ClassCleanser):
    """Spectral Signatures. As published it is no detector: it removes a fixed share of every class.

    Calibrated, it compares classes by their :func:`log_contrast`. The share of variance in the top direction
    would not do: it differs more between clean classes than poison changes it.
    """

    threshold: float | Literal["published", "calibrated"] = "published"
    """A limit of the statistic, or p-values; published, every class exceeds it."""
    share: Annotated[float, Interval(gt=0, le=0.5)] = 0.15
    """Of each class, removed: 1.5 times the share of poison that is allowed for."""
    count: Annotated[int, Ge(1)] | None = None
    """Images of each class to remove in place of a share, half of the class at most. RE's comparison has
    1,000, its code 750."""
    uncentred: bool = False
    """Score as the released code does, see :func:`spectral_scores`."""
    level: str = "penultimate"
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05

    def examine(self, features: Features, label: int, rows: Tensor) -> ClassFinding:
        scores = spectral_scores(features.at(self.level, rows), self.uncentred)
        removed = highest(scores, self.count or max(1, round(self.share * len(rows))))
        return ClassFinding(log_contrast(scores, removed), removed, scores / scores.mean().clamp_min(1e-300))
