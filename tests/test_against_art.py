"""Against the Adversarial Robustness Toolbox: equal where it is right, and where it is not, said so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.activation_clustering import ActivationClustering, two_clusters
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.spectral_signatures import SpectralSignatures, highest, spectral_scores
from untrojan.models.classifier import Classifier

pytest.importorskip("art")

from art.defences.detector.poison.activation_defence import cluster_activations
from art.defences.detector.poison.clustering_analyzer import ClusteringAnalyzer
from art.defences.detector.poison.ground_truth_evaluator import GroundTruthEvaluator
from art.defences.detector.poison.spectral_signature_defense import SpectralSignatureDefense

CLASSES, EACH, PIXELS, POISONED = 4, 120, 48, 20


def poisoned_set() -> tuple[ImageSet, torch.Tensor]:
    """Gaussian pixels; of class 1 some lie far off, of every other class two fifths."""
    random = torch.Generator().manual_seed(0)
    pixels = 100 + 10 * torch.randn(CLASSES * EACH, PIXELS, generator=random)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    pixels[(torch.arange(len(pixels)) % 5 < 2) & (labels != 1), :8] += 60
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[EACH : EACH + POISONED] = True
    pixels[truth, 8:] += 50
    images = pixels.clamp(0, 255).round().to(torch.uint8).view(-1, 3, 4, 4)
    names = tuple(f"class {i}" for i in range(CLASSES))
    return ImageSet(images, labels, names, numbered(len(labels))), truth


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """The toolbox's k-means starts from NumPy's global generator."""
    np.random.seed(0)


@pytest.fixture(scope="module")
def features() -> Features:
    """The pixels, as a linear model's penultimate features."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(PIXELS, CLASSES))
    return Features(Classifier(network, CLASSES, torch.zeros(3), torch.ones(3)), poisoned_set()[0])


@pytest.fixture(scope="module")
def activations(features: Features) -> list[np.ndarray[Any, Any]]:
    """Each class's."""
    return [features.at("penultimate", features.data.indices_of(c)).numpy() for c in range(CLASSES)]


def test_clusters_are_the_same(activations: list[np.ndarray[Any, Any]]) -> None:
    clusters, points = cluster_activations(activations, nb_dims=10, reduce="PCA")
    for theirs, reduced, values in zip(clusters, points, activations, strict=True):
        found = two_clusters(torch.from_numpy(values), 10)
        assert reduced.shape == (EACH, 10)
        assert min(int((found.smaller.numpy() != (theirs == c)).sum()) for c in (0, 1)) == 0


def test_silhouette_and_relative_size_are_the_same(
    activations: list[np.ndarray[Any, Any]], features: Features
) -> None:
    clusters, points = cluster_activations(activations, nb_dims=10, reduce="PCA")
    _, _, report = ClusteringAnalyzer().analyze_by_silhouette_score(clusters, points)
    _, _, sizes = ClusteringAnalyzer().analyze_by_size(clusters)
    ours = ActivationClustering(rule="relative-size").judge(features)
    for label, details in ours.evidence["class_details"].items():
        silhouette = float(report[f"class_{label}"]["avg_silhouette_score"])
        assert details["silhouette"] == pytest.approx(silhouette, abs=6e-5)
        shares = [sizes[f"Class_{label}"][f"cluster_{c}"]["ptc_data_in_cluster"] for c in (0, 1)]
        assert details["relative_size"] == pytest.approx(min(shares), abs=6e-3)
    _, poison, _ = ClusteringAnalyzer().analyze_by_relative_size(clusters[1:2])
    assert poison.sum() == 1
    assert ours.targets == (1,)


def test_confusion_is_the_same(activations: list[np.ndarray[Any, Any]], features: Features) -> None:
    clusters, _ = cluster_activations(activations, nb_dims=10, reduce="PCA")
    assigned_clean, _, _ = ClusteringAnalyzer().analyze_by_size(clusters)
    labels, truth = features.data.labels, poisoned_set()[1]
    really_clean = [(~truth[labels == c]).long().numpy() for c in range(CLASSES)]
    _, text = GroundTruthEvaluator().analyze_correctness(assigned_clean, really_clean)
    flagged = ActivationClustering(rule="smaller").judge(features).flagged
    for label in range(CLASSES):
        theirs = json.loads(text)[f"class_{label}"]
        of_class = labels == label
        expected = {
            "TruePositive": int((flagged & truth & of_class).sum()),
            "FalsePositive": int((flagged & ~truth & of_class).sum()),
            "TrueNegative": int((~flagged & ~truth & of_class).sum()),
            "FalseNegative": int((~flagged & truth & of_class).sum()),
        }
        assert {name: theirs[name]["numerator"] for name in expected} == expected


def test_uncentred_spectral_scores_are_the_same(activations: list[np.ndarray[Any, Any]]) -> None:
    """The toolbox has the absolute projection of uncentred features, as the released code has."""
    for values in activations:
        theirs = SpectralSignatureDefense.spectral_signature_scores(values.astype(np.float64))[:, 0]
        ours = spectral_scores(torch.from_numpy(values).double(), uncentred=True).sqrt()
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)


def test_toolbox_spectral_scores_depend_on_where_the_origin_lies(features: Features) -> None:
    """Wrong there: features are shifted alike, and other images stand out.

    Algorithm 1 of the paper projects centred features; the toolbox, like the paper's code, does not.
    """
    labels, truth = features.data.labels, poisoned_set()[1]
    values, of_class = features.at().double()[labels == 1], truth[labels == 1]
    values = values - values.mean(0)
    direction = torch.linalg.svd(values).Vh[0]
    side = torch.sign((values[of_class] @ direction).mean())
    shifted = values - 1000 * side * direction

    def theirs(points: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(SpectralSignatureDefense.spectral_signature_scores(points.numpy())[:, 0])

    removed = round(1.5 * POISONED)
    assert bool(highest(theirs(values), removed)[of_class].all())
    assert not highest(theirs(shifted), removed)[of_class].any()
    torch.testing.assert_close(spectral_scores(shifted), spectral_scores(values))
    assert bool(highest(spectral_scores(shifted), removed)[of_class].all())
    assert bool(SpectralSignatures(count=removed).judge(features).flagged[truth].all())


def test_toolbox_silhouette_rule_loses_the_clean_cluster(
    activations: list[np.ndarray[Any, Any]], features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong there: where a class is found poisoned, the smaller cluster replaces the clean ones.

    Members of the larger one belong to no list, their entries in an array made by ``numpy.empty`` are never
    written, and the summary names no cluster of the class.
    """
    given = {}

    def assign_class(clusters: Any, clean_clusters: Any, poison_clusters: Any) -> Any:
        given[len(given)] = (clean_clusters.ravel().tolist(), poison_clusters.ravel().tolist())
        return clusters

    monkeypatch.setattr(ClusteringAnalyzer, "assign_class", staticmethod(assign_class))
    clusters, points = cluster_activations(activations, nb_dims=10, reduce="PCA")
    _, summary, report = ClusteringAnalyzer().analyze_by_silhouette_score(clusters, points)
    smaller = int(np.bincount(clusters[1]).argmin())
    assert report["class_1"]["suspicious"]
    assert given[1] == ([smaller], [smaller])
    assert given[0] == ([0, 1], [])
    assert not summary.any()
    ours = ActivationClustering(rule="silhouette", threshold=0.1).judge(features)
    assert torch.equal(ours.flagged & (features.data.labels == 1), poisoned_set()[1])


def test_toolbox_relative_size_rule_fails_on_two_large_clusters(
    activations: list[np.ndarray[Any, Any]],
) -> None:
    """Wrong there: it asks whether a number is in a tuple of an empty array, which NumPy refuses."""
    clusters, _ = cluster_activations(activations[:1], nb_dims=10, reduce="PCA")
    with pytest.raises(ValueError, match="empty array is ambiguous"):
        ClusteringAnalyzer().analyze_by_relative_size(clusters)


def test_toolbox_needs_as_many_images_as_components() -> None:
    values = np.random.default_rng(0).normal(size=(6, 48))
    with pytest.raises(ValueError, match="n_components=10"):
        cluster_activations([values], nb_dims=10, reduce="PCA")
    assert two_clusters(torch.from_numpy(values), 10).smaller.shape == (6,)
