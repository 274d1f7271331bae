"""Values in two groups: where they are cut best, and how far apart the groups then are.

Otsu, "A Threshold Selection Method from Gray-Level Histograms", 1979; in one dimension Jenks' natural breaks
and two-means are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Values in two groups: those above ``at``, and the rest."""

    at: float
    fit: float
    """Goodness of variance fit, 0..1: the share of the variance that lies between the groups."""
    separation: float
    """The difference of the groups' means in units of the sum of their standard deviations: 1.3 for halves of
    a normal distribution, 1.7 for those of a uniform one. Unlike the fit it does not depend on how many are
    in either group."""


def two_groups(values: Tensor, smallest: int = 1) -> Split:
    """The cut of (n,) values that leaves the least variance within two groups of ``smallest`` or more.

    Sorted prefix sums find it in O(n log n). Where all values are equal or there are too few for two groups,
    nothing lies above and the fit is 0.
    """
    if not len(values):
        return Split(0.0, 0.0, 0.0)
    at, fit, separation = (float(each) for each in groups_of_each(values[:, None], smallest))
    return Split(at, fit, separation)


def groups_of_each(values: Tensor, smallest: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`two_groups` of each column of (n, C) values, n > 0: ``at``, ``fit`` and ``separation``, (C,)."""
    ordered = values.double().sort(0).values
    count = len(ordered)
    highest, nothing = ordered[-1], torch.zeros_like(ordered[-1])
    if count < 2 * smallest or count < 2:
        return highest, nothing, nothing
    centred = ordered - ordered.mean(0)
    sums, squares = centred.cumsum(0), centred.square().cumsum(0)
    below = torch.arange(1, count, dtype=torch.float64)[:, None]
    above = count - below
    between = sums[:-1].square() * count / (below * above)
    # Equal values belong together: no cut between them.
    between[ordered[1:] == ordered[:-1]] = -1
    between[: smallest - 1] = between[count - smallest :] = -1
    best, cut = between.max(0, keepdim=True)

    def at_cut(each: Tensor) -> Tensor:
        return each.gather(0, cut)[0]

    lower, upper = at_cut(sums[:-1] / below), at_cut(-sums[:-1] / above)
    whole = squares[-1]

    def deviation(square: Tensor, mean: Tensor) -> Tensor:
        variance = square - mean.square()
        # What is left of a difference of equals is rounding.
        return variance.where(variance > 1e-12 * whole / count, 0).sqrt()

    spread = deviation(at_cut(squares[:-1] / below), lower)
    spread += deviation(at_cut((whole - squares[:-1]) / above), upper)
    gap = (upper - lower).clamp_min(1e-300)
    found = best[0] > 0
    fit = (best[0] / whole.clamp_min(1e-300)).clamp(0, 1)
    separation = gap / torch.maximum(spread, 1e-9 * gap)
    return at_cut(ordered).where(found, highest), fit.where(found, 0), separation.where(found, 0)
