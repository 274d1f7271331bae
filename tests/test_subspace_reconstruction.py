"""Subspace reconstruction on classes whose subspace is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import known_features
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.subspace_reconstruction import (
    SubspaceReconstruction,
    fitted_subspace,
    held_out_losses,
)
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier

CLASSES, PIXELS = 6, 48


def pixels_as_features() -> Classifier:
    return known_features.pixels_as_features(CLASSES)


def images_near_subspaces(each: int, poisoned: int, seed: int) -> tuple[ImageSet, torch.Tensor]:
    """Every class varies along three directions of its own, and a little in all.

    The first ``poisoned`` images of class 2 lie off its subspace, no further out than others lie within.
    """
    axes = torch.linalg.qr(torch.randn(CLASSES, PIXELS, 4, generator=torch.Generator().manual_seed(9))).Q
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(each)
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[2 * each : 2 * each + poisoned] = True
    inside = 80 * torch.randn(len(labels), 3, generator=random)
    pixels = 128 + torch.einsum("npk,nk->np", axes[labels, :, :3], inside)
    pixels = pixels + 4 * torch.randn(len(labels), PIXELS, generator=random)
    pixels[truth] += 80 * axes[2, :, 3]
    images = pixels.clamp(0, 255).round().to(torch.uint8).view(-1, 3, 4, 4)
    names = tuple(f"class {i}" for i in range(CLASSES))
    return ImageSet(images, labels, names, numbered(len(labels))), truth


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_smallest_subspace_that_holds_the_energy() -> None:
    """Variances 6, 3 and 1 along the axes."""
    clean = torch.cat([torch.eye(3), -torch.eye(3)]).double() * torch.tensor([6.0, 3.0, 1.0]).sqrt() + 5
    for energy, rank in ((0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.91, 3), (1.0, 3)):
        found = fitted_subspace(clean, energy)
        assert len(found.directions) == rank
        torch.testing.assert_close(found.directions.abs(), torch.eye(3).double()[:rank], atol=1e-9, rtol=0)
    found = fitted_subspace(clean, 0.9)
    torch.testing.assert_close(found.mean, torch.full((3,), 5.0).double())
    far = torch.tensor([[9.0, -7.0, 5.0], [5.0, 5.0, 8.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(found.lost(far), torch.tensor([0.0, 3.0, 4.0]).double(), atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 15), st.integers(1, 20), st.floats(0.05, 1), st.integers(0, 99))
def test_lost_energy_is_what_was_allowed(count: int, width: int, energy: float, seed: int) -> None:
    clean = normal(count, width, seed=seed)
    found = fitted_subspace(clean, energy)
    around = clean - clean.mean(0)
    assert float(found.lost(clean).square().sum()) <= (1 - energy + 1e-9) * float(around.square().sum())
    # Off the subspace a part is lost whole, and nothing of what lies inside.
    inside = found.mean + normal(4, len(found.directions), seed=seed + 1) @ found.directions
    assert float(found.lost(inside).max()) < 1e-9
    assert bool((found.lost(clean) <= (clean - found.mean).norm(dim=1) + 1e-9).all())


def test_held_out_losses_are_those_of_images_never_seen() -> None:
    basis = torch.linalg.qr(normal(30, 3, seed=1)).Q.T
    clean = 10 * normal(400, 3, seed=2) @ basis + normal(400, 30, seed=3)
    fitted, fresh = clean[:40], clean[40:]
    subspace = fitted_subspace(fitted)
    seen, held_out = subspace.lost(fitted).median(), held_out_losses(fitted).median()
    never = subspace.lost(fresh).median()
    assert float(held_out) == pytest.approx(float(never), rel=0.05)
    assert float(seen) < 0.98 * float(never)
    # By hand: with few images, each fold is one image.
    few = clean[:6]
    expected = torch.stack(
        [fitted_subspace(few[torch.arange(6) != i]).lost(few[i : i + 1])[0] for i in range(6)]
    )
    torch.testing.assert_close(held_out_losses(few), expected)


@pytest.mark.parametrize("poisoned", [40, 150])
def test_images_off_the_subspace_are_found(poisoned: int) -> None:
    data, truth = images_near_subspaces(200, poisoned, seed=0)
    trusted, _ = images_near_subspaces(120, 0, seed=1)
    report = SubspaceReconstruction().judge(Features(pixels_as_features(), data, trusted))
    assert report.targets == (2,)
    assert bool(report.flagged[truth].all())
    assert int((report.flagged & ~truth).sum()) < 0.15 * (200 - poisoned) + 5
    assert bool((report.flagged <= (data.labels == 2)).all())
    assert float(report.scores[truth].min()) > float(report.scores[~truth].quantile(0.9))
    assert report.evidence["class_statistics"]["2"] == pytest.approx(poisoned / 200, abs=0.15)
    assert report.evidence["class_details"]["2"] == {"fitted": 50}


def test_clean_sets_seldom_alarm() -> None:
    alarms = 0
    for seed in range(20):
        data, _ = images_near_subspaces(60, 0, seed=2 * seed + 10)
        trusted, _ = images_near_subspaces(60, 0, seed=2 * seed + 11)
        report = SubspaceReconstruction().judge(Features(pixels_as_features(), data, trusted))
        alarms += report.verdict == "poisoned"
    # One in twenty is allowed: more than four have a chance of 0.3 %.
    assert alarms <= 4


def test_a_limit_of_ones_own() -> None:
    data, _ = images_near_subspaces(200, 40, seed=0)
    features = Features(pixels_as_features(), data, images_near_subspaces(120, 0, seed=1)[0])
    assert SubspaceReconstruction(threshold=0.15).judge(features).targets == (2,)
    assert SubspaceReconstruction(threshold=0.6).judge(features).verdict == "clean"


def test_null_leaves_out_the_images_fitted() -> None:
    """Trusted images examined by themselves: all but the 50 fitted, of which too little is lost."""
    trusted, _ = images_near_subspaces(120, 0, seed=1)
    found = SubspaceReconstruction().examine_all(Features(pixels_as_features(), trusted))
    assert [len(finding.suspects) for finding in found.values()] == [70] * CLASSES
    half = SubspaceReconstruction(trusted_images=500).examine_all(Features(pixels_as_features(), trusted))
    assert [len(finding.suspects) for finding in half.values()] == [60] * CLASSES


def test_without_trusted_images() -> None:
    data, _ = images_near_subspaces(20, 0, seed=0)
    with pytest.raises(UntrojanError, match=r"trusted images of each class.*--trusted"):
        SubspaceReconstruction()(data, pixels_as_features())


def test_classes_without_spread_or_with_too_few_images() -> None:
    data, truth = images_near_subspaces(100, 20, seed=0)
    trusted, _ = images_near_subspaces(60, 0, seed=1)
    plain, plain_trusted = data.images.clone(), trusted.images.clone()
    plain[data.labels == 0] = 77
    plain_trusted[trusted.labels == 0] = 77
    data, trusted = replace(data, images=plain), replace(trusted, images=plain_trusted)
    trusted = trusted.select((trusted.labels != 1) | (torch.arange(len(trusted)) < 67))
    kept = (data.labels != 4) | (torch.arange(len(data)) < 403)
    features = Features(pixels_as_features(), data.select(kept), trusted)
    report = SubspaceReconstruction().judge(features)
    assert report.evidence["classes_left_out"] == [1, 4]
    assert report.evidence["class_suspects"]["0"] == 0
    assert bool(report.scores.isfinite().all())
    assert bool(report.flagged[truth[kept]].all())
