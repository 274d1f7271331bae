"""Activation clustering and what all cleansers by class share, on features that are known exactly."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import known_features
from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.activation_clustering import (
    ActivationClustering,
    mean_silhouette,
    reduced,
    two_clusters,
)
from untrojan.defenses.cleansing.by_class import log_upper_prediction, outlying_classes
from untrojan.defenses.cleansing.features import Features
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier

CLASSES, EACH = 6, 60


def pixels_as_features() -> Classifier:
    return known_features.pixels_as_features(CLASSES)


def noise_with_a_shifted_group(poisoned: int = 15, shift: float = 60.0) -> tuple[ImageSet, torch.Tensor]:
    return known_features.noise_with_a_shifted_group(CLASSES, EACH, poisoned, shift)


def test_the_shifted_group_is_the_smaller_cluster() -> None:
    data, truth = noise_with_a_shifted_group()
    for reduction, components in (("pca", 10), ("ica", 2)):
        activations = data.images[data.labels == 2].float().flatten(1)
        found = two_clusters(activations, components, reduction)  # type: ignore[arg-type]
        assert torch.equal(found.smaller, truth[data.labels == 2])
        assert bool((found.leaning[found.smaller] > 0).all())
        assert bool((found.leaning[~found.smaller] < 0).all())


@pytest.mark.parametrize("rule", ["silhouette", "relative-size"])
def test_published_rules_and_what_they_flag(rule: str) -> None:
    data, truth = noise_with_a_shifted_group()
    report = ActivationClustering(rule=rule)(data, pixels_as_features())  # type: ignore[arg-type]
    assert report.verdict == "poisoned"
    assert report.targets[0] == 2
    assert torch.equal(report.flagged & (data.labels == 2), truth)
    silhouettes = {c: d["silhouette"] for c, d in report.evidence["class_details"].items()}
    assert silhouettes["2"] > 0.3 > 0.1 > max(v for c, v in silhouettes.items() if c != "2")


def test_calibrated_against_the_other_classes() -> None:
    data, truth = noise_with_a_shifted_group()
    cleanser = ActivationClustering(threshold="calibrated")
    report = cleanser(data, pixels_as_features())
    assert report.targets == (2,)
    assert torch.equal(report.flagged, truth)
    assert report.evidence["p_value"] < 1e-3
    clean, _ = noise_with_a_shifted_group(poisoned=0)
    assert cleanser(clean, pixels_as_features()).verdict == "clean"


def test_calibrated_against_trusted_images() -> None:
    data, truth = noise_with_a_shifted_group()
    trusted, _ = noise_with_a_shifted_group(poisoned=0)
    features = Features(pixels_as_features(), data, trusted)
    report = ActivationClustering(threshold="calibrated").judge(features)
    assert report.targets == (2,)
    assert torch.equal(report.flagged, truth)
    renamed = replace(trusted, class_names=tuple(reversed(trusted.class_names)))
    with pytest.raises(UntrojanError, match="no trusted images"):
        Features(pixels_as_features(), data, trusted.select(trusted.labels < 0))
    with pytest.raises(UntrojanError, match="trusted images must have the classes of the data"):
        Features(pixels_as_features(), data, renamed)


def test_smaller_removes_from_every_class() -> None:
    data, _ = noise_with_a_shifted_group()
    report = ActivationClustering(rule="smaller")(data, pixels_as_features())
    assert set(report.targets) == set(range(CLASSES))
    assert all(bool(report.flagged[data.labels == c].any()) for c in range(CLASSES))


def test_classes_without_spread_or_without_images() -> None:
    data, _ = noise_with_a_shifted_group()
    images = data.images.clone()
    images[data.labels == 0] = 7
    kept = (data.labels != 1) | (torch.arange(len(data)) == EACH)
    report = ActivationClustering()(replace(data, images=images).select(kept), pixels_as_features())
    assert report.evidence["classes_left_out"] == [1]
    assert report.evidence["class_statistics"]["0"] == 0.0
    assert report.targets == (2,)
    assert report.evidence["classes_unjudged"] == {
        "0": "the features of all its images are equal",
        "1": "it has 1 of the 4 images that are needed",
    }


def test_what_cannot_be_judged_is_not_clean() -> None:
    """No class stands out, but one has too few images, or no spread: nobody may read that as "clean"."""
    data, _ = noise_with_a_shifted_group()
    ordinary = data.labels != 2
    whole = ActivationClustering()(data.select(ordinary), pixels_as_features())
    assert whole.verdict == "clean"
    rare = ordinary & ((data.labels != 1) | (data.labels.eq(1).cumsum(0) <= 3))
    few = ActivationClustering()(data.select(rare), pixels_as_features())
    assert few.verdict == "undecided"
    assert f"{data.class_names[1]!r} could not be: it has 3 of the 4 images" in few.reason
    images = data.images.clone()
    images[data.labels == 0] = 7
    flat = ActivationClustering()(replace(data, images=images).select(ordinary), pixels_as_features())
    assert flat.verdict == "undecided"
    assert "the features of all its images are equal" in flat.reason


def test_components_that_are_not_found_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("untrojan.defenses.cleansing.activation_clustering.ICA_STEPS", 1)
    data, _ = noise_with_a_shifted_group()
    ordinary = data.select(data.labels != 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = ActivationClustering(reduction="ica")(ordinary, pixels_as_features())
    assert report.verdict == "undecided"
    assert "its independent components were not found in 1 steps" in report.reason
    assert ActivationClustering(reduction="pca")(ordinary, pixels_as_features()).verdict == "clean"


def test_fused_levels_weigh_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = noise_with_a_shifted_group()
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(known_features.PIXELS, 5), nn.ReLU(), nn.Linear(5, CLASSES)
    )
    model = Classifier(network, CLASSES, torch.zeros(3), torch.ones(3))
    features = Features(model, data)
    both = features.at("network.1+penultimate", torch.arange(10))
    assert both.shape == (10, 10)
    norms = features.at("network.1+penultimate").view(-1, 2, 5).square().sum(2).mean(0)
    torch.testing.assert_close(norms, torch.ones(2))
    torch.testing.assert_close(features.at("network.1").relu(), features.at("penultimate"))
    # More than fits into memory lies in a mapped file, and is the same.
    monkeypatch.setattr("untrojan.defenses.cleansing.features.IN_MEMORY", 0)
    torch.testing.assert_close(Features(model, data).at("penultimate"), features.at("penultimate"))
    with pytest.raises(UntrojanError, match="no level"):
        features.at("network.9")


def test_one_pass_serves_all_levels() -> None:
    data, _ = noise_with_a_shifted_group()
    model = pixels_as_features()
    features, seen = Features(model, data, batch_size=len(data)), []
    model.register_forward_hook(lambda *_: seen.append(1))
    features.extract(["penultimate", "network.1", "penultimate+network.1"])
    features.at("network.1+penultimate")
    assert features.predictions.shape == (len(data),)
    assert len(seen) == 1


def test_reduction_keeps_the_leading_components() -> None:
    values = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(8, 0, -1)
    points, _ = reduced(values, 3)
    centred = values.double() - values.double().mean(0)
    expected = torch.linalg.svdvals(centred)[:3]
    np.testing.assert_allclose(np.linalg.norm(points, axis=0), expected.numpy(), rtol=1e-6)


def test_prediction_interval_is_students() -> None:
    """Against simulation: one more draw from the same normal distribution exceeds it as often as said."""
    random = np.random.default_rng(0)
    draws = random.normal(5, 3, (4000, 10))
    p = np.exp([log_upper_prediction(row[0], row[1:].tolist()) for row in draws])
    for level in (0.01, 0.05, 0.5):
        assert abs((p < level).mean() - level) < 3.5 * math.sqrt(level / 4000)


def test_outlying_classes_are_peeled() -> None:
    quiet = dict(enumerate([1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98, 1.07]))
    assert outlying_classes(quiet, 0.05)[0] == []
    assert outlying_classes({**quiet, 3: 3.0}, 0.05)[0] == [3]
    found, log_p = outlying_classes({**quiet, 3: 300.0, 5: 30.0}, 0.05)
    assert found == [3, 5]
    # A second target takes a hundredth of the significance.
    assert outlying_classes({**quiet, 3: 30.0, 5: 1.4}, 0.05)[0] == [3]
    assert outlying_classes({**quiet, 5: 1.4}, 0.05)[0] == [5]
    assert log_p[3] < log_p[0]
    assert outlying_classes({0: 1.0, 1: 9.0}, 0.05)[0] == []
    assert outlying_classes({}, 0.05) == ([], {})


def test_ties_make_no_outlier() -> None:
    """Of nine equal values and one that is a little larger, all that is known is that it is the largest."""
    assert log_upper_prediction(0.1001, [0.1] * 9) == pytest.approx(-math.log(10))
    assert log_upper_prediction(0.1, [0.1] * 9) == 0.0
    assert outlying_classes({c: 0.5 if c == 4 else 0.0 for c in range(10)}, 0.05)[0] == []


@pytest.mark.parametrize(("count", "members"), [(2, 1), (7, 1), (40, 17), (23, 22)])
def test_silhouettes_are_scikit_learns(count: int, members: int) -> None:
    from sklearn.metrics import silhouette_score

    random = torch.Generator().manual_seed(count)
    points = 100 + torch.randn(count, 3, generator=random, dtype=torch.float64)
    member = torch.randperm(count, generator=random) < members
    points[member] += 2
    expected = 0.0 if count == 2 else silhouette_score(points.numpy(), member.numpy())
    assert mean_silhouette(points, member, block=8) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="both groups"):
        mean_silhouette(points, torch.ones(count, dtype=torch.bool))
