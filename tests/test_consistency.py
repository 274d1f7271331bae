"""Consistency on a linear model whose trigger is a place, a mark that a view moves away."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.consistency import (
    CERTAIN,
    VIEWS,
    Consistency,
    limit_for_every_class,
    limit_of,
    margins_in_views,
    strangeness,
)
from untrojan.defenses.cleansing.features import Features
from untrojan.models.classifier import Classifier

CLASSES, EACH, SIDE, TARGET = 6, 80, 16, 2


def bands_and_a_corner() -> Classifier:
    """Logit k answers to the mean brightness of row band k; a bright corner pixel adds to class 2's."""
    layer = nn.Linear(3 * SIDE * SIDE, CLASSES)
    weight = torch.zeros(CLASSES, 3, SIDE, SIDE)
    for k in range(CLASSES):
        weight[k, :, 2 + 2 * k : 4 + 2 * k] = 6.0 / SIDE
    weight[TARGET, :, 0, 0] = 12.0
    with torch.no_grad():
        layer.weight.copy_(weight.flatten(1))
        layer.bias.zero_()
    return Classifier(nn.Sequential(nn.Flatten(), layer), CLASSES, torch.zeros(3), torch.ones(3))


def bands(poisoned: int = 12, seed: int = 0) -> tuple[ImageSet, Tensor]:
    """Images whose own class's rows are lit; the first ``poisoned`` of class 2 show another class's and have
    the corner."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[TARGET * EACH : TARGET * EACH + poisoned] = True
    shown = torch.where(truth, (labels + 1 + torch.arange(len(labels)) % 5) % CLASSES, labels)
    images = torch.randint(0, 190, (len(labels), 3, SIDE, SIDE), generator=random)
    for row, k in enumerate(shown.tolist()):
        images[row, :, 2 + 2 * k : 4 + 2 * k] += 60
    images[:, :, 0] = 0
    images[truth, :, 0, 0] = 255
    names = tuple(f"class {i}" for i in range(CLASSES))
    return ImageSet(images.clamp(0, 255).to(torch.uint8), labels, names, numbered(len(labels))), truth


def test_margins_are_the_logarithms_of_odds() -> None:
    data, _ = bands()
    model = bands_and_a_corner()
    margins = margins_in_views(model, data.images, data.labels, images_a_forward=100)
    chances = model(data.images.float() / 255).double().softmax(1).gather(1, data.labels.unsqueeze(1))
    expected = torch.logit(chances.squeeze(1)).clamp(-CERTAIN, CERTAIN).float()
    torch.testing.assert_close(margins[:, 0], expected, rtol=1e-3, atol=1e-3)
    assert margins.shape == (len(data), len(VIEWS))
    # The label's rows stay where they are in a mirror; a grey picture's rows are as bright.
    clean = data.labels != TARGET
    mirrored, grey = (list(VIEWS).index(name) for name in ("mirrored", "grey"))
    torch.testing.assert_close(margins[clean, 0], margins[clean, mirrored], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(margins[clean, 0], margins[clean, grey], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 20), (3, 3, 3)])
def test_views_keep_shape_and_range(shape: tuple[int, int, int]) -> None:
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    for name, view in VIEWS.items():
        seen = view(images)
        assert seen.shape == images.shape, name
        assert float(seen.min()) >= -1e-6, name
        assert float(seen.max()) <= 1 + 1e-6, name
        # An even grey stays one, but for the border that shrinking leaves.
        even = view(torch.full((1, *shape), 0.5))
        middle = even[..., shape[1] // 3 : shape[1] // 3 + 1, shape[2] // 3 : shape[2] // 3 + 1]
        torch.testing.assert_close(middle, torch.full_like(middle, 0.5))


def test_shifting_and_turning_move_what_they_should() -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 10, 20] = 1
    assert VIEWS["shifted"](image)[0, 0, 12, 18] == pytest.approx(1, abs=1e-4)
    wide = torch.zeros(1, 1, 32, 64)
    wide[0, 0, 15:17, 52] = 1
    turned = VIEWS["turned"](wide)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    height = abs(float((turned * rows).sum() / turned.sum()) - 15.5)
    across = float((turned * columns).sum() / turned.sum()) - 31.5
    assert math.degrees(math.atan2(height, across)) == pytest.approx(10, abs=0.5)
    assert math.hypot(height, across) == pytest.approx(20.5, abs=0.3)


def test_strangeness_is_scipys_mahalanobis_distance() -> None:
    random = torch.Generator().manual_seed(0)
    clean = torch.randn(400, 3, generator=random) * torch.tensor([1.0, 2.0, 5.0])
    asked = torch.randn(20, 3, generator=random)
    inverse = torch.linalg.inv(torch.cov(clean.double().T)).numpy()
    expected = [mahalanobis(row, clean.double().mean(0), inverse) ** 2 for row in asked.double()]
    found = strangeness(asked, clean).double()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0.02, atol=1e-3)


def test_strangeness_bears_clean_images_without_spread() -> None:
    clean = torch.full((10, 4), CERTAIN)
    assert bool((strangeness(clean, clean) == 0).all())
    assert float(strangeness(-clean[:1], clean)) > 1e3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_what_carries_the_corner(seed: int) -> None:
    data, truth = bands(seed=seed)
    report = Consistency()(data, bands_and_a_corner())
    assert (report.verdict, report.targets) == ("poisoned", (TARGET,))
    assert bool(report.flagged[truth].all())
    assert float(report.flagged[~truth & (data.labels == TARGET)].float().mean()) < 0.1
    assert not bool(report.flagged[data.labels != TARGET].any())


def test_the_limit_holds_for_every_class() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(1000)
    scores = torch.rand(4000, generator=random) * (1 + labels)
    limit = limit_for_every_class(scores, labels, 0.05)
    assert limit == pytest.approx(4 * 0.95, abs=0.05)
    few = labels.clone()
    few[3990:] = 4
    assert limit_for_every_class(scores, few, 0.05) == pytest.approx(limit, abs=0.02)
    alone = torch.arange(4000)
    assert limit_for_every_class(scores, alone, 0.05) == pytest.approx(float(scores.quantile(0.95)), rel=0.01)


@pytest.mark.parametrize("count", [20, 39, 100, 101])
def test_a_limit_of_few_images_holds_for_further_ones(count: int) -> None:
    """At most 5 % of further images exceed it, and nearly that: floor of (m + 1)/20 of m + 1."""
    scores = torch.rand(4000, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    limits = torch.tensor([limit_of(each, 0.05) for each in scores])
    # Uniform scores: what exceeds a limit is what is left above it.
    promised = math.floor((count + 1) * 0.05 + 1e-9) / (count + 1)
    assert float((1 - limits).mean()) == pytest.approx(promised, abs=0.003)
    assert promised <= 0.05
    assert limit_of(scores[0, :18], 0.05) == math.inf
    assert math.isfinite(limit_of(scores[0, :19], 0.05))


def test_trusted_images_set_the_limit() -> None:
    data, truth = bands(poisoned=40)
    trusted, _ = bands(poisoned=0, seed=9)
    report = Consistency().judge(Features(bands_and_a_corner(), data, trusted))
    assert report.targets == (TARGET,)
    assert bool(report.flagged[truth].all())


def test_each_class_has_its_own_trusted_limit() -> None:
    """Clean images of every class exceed it about as often as promised, which they do not where one limit has
    to hold in all other classes."""
    method = Consistency(false_suspects=0.2)
    own, others = torch.zeros(CLASSES), torch.zeros(CLASSES)
    rounds = 6
    for seed in range(rounds):
        trusted, _ = bands(poisoned=0, seed=100 + seed)
        data, _ = bands(poisoned=0, seed=200 + seed)
        for shares, known in ((own, trusted), (others, None)):
            found = method.examine_all(Features(bands_and_a_corner(), data, known))
            shares += torch.tensor([found[label].details["share"] for label in range(CLASSES)]) / rounds
    assert (own - 0.2).abs().max() < 0.1
    assert float(own.std()) < float(others.std()) / 2


def test_a_majority_shows_where_classes_are_expected_to_bear_the_views_alike() -> None:
    """The median of a class that is mostly poison is the poison's."""
    data, truth = bands(poisoned=60)
    features, own = Features(bands_and_a_corner(), data), data.labels == TARGET
    areas = [
        roc_auc_score(truth[own], Consistency(expected=expected).examine_all(features)[TARGET].scores)
        for expected in ("class", "all")
    ]
    assert areas[0] < 0.5 < 0.9 < areas[1]


def test_alarms_on_about_as_many_clean_sets_as_promised() -> None:
    model, alarms = bands_and_a_corner(), 0
    for seed in range(40):
        alarms += Consistency()(bands(poisoned=0, seed=100 + seed)[0], model).verdict != "clean"
    assert alarms <= 6  # Of 40 at 5 %: more comes by chance three times in a thousand.
