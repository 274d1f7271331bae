"""How far a value stands out from others, most of which are taken to be ordinary."""

from __future__ import annotations

from torch import Tensor

CONSISTENT = 1.4826
"""A normal distribution's standard deviation is so many median absolute deviations."""


def anomaly_indices(values: Tensor) -> Tensor:
    """float64 (K,): how many deviations each value lies above the median, by the median absolute deviation.

    Neural Cleanse's anomaly index (section IV-C), there below the median, and SCAn's and Beatrix's. Where
    most values are equal they have no spread: a relative spread of a millionth stands in for none.
    """
    each = values.double()
    if not len(each):
        return each
    middle = each.quantile(0.5)
    deviation = CONSISTENT * (each - middle).abs().quantile(0.5)
    indices: Tensor = (each - middle) / deviation.clamp_min(max(1e-6 * float(each.abs().max()), 1e-300))
    return indices
