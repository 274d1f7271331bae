"""Robust deviations, which three methods judge by."""

from __future__ import annotations

import pytest
import torch

from untrojan.defenses.outliers import anomaly_indices


def test_anomaly_indices_are_robust_deviations() -> None:
    values = 7 + 2 * torch.randn(20_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    indices = anomaly_indices(values)
    torch.testing.assert_close(indices, (values - 7) / 2, atol=0.2, rtol=0.05)
    assert float(indices.std()) == pytest.approx(1, abs=0.05)


def test_one_far_value_hardly_moves_the_others() -> None:
    # Median 11; absolute deviations 1, 0, 1, 2, 9 with median 1.
    sizes = torch.tensor([10.0, 11.0, 12.0, 13.0, 2.0])
    torch.testing.assert_close(anomaly_indices(-sizes).float(), (11 - sizes) / 1.4826)
    even = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(anomaly_indices(even).float(), (even - 2.5) / 1.4826)


def test_values_without_spread() -> None:
    assert anomaly_indices(torch.tensor([3.0, 3.0])).tolist() == [0, 0]
    assert float(anomaly_indices(torch.tensor([1.0, 1.0, 1.0, 2.0]))[3]) > 1e5
    assert len(anomaly_indices(torch.zeros(0))) == 0
