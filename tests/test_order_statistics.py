"""RE's hypothesis test against SciPy, high-precision arithmetic and simulation."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untrojan.defenses.cleansing.order_statistics import (
    calibrated_log_p_value,
    find_targets,
    fit_gamma,
    log_smallest_of,
    log_upper_gamma,
    order_statistic_test,
)


def null_reciprocals(seed: int, num_classes: int = 10) -> np.ndarray:
    values = np.random.default_rng(seed).gamma(6, 0.05, (num_classes, num_classes)) + 0.1
    np.fill_diagonal(values, np.nan)
    return values


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 3000), st.floats(1e-3, 1e4))
def test_upper_gamma_matches_high_precision(shape: float, x: float) -> None:
    with mpmath.workdps(60):
        exact = float(mpmath.log(mpmath.gammainc(shape, x, mpmath.inf, regularized=True)))
    assert log_upper_gamma(shape, x) == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_fits_agree_with_scipy() -> None:
    from scipy import stats

    values = stats.gamma.rvs(6, loc=0.1, scale=0.05, size=200, random_state=0)
    shape, location, scale = stats.gamma.fit(values)
    fit, used = fit_gamma(values)
    assert used == "free"
    assert (fit.shape, fit.location, fit.scale) == pytest.approx((shape, location, scale), rel=2e-3)
    shape, _, scale = stats.gamma.fit(values, floc=0)
    fit, used = fit_gamma(values, "zero")
    assert (used, fit.location) == ("zero", 0.0)
    assert (fit.shape, fit.scale) == pytest.approx((shape, scale), rel=1e-6)


def test_free_location_falls_back_where_it_has_no_maximum() -> None:
    # An exponential-like sample has its likelihood grow without end as the location nears its minimum.
    values = 1 + np.random.default_rng(0).gamma(0.4, 1.0, 300)
    assert fit_gamma(values)[1] == "zero"


def test_weights_stand_for_repeated_values() -> None:
    values = np.random.default_rng(0).gamma(5, 1.0, 40)
    weights = np.random.default_rng(1).integers(1, 5, 40)
    weighted, _ = fit_gamma(values, "zero", weights.astype(float))
    repeated, _ = fit_gamma(np.repeat(values, weights), "zero")
    assert weighted.shape == pytest.approx(repeated.shape)
    assert weighted.scale == pytest.approx(repeated.scale)


@pytest.mark.parametrize("log_p", [-0.01, -1.0, -20.0, -35.9, -36.1, -800.0])
def test_smallest_of_many_matches_high_precision(log_p: float) -> None:
    with mpmath.workdps(400):
        exact = float(mpmath.log(1 - (1 - mpmath.exp(log_p)) ** 9))
    assert log_smallest_of(log_p, 9) == pytest.approx(exact, rel=1e-12)


def test_strong_attack_neither_underflows_nor_saturates() -> None:
    values = null_reciprocals(0)
    logs = []
    for strength in (20.0, 60.0, 200.0):
        values[2, 7] = strength
        detection = order_statistic_test(values)
        assert (detection.suspect.target, detection.suspect.source) == (7, 2)
        logs.append(detection.log_p_value)
    assert logs[0] > logs[1] > logs[2] > -math.inf
    assert logs[1] < -745  # below the smallest float


def test_calibration_keeps_the_promised_false_alarm_rate() -> None:
    plain = calibrated = 0
    for seed in range(150):
        values = null_reciprocals(seed)
        detection = order_statistic_test(values)
        plain += detection.p_value <= 0.05
        # Most null sets lie far above the level, where the correction only raises the p-value further.
        if detection.p_value <= 0.05:
            calibrated += calibrated_log_p_value(detection, values, replicates=39) <= math.log(0.05)
    assert calibrated <= plain
    # 5 % of 150 is 7.5; 13 is its .97 quantile.
    assert calibrated <= 13
    assert plain >= 10


def test_several_targets_are_all_found_even_where_they_mask_each_other() -> None:
    others = 0
    for seed in range(20):
        values = null_reciprocals(seed)
        values[1, 4], values[3, 6] = 3.0, 3.2
        targets = {test.target for test in find_targets(values, calibrate=False)[0]}
        assert targets >= {4, 6}
        others += len(targets) - 2
    assert others == 0


def test_two_classes_near_each_other_are_not_two_attacks() -> None:
    nan = np.nan
    # A net trained on five clean kinds of signs; the second and the fifth are blue and much alike.
    values = np.array([
        [nan, 1.0209, 0.9670, 1.2310, 1.0050],
        [0.9728, nan, 1.1409, 1.1230, 1.4499],
        [1.0168, 1.1088, nan, 1.0246, 1.0060],
        [1.1006, 1.1700, 0.9537, nan, 1.0831],
        [0.9984, 1.4071, 1.0977, 0.9639, nan],
    ])  # fmt: skip
    found, _, log_p = find_targets(values)
    assert (found, log_p > math.log(0.05)) == ((), True)
    # Nothing is left to say of them where no other pair has a value.
    values[[0, 2, 3], 1] = np.nan
    assert find_targets(values)[0] == ()


def test_pairs_without_a_value_are_left_out() -> None:
    values = null_reciprocals(3)
    values[0, 1:5] = np.nan
    values[5, 2] = 10.0
    found, detection, _ = find_targets(values)
    assert found[0].target == 2
    assert math.isfinite(detection.log_p_value)


def test_cleared_classes_are_neither_tested_nor_in_the_null() -> None:
    values = null_reciprocals(0)
    values[2, 7] = 50.0
    cleared = order_statistic_test(values, cleared=frozenset({7}))
    assert 7 not in {test.target for test in cleared.tests}
    assert cleared.p_value > 1e-3


def test_the_largest_reciprocals_hold_the_smallest_p_value() -> None:
    for seed in range(40):
        values = null_reciprocals(seed, 8 + seed % 5)
        whole, part = order_statistic_test(values), order_statistic_test(values, candidates=2)
        assert part.log_p_value == whole.log_p_value
        assert part.suspect == whole.suspect
