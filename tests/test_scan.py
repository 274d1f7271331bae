"""SCAn on simulated representations whose two components are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest
from torch import Tensor

import known_features
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.by_class import ClassFinding, with_statistics
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.scan import (
    PUBLISHED_LIMIT,
    StatisticalContamination,
    best_cuts,
    decompose,
    logarithms,
    two_groups,
)
from untrojan.defenses.outliers import anomaly_indices
from untrojan.models.classifier import Classifier

CLASSES, EACH, PIXELS = 8, 80, 48
TARGET = 2


def pixels_as_features() -> Classifier:
    return known_features.pixels_as_features(CLASSES)


def identities_and_variation(
    poisoned: int = 12, seed: int = 0, each: int = EACH, shift: float = 40.0
) -> tuple[ImageSet, Tensor]:
    """Every class has a mean of its own and the same covariance, of very unequal variances; the first images
    of class 2 are shifted where there is little variance."""
    random = torch.Generator().manual_seed(seed)
    means = 120 + 25 * torch.randn(CLASSES, PIXELS, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(CLASSES).repeat_interleave(each)
    spread = torch.linspace(18, 4, PIXELS)
    pixels = means[labels] + spread * torch.randn(len(labels), PIXELS, generator=random)
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[TARGET * each : TARGET * each + poisoned] = True
    pixels[truth, -10:] -= shift
    images = pixels.clamp(0, 255).round().to(torch.uint8).view(-1, 3, 4, 4)
    names = tuple(f"class {i}" for i in range(CLASSES))
    return ImageSet(images, labels, names, numbered(len(labels))), truth


def covariance(width: int, seed: int) -> Tensor:
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(width, dtype=torch.float64)


def normal(count: int, of: Tensor, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, len(of), generator=random, dtype=torch.float64)
    return drawn @ torch.linalg.cholesky(of).T


def test_em_recovers_both_covariances() -> None:
    s_mu, s_eps = 4 * covariance(3, 1), covariance(3, 2)
    counts = torch.arange(2000) % 12 + 2
    labels = torch.arange(2000).repeat_interleave(counts)
    points = normal(2000, s_mu, 3)[labels] + normal(len(labels), s_eps, 4)
    found = decompose(points, labels)
    torch.testing.assert_close(found.identity, s_mu, rtol=0.1, atol=0.1 * float(s_mu.diagonal().mean()))
    torch.testing.assert_close(found.variation, s_eps, rtol=0.05, atol=0.05 * float(s_eps.diagonal().mean()))


def test_em_has_the_balanced_solution() -> None:
    """With n points in every class, maximum likelihood has a closed form: the pooled variance within, and
    that of class means less 1/n of it."""
    identities = normal(40, 20 * covariance(4, 1), 5)
    points = identities.repeat_interleave(6, 0) + normal(240, covariance(4, 6), 7)
    labels = torch.arange(40).repeat_interleave(6)
    by_class = points.view(40, 6, 4)
    residuals = (by_class - by_class.mean(1, keepdim=True)).flatten(0, 1)
    within = residuals.T @ residuals / (40 * 5)
    between = torch.cov(by_class.mean(1).T, correction=0) - within / 6
    assert bool((torch.linalg.eigvalsh(between) > 0).all())
    found = decompose(points, labels, iterations=3000, tolerance=1e-12)
    torch.testing.assert_close(found.variation, within, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.identity, between, rtol=1e-3, atol=1e-3)


def test_variation_without_a_class_is_that_of_the_others() -> None:
    """To the last bit where nothing is uncertain: identities are known when classes are large."""
    labels = torch.arange(4).repeat_interleave(500)
    points = normal(2000, covariance(3, 1), 5)
    points[labels == 2] *= 10
    found = decompose(points, labels)
    others = decompose(points[labels != 2], labels[labels != 2])
    torch.testing.assert_close(found.variation_without(2), others.variation, rtol=0.02, atol=0.02)
    assert float(found.variation.diagonal().min()) > 10 * float(others.variation.diagonal().min())
    alone = decompose(points[:500], labels[:500])
    torch.testing.assert_close(alone.variation_without(0), alone.variation)


def test_em_with_absent_classes_and_as_many_as_dimensions() -> None:
    points = normal(30, covariance(3, 1), 8)
    labels = torch.arange(3).repeat_interleave(10)
    found = decompose(points, labels)
    with_gaps = decompose(points, 2 * labels)
    torch.testing.assert_close(found.variation, with_gaps.variation)
    torch.testing.assert_close(found.identity, with_gaps.identity)


def test_em_survives_more_dimensions_than_points() -> None:
    points = normal(12, covariance(20, 1), 9)
    found = decompose(points, torch.arange(12) % 3)
    assert bool((torch.linalg.eigvalsh(found.variation) > 0).all())
    constant = decompose(torch.ones(12, 4, dtype=torch.float64), torch.arange(12) % 3)
    assert bool(torch.isfinite(constant.variation).all())


def ratio_of(points: Tensor, first: Tensor, variation: Tensor) -> float:
    """J by its definition: residuals about one mean, less those about two."""
    inverse = torch.linalg.inv(variation)

    def residuals(group: Tensor) -> float:
        apart = group - group.mean(0)
        return float(torch.einsum("nd,de,ne->", apart, inverse, apart))

    return residuals(points) - residuals(points[first]) - residuals(points[~first])


def test_ratio_of_given_groups_is_chi_square() -> None:
    """Which fixes J's scale: of groups that are given, not sought, it has D degrees of freedom."""
    variation = covariance(5, 1)
    groups = torch.arange(30) < 11
    drawn = [ratio_of(normal(30, variation, seed), groups, variation) for seed in range(400)]
    assert kstest(drawn, chi2(5).cdf).pvalue > 0.01


def test_planted_groups_are_found_and_their_ratio_told() -> None:
    variation = covariance(6, 2)
    truth = torch.arange(300) < 40
    points = normal(300, variation, 3)
    along = torch.linalg.cholesky(variation)[:, 2]
    mixed = points + 9.0 * truth.unsqueeze(1) * along
    found = two_groups(mixed, variation)
    smaller = found.first if int(found.first.sum()) < 150 else ~found.first
    assert torch.equal(smaller, truth)
    assert found.statistic == pytest.approx(ratio_of(mixed, found.first, variation), rel=1e-9)
    # Two groups d deviations apart: n p (1 - p) d^2, here 2808; one group, cut in two: 2/pi of n and a bit.
    assert found.statistic == pytest.approx(2808, rel=0.15)
    assert 0.6 * 300 < two_groups(points, variation).statistic < 1.0 * 300


def test_leaning_is_the_likelihood_ratio() -> None:
    variation, points = covariance(3, 1), normal(50, covariance(3, 1), 2)
    points[:20] += 5
    found = two_groups(points, variation)
    inverse = torch.linalg.inv(variation)

    def distance(group: Tensor) -> Tensor:
        apart = points - points[group].mean(0)
        return torch.einsum("nd,de,ne->n", apart, inverse, apart)

    expected = (distance(~found.first) - distance(found.first)) / 2
    torch.testing.assert_close(found.leaning, expected)


@given(st.integers(0, 1000), st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_invertible_maps_change_nothing(seed: int, count: int) -> None:
    variation, points = covariance(4, seed), normal(count, covariance(4, seed + 1), seed + 2)
    change = covariance(4, seed + 3) + torch.eye(4, dtype=torch.float64)
    found = two_groups(points, variation)
    mapped = two_groups(points @ change.T + 3, change @ variation @ change.T)
    assert mapped.statistic == pytest.approx(found.statistic, rel=1e-6)
    assert found.statistic == pytest.approx(ratio_of(points, found.first, variation), rel=1e-6)


def test_best_cuts_against_all_cuts() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(15, 4, generator=random, dtype=torch.float64) ** 3
    values -= values.mean(0)
    members = best_cuts(values) > 0
    for column, chosen in zip(values.T, members.T, strict=True):
        inside = [
            float(((g - g.mean()) ** 2).sum() + ((h - h.mean()) ** 2).sum())
            for cut in column.sort().values[:-1]
            for g, h in [(column[column <= cut], column[column > cut])]
        ]
        g, h = column[chosen], column[~chosen]
        assert float(((g - g.mean()) ** 2).sum() + ((h - h.mean()) ** 2).sum()) == pytest.approx(min(inside))
        assert float(g.max()) < float(h.min())


def test_statistics_on_another_scale() -> None:
    nothing = torch.zeros(1)
    found = {c: ClassFinding(v, nothing.bool(), nothing) for c, v in enumerate([0.0, 2.0, 1.0])}
    by_ln = [each.statistic for each in with_statistics(found, logarithms).values()]
    assert by_ln == pytest.approx([math.log(0.01), math.log(2), 0.0])
    indices = [each.statistic for each in with_statistics(found, anomaly_indices).values()]
    assert indices[0] < indices[2] == 0.0 < indices[1]
    assert with_statistics({}, anomaly_indices) == {}


@pytest.mark.parametrize("with_trusted", [False, True])
@pytest.mark.parametrize("threshold", ["published", "calibrated"])
def test_the_contaminated_class(threshold: str, with_trusted: bool) -> None:
    data, truth = identities_and_variation()
    trusted = identities_and_variation(0, seed=1, each=60)[0] if with_trusted else None
    cleanser = StatisticalContamination(threshold=threshold, components=16)  # type: ignore[arg-type]
    report = cleanser.judge(Features(pixels_as_features(), data, trusted))
    assert report.targets == (TARGET,)
    assert torch.equal(report.flagged, truth)
    assert (
        float(report.scores[truth].min()) > 0 > float(report.scores[~truth & (data.labels == TARGET)].max())
    )
    if threshold == "published":
        assert report.evidence["class_statistics"][str(TARGET)] > PUBLISHED_LIMIT
    else:
        assert report.evidence["p_value"] < 1e-3


def test_trusted_images_tell_a_poisoned_majority() -> None:
    data, truth = identities_and_variation(poisoned=60)
    trusted, _ = identities_and_variation(0, seed=1, each=60)
    features = Features(pixels_as_features(), data, trusted)
    report = StatisticalContamination(threshold="calibrated").judge(features)
    assert report.targets == (TARGET,)
    assert torch.equal(report.flagged, truth)


def test_calibrated_false_alarms() -> None:
    """Ln J of clean classes is near enough to normal for Student's interval to hold."""
    model, cleanser = pixels_as_features(), StatisticalContamination(threshold="calibrated", components=8)
    verdicts = [cleanser(identities_and_variation(0, seed=s)[0], model).verdict for s in range(40)]
    # 2 of 40 are allowed on average; 7 or more come about once in 150 times.
    assert verdicts.count("poisoned") <= 6
    assert verdicts.count("undecided") == 0


def test_constant_and_missing_classes() -> None:
    data, truth = identities_and_variation()
    images = data.images.clone()
    images[data.labels == 0] = 7
    kept = (data.labels != 1) | (torch.arange(len(data)) == EACH)
    report = StatisticalContamination()(replace(data, images=images).select(kept), pixels_as_features())
    assert report.targets == (TARGET,)
    assert torch.equal(report.flagged, truth[kept])
    assert report.evidence["classes_left_out"] == [1]
    assert report.evidence["class_details"]["0"]["likelihood_ratio"] == pytest.approx(0, abs=1e-6)
    assert report.evidence["class_suspects"]["0"] == 0


def test_no_more_components_than_images_allow() -> None:
    """Six images a class in 48 dimensions: there is an answer, and no division by a singular covariance."""
    data, _ = identities_and_variation(0, each=6)
    report = StatisticalContamination(components=40)(data, pixels_as_features())
    assert report.verdict in ("clean", "poisoned")
    assert all(math.isfinite(value) for value in report.evidence["class_statistics"].values())
    few = data.select(torch.tensor([0, 1, 6, 7]))
    assert StatisticalContamination()(few, pixels_as_features()).verdict == "undecided"


def test_one_class_is_judged_among_all() -> None:
    data, _ = identities_and_variation()
    features, cleanser = Features(pixels_as_features(), data), StatisticalContamination()
    alone = cleanser.examine(features, TARGET, data.indices_of(TARGET))
    among = cleanser.examine_all(features)[TARGET]
    assert alone.statistic == among.statistic
    assert torch.equal(alone.suspects, among.suspects)
