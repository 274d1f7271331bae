"""Spectral signatures and SPECTRE against full decompositions, closed forms and planted groups."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import known_features
from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing import principal_directions
from untrojan.defenses.cleansing.by_class import ClassCleanser
from untrojan.defenses.cleansing.principal_directions import centred, leading_directions
from untrojan.defenses.cleansing.spectral_signatures import (
    SpectralSignatures,
    highest,
    log_contrast,
    spectral_scores,
)
from untrojan.defenses.cleansing.spectre import (
    Spectre,
    plausible,
    quantum_entropy_scores,
    robust_spectrum,
    whitened,
)
from untrojan.models.classifier import Classifier

CLASSES, EACH = 6, 200


def pixels_as_features() -> Classifier:
    return known_features.pixels_as_features(CLASSES)


def noise_with_a_shifted_group(poisoned: int = 25, shift: float = 60.0) -> tuple[ImageSet, torch.Tensor]:
    return known_features.noise_with_a_shifted_group(CLASSES, EACH, poisoned, shift)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Two groups of normal features, a fifth of them far off."""
    values = normal(count, width, seed=seed)
    values[: count // 5] += 3.0
    return values


def assert_same_directions(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to sign."""
    torch.testing.assert_close(
        (found * expected).sum(1).abs(), torch.ones(len(expected)).double(), atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("small", [0, 1024])
@pytest.mark.parametrize("shape", [(90, 30), (30, 90), (40, 40)])
def test_directions_are_those_of_a_full_decomposition(
    small: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(principal_directions, "SMALL", small)
    for make in (normal, clustered):
        values = centred(make(*shape))
        expected = torch.linalg.svd(values, full_matrices=False).Vh[:3]
        assert_same_directions(leading_directions(values, 3), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_as_many_directions_as_the_rows_span(rows: int, width: int, rank: int, seed: int) -> None:
    values = normal(rows, rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    found = leading_directions(values, 20)
    assert len(found) == min(rows, width, rank)
    torch.testing.assert_close(found @ found.T, torch.eye(len(found)).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(values @ found.T @ found, values, atol=1e-6, rtol=1e-6)


def test_nothing_to_find_in_equal_images() -> None:
    values = torch.full((7, 5), 0.1)
    assert len(leading_directions(centred(values), 1)) == 0
    assert torch.equal(spectral_scores(values), torch.zeros(7).double())
    assert log_contrast(spectral_scores(values), highest(spectral_scores(values), 2)) == 0.0
    assert robust_spectrum(values, 0.1).components == 0
    assert not robust_spectrum(values, 0.1).removed.any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.floats(-50, 50), st.floats(0.1, 10))
def test_scores_follow_the_features(seed: int, shift: float, scale: float) -> None:
    """Shifting changes nothing, scaling scales squares, turning turns with the features."""
    values = clustered(40, 6, seed=seed)
    scores = spectral_scores(values)
    turned = values @ torch.linalg.qr(normal(6, 6, seed=seed + 1)).Q
    torch.testing.assert_close(spectral_scores(values + shift), scores)
    torch.testing.assert_close(spectral_scores(scale * values), scale**2 * scores)
    torch.testing.assert_close(spectral_scores(turned), scores)
    # The singular value itself: no direction has a larger sum of squared projections.
    assert float(scores.sum()) == pytest.approx(float(torch.linalg.svdvals(centred(values))[0]) ** 2)


def test_uncentred_scores_take_the_far_side_of_clean_images_for_poison() -> None:
    """Clean features about 20, poison nearer to the origin: only centring shows it as far out."""
    values = normal(100, 5)
    values[:, 0] += 20
    values[:10, 0] -= 12
    assert bool(highest(spectral_scores(values), 10)[:10].all())
    assert not highest(spectral_scores(values, uncentred=True), 10)[:10].any()
    direction = torch.linalg.svd(centred(values)).Vh[0]
    torch.testing.assert_close(spectral_scores(values, uncentred=True), (values @ direction).square())


def test_contrast_of_a_normal_class() -> None:
    """The medians of a normal variable's square beyond and within the quantile that 15 % exceed."""
    scores = normal(200_000).square()
    inverse = torch.special.ndtri(torch.tensor([1 - 0.15 / 4, 0.5 + 0.85 / 4]).double())
    expected = 2 * math.log(float(inverse[0] / inverse[1]))
    assert expected == pytest.approx(2.31, abs=0.005)
    assert log_contrast(scores, highest(scores, 30_000)) == pytest.approx(expected, abs=0.02)
    assert log_contrast(scores * 9, highest(scores, 30_000)) == pytest.approx(expected, abs=0.02)
    assert log_contrast(scores, torch.zeros(200_000).bool()) == 0.0


def test_published_removes_from_every_class() -> None:
    data, truth = noise_with_a_shifted_group()
    for cleanser, expected in (
        (SpectralSignatures(), 30),
        (SpectralSignatures(count=7), 7),
        (SpectralSignatures(count=1000), 100),
        (Spectre(contamination=0.04), 12),
    ):
        report = cleanser(data, pixels_as_features())
        assert set(report.targets) == set(range(CLASSES))
        assert torch.bincount(data.labels[report.flagged]).tolist() == [expected] * CLASSES
    assert bool(SpectralSignatures()(data, pixels_as_features()).flagged[truth].all())


@pytest.mark.parametrize(
    "cleanser", [SpectralSignatures(threshold="calibrated"), Spectre(threshold="calibrated")]
)
def test_calibrated_names_the_poisoned_class_alone(cleanser: ClassCleanser) -> None:
    data, truth = noise_with_a_shifted_group()
    report = cleanser(data, pixels_as_features())
    assert report.targets == (2,)
    assert bool(report.flagged[truth].all())
    assert int(report.flagged.sum()) == 30
    assert report.evidence["p_value"] < 0.05
    clean, _ = noise_with_a_shifted_group(poisoned=0)
    assert cleanser(clean, pixels_as_features()).verdict == "clean"


def test_a_limit_of_ones_own() -> None:
    data, _ = noise_with_a_shifted_group()
    assert SpectralSignatures(threshold=3.5)(data, pixels_as_features()).targets == (2,)
    assert SpectralSignatures(threshold=99.0)(data, pixels_as_features()).verdict == "clean"


@pytest.mark.parametrize("cleanser", [SpectralSignatures(), Spectre()])
def test_classes_of_four_images_or_of_one_image_over_and_over(cleanser: ClassCleanser) -> None:
    data, _ = noise_with_a_shifted_group()
    images = data.images.clone()
    images[data.labels == 0] = 7
    kept = (data.labels != 1) | (torch.arange(len(data)) < EACH + 4)
    kept &= (data.labels != 3) | (torch.arange(len(data)) < 3 * EACH + 3)
    report = cleanser(replace(data, images=images).select(kept), pixels_as_features())
    assert report.evidence["classes_left_out"] == [3]
    assert report.evidence["class_statistics"]["0"] == 0.0
    assert report.evidence["class_suspects"]["1"] == 1
    assert bool(report.scores.isfinite().all())


def test_quantum_entropy_between_norm_and_direction() -> None:
    """A diagonal moment has weights exp(alpha (s - 1) / (max - 1)) over their sum."""
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    points = signs * torch.tensor([3.0, 2.0, 1.0]).double().sqrt()
    for alpha in (1e-9, 1.0, 4.0, 60.0):
        weights = torch.tensor([math.exp(alpha), math.exp(alpha / 2), 1.0]).double()
        expected = points.square() @ (weights / weights.sum())
        torch.testing.assert_close(quantum_entropy_scores(points, alpha), expected)
    torch.testing.assert_close(quantum_entropy_scores(points, 1e-9), points.square().mean(1))
    torch.testing.assert_close(quantum_entropy_scores(points, 60.0), points[:, 0].square())
    # No direction varies more than it should: the norm decides.
    torch.testing.assert_close(quantum_entropy_scores(signs / 2, 4.0), torch.full((8,), 0.25).double())


def test_whitening_by_the_kept() -> None:
    points, kept = clustered(200, 4), torch.arange(200) >= 40
    white = whitened(points @ normal(4, 4, seed=3), kept)[kept]
    torch.testing.assert_close(white.mean(0), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(white.T @ white / 160, torch.eye(4).double())


def test_filter_is_that_of_the_dense_fourth_moments() -> None:
    points = normal(300, 4)
    points[:30, 1] *= 12
    white = whitened(points, torch.ones(300).bool())
    squares = torch.einsum("ni,nj->nij", white, white).flatten(1)
    form = torch.linalg.eigh(torch.cov(squares.T)).eigenvectors[:, -1]
    values = squares @ form
    expected = (values - values.median()).abs().argsort(descending=True)[:60]
    kept = plausible(points, 0.1)
    assert set((~kept).nonzero().flatten().tolist()) == set(expected.tolist())


def test_spectre_finds_what_lies_across_the_direction_of_most_variance() -> None:
    values = normal(400, 20)
    values[:, 0] *= 10
    values[:40, 1] += 6
    assert int(highest(spectral_scores(values), 60)[:40].sum()) < 20
    found = robust_spectrum(values, 0.1)
    assert int(found.removed.sum()) == 60
    assert bool(found.removed[:40].all())
    assert found.excess > 4
    assert robust_spectrum(normal(400, 20), 0.1).excess < 2.5
