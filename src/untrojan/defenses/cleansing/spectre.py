"""SPECTRE: robust whitening leaves poison as the only direction in which a class varies too much.

Hayase et al., "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", ICML 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.defenses.cleansing.by_class import ClassCleanser, ClassFinding
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.principal_directions import centred, leading_directions
from untrojan.defenses.cleansing.spectral_signatures import highest, log_contrast

FLOOR = 1e-2
"""Of the mean variance: directions of less are not stretched any further by whitening. Features that hardly
any image has would else outweigh all others."""


@dataclass(frozen=True, eq=False)
class RobustSpectrum:
    """What SPECTRE makes of one class."""

    scores: Tensor
    """float64 (n,): quantum entropy scores."""
    removed: Tensor
    """bool (n,): the highest of them."""
    components: int
    """How many principal components the scores were taken in."""
    excess: float
    """Mean quantum entropy score of all images in terms of those kept: about 1 where they do not differ."""


def robust_spectrum(
    features: Tensor, contamination: float, alpha: float = 4.0, most_components: int = 100
) -> RobustSpectrum:
    """Score features (n, D), a share ``contamination`` of them poison at most; remove 1.5 times as many.

    The number of components is the square number that leaves the removed images the most conspicuous,
    after whitening by the images kept; the grid of squares is that of the paper's code. There are at most a
    quarter as many components as images, as fewer images show no covariance.
    """
    count = len(features)
    around = centred(features.double())
    points = around @ leading_directions(around, max(1, min(most_components, count // 4))).T
    nothing = torch.zeros(count)
    best = RobustSpectrum(nothing.double(), nothing.bool(), 0, 0.0)
    for root in range(1, math.isqrt(points.shape[1]) + 1):
        some = points[:, : root**2]
        scores = quantum_entropy_scores(whitened(some, plausible(some, contamination)), alpha)
        removed = highest(scores, max(1, round(1.5 * contamination * count)))
        excess = float(quantum_entropy_scores(whitened(points, ~removed), alpha).mean())
        if excess > best.excess:
            best = RobustSpectrum(scores, removed, root**2, excess)
    return best


def quantum_entropy_scores(points: Tensor, alpha: float = 4.0) -> Tensor:
    """x'Qx for each row of whitened points (n, k), Q = exp(alpha (S - 1) / (|S| - 1)) of trace 1, S their
    second moment and |S| its largest eigenvalue.

    A large ``alpha`` looks along the direction of the most excess alone, a small one at the norm.
    """
    moment = points.T @ points / len(points)
    excess = moment - torch.eye(len(moment), dtype=points.dtype)
    largest = float(torch.linalg.eigvalsh(excess)[-1])
    # Without excess in any direction, all weigh alike.
    weights = torch.matrix_exp(excess * (alpha / largest if largest > 1e-9 else 0.0))
    scores: Tensor = ((points @ (weights / weights.trace())) * points).sum(1)
    return scores


def whitened(points: Tensor, kept: Tensor) -> Tensor:
    """Points (n, k) in coordinates where those ``kept``, bool (n,), have mean 0 and covariance 1."""
    inner = points[kept]
    mean = inner.mean(0)
    variances, axes = torch.linalg.eigh((inner - mean).T @ (inner - mean) / len(inner))
    spread = variances.clamp_min(FLOOR * float(variances.mean())).sqrt()
    white: Tensor = (points - mean) @ axes / spread
    return white


def plausible(points: Tensor, contamination: float) -> Tensor:
    """bool (n,): the points (n, k) to estimate mean and covariance from.

    Twice as many images as poison is allowed for are left out, those furthest from the median of the
    quadratic form that varies most over the whitened points: what the filter of the paper's code comes to.
    Two things differ. The code only filters where that form's variance exceeds a bound, which at a tenth of
    poison hardly any group does, however far off; here it always filters. And points are centred on the
    plausible ones, as in the paper, where the code takes the mean of all.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    count, width = points.shape
    white = whitened(points, torch.ones(count, dtype=torch.bool))

    def values_of(form: Tensor) -> Tensor:
        return ((white @ form.view(width, width)) * white).sum(1)

    def covariance_of_squares(
        flat: np.ndarray[Any, np.dtype[np.float64]],
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        values = values_of(torch.from_numpy(flat).double())
        return (white.T @ (white * (values - values.mean()).unsqueeze(1)) / count).flatten().numpy()

    if width == 1:
        form = torch.ones(1).double()
    else:
        start = torch.randn(width**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        operator = LinearOperator((width**2, width**2), matvec=covariance_of_squares, dtype="float64")
        _, vectors = eigsh(operator, 1, v0=start.numpy(), tol=1e-4)
        form = torch.from_numpy(vectors[:, 0])
    values = values_of(form)
    return ~highest((values - values.median()).abs(), round(2 * contamination * count))


@dataclass(frozen=True)
class Spectre(ClassCleanser):
    """SPECTRE. As published it is no detector: it removes a fixed share of every class.

    Calibrated, it compares classes by :func:`~.spectral_signatures.log_contrast` of their scores.
    """

    threshold: float | Literal["published", "calibrated"] = "published"
    """A limit of the statistic, or p-values; published, every class exceeds it."""
    contamination: Annotated[float, Interval(gt=0, le=0.25)] = 0.1
    """The share of poison that is allowed for: 1.5 times as much of each class is removed."""
    alpha: Annotated[float, Gt(0)] = 4.0
    most_components: Annotated[int, Ge(1)] = 100
    level: str = "penultimate"
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05

    def examine(self, features: Features, label: int, rows: Tensor) -> ClassFinding:
        found = robust_spectrum(
            features.at(self.level, rows), self.contamination, self.alpha, self.most_components
        )
        return ClassFinding(
            log_contrast(found.scores, found.removed),
            found.removed,
            found.scores / found.scores.mean().clamp_min(1e-300),
            {"components": found.components, "excess": found.excess},
        )
