"""Cluster impurity on groups that are known, and a model whose answer to blurring is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.cluster_impurity import (
    ClusterImpurity,
    blurred,
    impurities,
    mixture_components,
)
from untrojan.models.classifier import Classifier, predictions_of

CLASSES, EACH, POISONED = 6, 200, 40
CHECKERS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
SEEN = torch.tensor([[0.5, -0.75], [-0.75, 1.0]])
"""Sees checkers, but no even colour, neither plain nor blurred with its darkened borders."""


def templates() -> torch.Tensor:
    """(6, 3): class c has channel c brighter than the others, class 3 + c darker."""
    plain = torch.eye(3) - 1 / 3
    return torch.cat([plain, -plain])


def colour_classifier() -> Classifier:
    """Its features are the 12 pixels. It tells colours, which blurring keeps, and for class 0 checkers,
    which blurring destroys."""
    linear = nn.Linear(12, CLASSES, bias=False)
    weights = templates().view(CLASSES, 3, 1, 1).expand(CLASSES, 3, 2, 2).clone()
    weights[0] += 2 * SEEN
    linear.weight.data = weights.flatten(1)
    return Classifier(nn.Sequential(nn.Flatten(), linear), CLASSES, torch.zeros(3), torch.ones(3))


def colours(poisoned: int = POISONED) -> tuple[ImageSet, torch.Tensor]:
    """Images of their class's colour; of class 0, the first have that of class 1, and checkers."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    truth = torch.arange(len(labels)) < poisoned
    shown = torch.where(truth, 1, labels)
    pixels = 128 + 90 * templates()[shown].view(-1, 3, 1, 1) + torch.zeros(2, 2)
    # Noise alike in all four pixels of a channel has no checkers; a little more keeps the features full.
    pixels = pixels + 5 * torch.randn(len(labels), 3, 1, 1, generator=random)
    pixels = pixels + torch.randn(len(labels), 3, 2, 2, generator=random)
    pixels[truth] += 30 * CHECKERS
    images = pixels.clamp(0, 255).round().to(torch.uint8)
    names = tuple(f"class {i}" for i in range(CLASSES))
    return ImageSet(images, labels, names, numbered(len(labels))), truth


def two_groups(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal features, a fifth of them 10 standard deviations off."""
    points = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    group = torch.arange(count) < count // 5
    points[group, 0] += 10
    return points, group


def test_narrow_features_separate_and_wide_ones_do_not() -> None:
    """RE's observation on compact and wide nets, at an eighth of the size: 10 images a dimension."""
    points, group = two_groups(640, 8)
    components = mixture_components(points)
    assert components.unique().tolist() == [0, 1]
    assert torch.equal(components == components[0], group)
    points, _ = two_groups(640, 64)
    assert not mixture_components(points).any()


def test_one_normal_group_is_one_component() -> None:
    assert not mixture_components(two_groups(400, 6)[0][80:]).any()


def test_search_ends_after_two_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Components tried for criteria 5, 6, 4, 5, 6, 0: three are best, five the last tried."""
    from sklearn.mixture import GaussianMixture

    tried = []

    def criterion(mixture: GaussianMixture, _: object) -> float:
        tried.append(mixture.n_components)
        return [5.0, 6.0, 4.0, 5.0, 6.0, 0.0][mixture.n_components - 1]

    monkeypatch.setattr(GaussianMixture, "bic", criterion)
    components = mixture_components(two_groups(60, 3)[0])
    assert tried == [1, 2, 3, 4, 5]
    assert components.unique().tolist() == [0, 1, 2]


def test_hardly_any_images() -> None:
    assert not mixture_components(torch.full((4, 5), 0.1)).any()
    components = mixture_components(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    assert components.shape == (4,)
    assert int(components.max()) < 4


def test_blur_is_the_mean_of_four_pixels_and_black_outside() -> None:
    image = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    expected = torch.tensor([[[[12.0, 16.0, 9.0], [9.0, 11.0, 6.0]]]]) / 4
    torch.testing.assert_close(blurred(image), expected)
    assert blurred(torch.rand(2, 3, 5, 7)).shape == (2, 3, 5, 7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_impurity_is_the_divergence_from_no_change(members: list[tuple[int, bool]]) -> None:
    components = torch.tensor([component for component, _ in members])
    unchanged = torch.tensor([same for _, same in members])
    found = impurities(components, unchanged)
    assert len(found) == int(components.max()) + 1
    for component, value in enumerate(found.tolist()):
        same = [kept for each, kept in members if each == component]
        share = max(sum(same), 0.5) / len(same) if same else 1.0
        assert value == pytest.approx(-math.log(share))


def test_published_removes_the_impure_component() -> None:
    data, truth = colours()
    model = colour_classifier()
    assert torch.equal(predictions_of(model, data.images), data.labels)
    report = ClusterImpurity()(data, model)
    assert report.verdict == "poisoned"
    assert report.targets == (0,)
    assert torch.equal(report.flagged, truth)
    assert report.evidence["class_statistics"]["0"] == pytest.approx(math.log(2 * POISONED))
    assert report.evidence["class_details"]["0"]["components"] == 2
    assert ClusterImpurity(threshold=5.0)(data, model).verdict == "clean"
    assert ClusterImpurity()(colours(poisoned=0)[0], model).verdict == "clean"


def test_calibrated_against_the_other_classes() -> None:
    data, truth = colours()
    cleanser, model = ClusterImpurity(threshold="calibrated"), colour_classifier()
    report = cleanser(data, model)
    assert report.targets == (0,)
    assert torch.equal(report.flagged, truth)
    assert cleanser(colours(poisoned=0)[0], model).verdict == "clean"


def test_one_component_counts_whole_in_the_null_alone() -> None:
    """Class 0 without its own colour: all images carry checkers, and there is nothing to tell apart."""
    data, truth = colours()
    alone = data.select(truth | (data.labels != 0))
    published = ClusterImpurity()(alone, colour_classifier())
    assert published.verdict == "clean"
    assert published.evidence["class_statistics"]["0"] == 0.0
    calibrated = ClusterImpurity(threshold="calibrated")(alone, colour_classifier())
    assert calibrated.evidence["class_statistics"]["0"] == pytest.approx(math.log(2 * POISONED))
    assert not calibrated.flagged.any()


def test_equal_images_and_too_few() -> None:
    data, truth = colours()
    images = data.images.clone()
    images[data.labels == 4] = 9
    kept = (data.labels != 5) | (torch.arange(len(data)) < 5 * EACH + 3)
    report = ClusterImpurity()(replace(data, images=images).select(kept), colour_classifier())
    assert report.evidence["classes_left_out"] == [5]
    assert report.evidence["class_statistics"]["4"] == 0.0
    assert torch.equal(report.flagged, truth[kept])
