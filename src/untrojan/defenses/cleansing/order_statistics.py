"""RE's hypothesis test: is one target class's largest reciprocal too large for the others' null?

Xiang, Miller & Kesidis, section 4.2.2, equations 10 and 11. Everything is carried in logarithms: a strong
attack's p-value lies far below the smallest float, and a weak one must not round up to it either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GammaNull:
    """A Gamma density fitted to reciprocals of pairs that are taken to be clean."""

    shape: float
    location: float
    scale: float

    def log_survival(self, value: float) -> float:
        """ln P(R >= value), finite wherever the density is positive."""
        x = (value - self.location) / self.scale
        return 0.0 if x <= 0 else log_upper_gamma(self.shape, x)


Location = Literal["free", "zero"]


@dataclass(frozen=True)
class ClassTest:
    """One putative target class."""

    target: int
    source: int
    """The class whose pattern into ``target`` is the smallest."""
    largest: float
    """The largest reciprocal 1/||v||, in 1/(L2 of pixels in [0, 1])."""
    log_p_value: float
    """ln of equation 10's order-statistic p-value."""
    null: GammaNull
    location: Location
    """``zero`` where the three-parameter fit failed or was asked not to be made."""


@dataclass(frozen=True)
class Detection:
    """The verdict of equation 11 over all classes."""

    tests: tuple[ClassTest, ...]
    """One a class, in class order."""
    log_p_value: float

    @property
    def suspect(self) -> ClassTest:
        """The class with the smallest p-value; of equals, the one with the largest reciprocal."""
        return min(self.tests, key=lambda test: (test.log_p_value, -test.largest))

    @property
    def p_value(self) -> float:
        """May round to 0 where ``log_p_value`` still tells how far below it lies."""
        return math.exp(self.log_p_value)


def order_statistic_test(
    reciprocals: Floats,
    *,
    location: Location = "free",
    weights: Floats | None = None,
    cleared: frozenset[int] = frozenset(),
    candidates: int | None = None,
) -> Detection:
    """Equations 10 and 11 on reciprocals (K, K), [source, target]; NaN where a pair has none.

    ``weights`` (K, K) are inverse inclusion probabilities, where only some pairs were estimated.
    Classes in ``cleared`` have been judged already: they are neither tested nor part of any null. With
    ``candidates``, p-values are computed for that many classes of largest reciprocal alone, among which the
    smallest p-value is found.
    """
    num_classes = len(reciprocals)
    tested = [c for c in range(num_classes) if c not in cleared and np.isfinite(reciprocals[:, c]).any()]
    count = len(tested)
    if candidates is not None:
        tested = sorted(tested, key=lambda c: -np.nanmax(reciprocals[:, c]))[:candidates]
    tests = tuple(_test_class(reciprocals, c, location, weights, cleared) for c in tested)
    smallest = min(test.log_p_value for test in tests)
    return Detection(tests, log_smallest_of(smallest, count))


def _test_class(
    reciprocals: Floats, target: int, location: Location, weights: Floats | None, cleared: frozenset[int]
) -> ClassTest:
    kept = np.isfinite(reciprocals)
    kept[:, [target, *cleared]] = False
    null, used = fit_gamma(reciprocals[kept], location, None if weights is None else weights[kept])
    column = reciprocals[:, target]
    source = int(np.nanargmax(column))
    log_survival = null.log_survival(float(column[source]))
    log_p_value = log_smallest_of(log_survival, len(reciprocals) - 1)
    return ClassTest(target, source, float(column[source]), log_p_value, null, used)


def log_smallest_of(log_p: float, count: int) -> float:
    """ln(1 - (1 - p)^count): the chance that the smallest of ``count`` p-values is at most p."""
    if log_p >= 0:
        return 0.0
    if log_p < -36:
        # 1 - p is 1 to the last bit there, and count * p is exact to p^2.
        return min(0.0, math.log(count) + log_p)
    survivors = count * math.log1p(-math.exp(log_p))
    return math.log(-math.expm1(survivors))


def fit_gamma(
    values: Floats, location: Location = "free", weights: Floats | None = None
) -> tuple[GammaNull, Location]:
    """Maximum likelihood, with the location free as the paper's author fits it, or fixed at zero.

    A free location has no maximum where the shape falls below one: the likelihood grows without end as
    the location nears the smallest value. There, and where the search fails, it is fixed at zero.
    """
    weights = np.ones_like(values) if weights is None else weights
    at_zero = _fit_two(values, weights)
    if location == "zero":
        return at_zero, "zero"
    free = _fit_three(values, weights, at_zero)
    return (at_zero, "zero") if free is None else (free, "free")


def _fit_two(values: Floats, weights: Floats) -> GammaNull:
    """Shape and scale at location zero: the shape solves ln k - digamma(k) = ln mean - mean ln."""
    from scipy.optimize import brentq
    from scipy.special import digamma

    mean = float(np.average(values, weights=weights))
    gap = math.log(mean) - float(np.average(np.log(values), weights=weights))
    # Equal values have no spread to fit: a relative spread of a millionth stands in for none.
    gap = max(gap, 1e-12)
    # In ln k, for the shape ranges over fifteen orders of magnitude.
    shape = math.exp(brentq(lambda ln_k: ln_k - digamma(math.exp(ln_k)) - gap, -7.0, 28.0))
    return GammaNull(shape, 0.0, mean / shape)


def _fit_three(values: Floats, weights: Floats, at_zero: GammaNull) -> GammaNull | None:
    """Profile likelihood over the location: for each, shape and scale are exact."""
    from scipy.optimize import minimize_scalar

    smallest = float(values.min())
    spread = float(np.std(values)) or abs(smallest) * 1e-6
    total = float(weights.sum())

    def negative_log_likelihood(log_distance: float) -> float:
        distance = math.exp(log_distance)
        fit = _fit_two(values - smallest + distance, weights)
        shifted = values - smallest + distance
        log_density = (
            (fit.shape - 1) * np.log(shifted)
            - shifted / fit.scale
            - math.lgamma(fit.shape)
            - fit.shape * math.log(fit.scale)
        )
        return -float(np.average(log_density, weights=weights)) * total

    bounds = (math.log(spread * 1e-3), math.log(spread * 1e3))
    found = minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded")
    distance = math.exp(found.x)
    fit = _fit_two(values - smallest + distance, weights)
    at_edge = min(abs(found.x - bounds[0]), abs(found.x - bounds[1])) < 0.01
    if at_edge or fit.shape <= 1 or not found.success:
        return None
    return GammaNull(fit.shape, smallest - distance, fit.scale)


def log_upper_gamma(shape: float, x: float) -> float:
    """ln Q(shape, x), the regularised upper incomplete gamma function, without underflow.

    SciPy's is used while it is positive; beyond, Legendre's continued fraction in logarithms.
    """
    from scipy.special import gammaincc

    direct = float(gammaincc(shape, x))
    if direct > 1e-290:
        return math.log(direct)
    # Modified Lentz; it converges fast for x > shape + 1, the only place where Q is as small as this.
    tiny = 1e-300
    b = x + 1 - shape
    c, d = 1 / tiny, 1 / b
    fraction = d
    for i in range(1, 10_000):
        a = -i * (i - shape)
        b += 2
        d = 1 / (a * d + b or tiny)
        c = b + a / c or tiny
        fraction *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return -x + shape * math.log(x) - math.lgamma(shape) + math.log(fraction)


def calibrated_log_p_value(
    detection: Detection,
    reciprocals: Floats,
    location: Location = "free",
    replicates: int = 199,
    seed: int = 0,
    weights: Floats | None = None,
) -> float:
    """Equation 11's p-value corrected for the null having been estimated, ln.

    A Gamma fitted to some eighty reciprocals and read far out in its tail is too sure of itself: taken at
    its word, the test alarms on more than twice as many clean sets as it promises. The correction is a
    parametric bootstrap: sets drawn from the fitted null go through the same test, and their p-values say
    how often one as small comes by chance. Far outside the bootstrap's reach the uncorrected value stands.
    """
    if detection.log_p_value > math.log(0.2) or detection.log_p_value < math.log(1e-6):
        return detection.log_p_value
    null, random = detection.suspect.null, np.random.default_rng(seed)
    missing = ~np.isfinite(reciprocals)
    tested = [test.target for test in detection.tests]
    cleared = frozenset(range(len(reciprocals))) - frozenset(tested)
    floor = np.nanmin(reciprocals) / 2
    smaller = 0
    for _ in range(replicates):
        drawn = random.gamma(null.shape, null.scale, reciprocals.shape) + null.location
        # A location fitted below zero allows values that no reciprocal of a norm can have.
        drawn = np.maximum(drawn, floor)
        if weights is None:
            drawn[missing] = np.nan
        else:
            drawn = _as_selected(drawn, weights, random)
        drawn_test = order_statistic_test(
            drawn, location=location, weights=weights, cleared=cleared, candidates=2
        )
        smaller += drawn_test.log_p_value <= detection.log_p_value
    return math.log((1 + smaller) / (1 + replicates))


def _as_selected(drawn: Floats, weights: Floats, random: np.random.Generator) -> Floats:
    """A drawn matrix of which, as of the real one, each target's largest and some random others are known."""
    kept = np.full_like(drawn, np.nan)
    for target, column in enumerate(drawn.T):
        certain, sampled = weights[:, target] == 1, weights[:, target] > 1
        others = np.delete(np.arange(len(column)), target)
        largest = others[np.argsort(-column[others])][: int(certain.sum())]
        rest = np.setdiff1d(others, largest)
        kept[certain, target] = column[largest]
        kept[sampled, target] = column[random.choice(rest, int(sampled.sum()), replace=False)]
    return kept


def find_targets(
    reciprocals: Floats,
    significance: float = 0.05,
    *,
    location: Location = "free",
    weights: Floats | None = None,
    calibrate: bool = True,
    most: int = 3,
) -> tuple[tuple[ClassTest, ...], Detection, float]:
    """Every class that stands out, the clearest first; equation 11's test of all classes; ln of its p-value,
    calibrated where asked.

    A class that is found is cleared from the null and the rest are tested again, at a hundredth of
    ``significance``: classes differ in how easily they are reached, the more so beside a backdoor, and a
    second target that is none costs a clean class its images. Two strong attacks can also hide each other,
    each sitting in the null of the other: where nothing is found at first, the m largest classes (m = 2 ..
    ``most``) are left out together, and the smallest of them is tested as the m-th largest of K maxima, at
    the same hundredth. Between each other they count for nothing then: two classes that look alike are near
    each other both ways, without any attack.
    """

    def test(cleared: frozenset[int]) -> tuple[Detection, float]:
        detection = order_statistic_test(reciprocals, location=location, weights=weights, cleared=cleared)
        if not calibrate:
            return detection, detection.log_p_value
        return detection, calibrated_log_p_value(detection, reciprocals, location, weights=weights)

    overall, overall_log_p = detection, log_p = test(frozenset())
    found: list[ClassTest] = []
    limit = len(reciprocals) // 2
    while len(found) < limit and log_p <= math.log(significance / 100 if found else significance):
        found.append(detection.suspect)
        detection, log_p = test(frozenset(each.target for each in found))
    if not found:
        found = _unmask(reciprocals, significance / 100, location, weights, min(most, limit))
    return tuple(found), overall, overall_log_p


def _unmask(
    reciprocals: Floats, significance: float, location: Location, weights: Floats | None, most: int
) -> list[ClassTest]:
    from scipy.stats import binom

    num_classes = len(reciprocals)
    order = np.argsort(-np.nan_to_num(reciprocals, nan=-np.inf).max(axis=0))
    for count in range(most, 1, -1):
        members = order[:count].tolist()
        from_others = reciprocals.copy()
        from_others[np.ix_(members, members)] = np.nan
        if not np.isfinite(from_others[:, members]).any(axis=0).all():
            continue
        group = frozenset(members)
        tests = [_test_class(from_others, c, location, weights, group - {c}) for c in members]
        weakest = max(test.log_p_value for test in tests)
        # P(at least `count` of K class maxima reach the smallest of the group).
        log_p = float(binom.logsf(count - 1, num_classes, math.exp(weakest)))
        if log_p < math.log(significance):
            return sorted(tests, key=lambda test: test.log_p_value)
    return []
