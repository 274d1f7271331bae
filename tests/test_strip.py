"""STRIP on a linear model whose logits, and so whose entropies, are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as entropy_by_scipy
from scipy.stats import norm
from torch import Tensor, nn

from untrojan.cost import measure
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.strip import (
    Strip,
    boundary,
    draw_partners,
    entropy,
    shortfall,
    superimposed_entropies,
)
from untrojan.models.classifier import Classifier

CLASSES, EACH, PIXELS = 6, 60, 48
TARGET, TRIGGER = 2, 47


def class_pixels_and_a_trigger(scale: float = 4.0, trigger: float = 60.0) -> Classifier:
    """Logit k is ``scale`` times pixel k; the last pixel, of 1, adds ``trigger`` to that of class 2."""
    layer = nn.Linear(PIXELS, CLASSES)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.zero_()
        layer.weight[:, :CLASSES] = scale * torch.eye(CLASSES)
        layer.weight[TARGET, TRIGGER] = trigger
    return Classifier(nn.Sequential(nn.Flatten(), layer), CLASSES, torch.zeros(3), torch.ones(3))


def marked_pixels(poisoned: int = 15, seed: int = 0, each: int = EACH) -> tuple[ImageSet, Tensor]:
    """Images whose own class's pixel is lit, among noise; in class 2 the first ``poisoned`` have the
    trigger, and other classes' pixels lit."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(each)
    pixels = torch.randint(0, 60, (len(labels), PIXELS), generator=random)
    pixels[:, TRIGGER] = 0
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[TARGET * each : TARGET * each + poisoned] = True
    shown = torch.where(truth, (labels + 1 + torch.arange(len(labels)) % 5) % CLASSES, labels)
    pixels[torch.arange(len(labels)), shown] += torch.randint(60, 190, (len(labels),), generator=random)
    pixels[truth, TRIGGER] = 255
    names = tuple(f"class {i}" for i in range(CLASSES))
    images = pixels.to(torch.uint8).view(-1, 3, 4, 4)
    return ImageSet(images, labels, names, numbered(len(labels))), truth


@given(st.integers(2, 12), st.floats(0.01, 300), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_entropy_is_scipys(classes: int, scale: float, seed: int) -> None:
    logits = scale * torch.randn(7, classes, generator=torch.Generator().manual_seed(seed))
    expected = entropy_by_scipy(logits.double().softmax(1).numpy(), base=2, axis=1)
    np.testing.assert_allclose(entropy(logits).numpy(), expected, atol=1e-4)
    assert bool((entropy(logits) <= math.log2(classes) + 1e-5).all())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.3)])
def test_superposition_one_pair_at_a_time(weights: tuple[float, float]) -> None:
    """Against the definition, pair by pair, whatever the batches."""
    data, _ = marked_pixels()
    model, images = class_pixels_and_a_trigger(), data.images[::40]
    chosen = draw_partners(len(images), 5, len(data), seed=3)
    expected = torch.zeros(len(images))
    for i, row in enumerate(chosen.tolist()):
        for j in row:
            both = weights[0] * images[i].double() + weights[1] * data.images[j].double()
            logits = model((both.round().clamp(0, 255) / 255).float().unsqueeze(0))
            expected[i] += entropy(logits).item() / len(row)
    for size in (1, 7, 1000):
        found = superimposed_entropies(model, images, data.images, chosen, weights, size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_triggered_images_have_no_entropy_and_others_a_known_one() -> None:
    """A black partner leaves an image's own logits; a white one saturates all of them to equality."""
    model = class_pixels_and_a_trigger(trigger=0.0)
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image.view(-1)[0] = 255
    black, white = torch.zeros_like(image), torch.full_like(image, 255)
    partners, chosen = torch.cat([black, white]), torch.tensor([[0, 1]])
    p = np.exp([4.0, 0, 0, 0, 0, 0]) / np.exp([4.0, 0, 0, 0, 0, 0]).sum()
    expected = (entropy_by_scipy(p, base=2) + math.log2(CLASSES)) / 2
    found = superimposed_entropies(model, image, partners, chosen)
    assert float(found[0]) == pytest.approx(expected, rel=1e-5)
    image.view(-1)[TRIGGER] = 255
    marked = superimposed_entropies(class_pixels_and_a_trigger(), image, partners, chosen)
    assert float(marked[0]) < 1e-6


def test_partners_are_others() -> None:
    for seed in range(5):
        own = draw_partners(9, 40, None, seed)
        assert bool((own != torch.arange(9).unsqueeze(1)).all())
        assert own.unique().tolist() == list(range(9))
        assert draw_partners(9, 40, 3, seed).unique().tolist() == [0, 1, 2]
        assert torch.equal(own, draw_partners(9, 40, None, seed))
    assert not torch.equal(draw_partners(9, 40, None, 0), draw_partners(9, 40, None, 1))


def test_boundary_has_the_rate_below_it() -> None:
    values = 2 + 0.3 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert boundary(values, 0.01) == pytest.approx(2 + 0.3 * norm.ppf(0.01), abs=0.02)
    assert float((values < boundary(values, 0.05)).float().mean()) == pytest.approx(0.05, abs=0.005)
    # A normal fit to these has its quantile far below zero.
    skewed = torch.arange(1000) / 1000.0
    skewed[500:] *= 10
    assert boundary(skewed, 0.01) == pytest.approx(0.01)
    squares = torch.randn(2000, generator=torch.Generator().manual_seed(1)).square() + 3
    assert float((squares <= boundary(squares, 0.05, "empirical")).float().mean()) == pytest.approx(
        0.05, abs=1e-3
    )
    assert not bool((squares <= boundary(squares, 0.05)).any())


def test_shortfall_by_hand_and_of_normal_entropies() -> None:
    entropies, clean = torch.tensor([5.0, 1.0, 9.0, 2.0, 9.0]), torch.tensor([4.0, 6.0, 8.0])
    assert shortfall(entropies, clean, 0.4) == pytest.approx((6 - 1.5) / 2)
    assert shortfall(entropies, clean, 0.01) == pytest.approx((6 - 1) / 2)
    assert shortfall(torch.ones(3), torch.ones(4), 0.1) == 0.0
    values = 3 + 0.2 * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    assert shortfall(values, values, 0.05) == pytest.approx(norm.pdf(norm.ppf(0.05)) / 0.05, abs=0.03)


@pytest.mark.parametrize("with_trusted", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5)])
def test_the_triggered_are_found(with_trusted: bool, weights: tuple[float, float]) -> None:
    data, truth = marked_pixels()
    trusted = marked_pixels(poisoned=0, seed=1, each=30)[0] if with_trusted else None
    cleanser = Strip(image_weight=weights[0], partner_weight=weights[1])
    report = cleanser.judge(Features(class_pixels_and_a_trigger(), data, trusted))
    assert report.targets == (TARGET,)
    assert bool(report.flagged[truth].all())
    assert int(report.flagged.sum()) <= int(truth.sum()) + 2
    assert report.evidence["p_value"] < 1e-3
    assert float(report.scores[truth].min()) > float(report.scores[~truth].quantile(0.95))


@pytest.mark.parametrize("with_trusted", [False, True])
def test_clean_sets_seldom_alarm(with_trusted: bool) -> None:
    model, cleanser = class_pixels_and_a_trigger(), Strip(overlays=8)
    verdicts = []
    for seed in range(40):
        trusted = marked_pixels(0, seed=1000 + seed, each=40)[0] if with_trusted else None
        features = Features(model, marked_pixels(0, seed=seed)[0], trusted)
        verdicts.append(cleanser.judge(features).verdict)
    # 2 of 40 are allowed on average; 7 or more come about once in 150 times.
    assert verdicts.count("poisoned") <= 6
    assert verdicts.count("undecided") == 0


def test_published_removes_image_by_image() -> None:
    data, truth = marked_pixels()
    report = Strip(threshold="published", false_rejection_rate=0.05)(data, class_pixels_and_a_trigger())
    assert set(report.targets) == set(range(CLASSES))
    assert report.targets[0] == TARGET
    assert bool(report.flagged[truth].all())
    assert 0 < float(report.flagged[~truth].float().mean()) < 0.15


def test_a_limit_of_ones_own() -> None:
    data, _ = marked_pixels()
    model = class_pixels_and_a_trigger()
    assert Strip(threshold=5.0)(data, model).targets == (TARGET,)
    assert Strip(threshold=20.0)(data, model).verdict == "clean"


def test_small_and_uniform_sets() -> None:
    data, _ = marked_pixels(poisoned=0)
    model = class_pixels_and_a_trigger()
    grey = replace(data, images=torch.full_like(data.images, 9))
    assert Strip(overlays=2)(grey, model).verdict == "clean"
    few = data.select(torch.tensor([0, 1, 2, 60, 61]))
    report = Strip(overlays=2)(few, model)
    assert report.verdict == "undecided"
    assert report.evidence["classes_left_out"] == list(range(CLASSES))


def test_cost_and_what_does_not_change() -> None:
    data, _ = marked_pixels()
    model = class_pixels_and_a_trigger()
    model.train()
    features = Features(model, data)
    features.extract(["penultimate"])
    with measure() as cost:
        report = Strip(overlays=3, images_a_forward=200).judge(features)
    assert cost.images == 3 * len(data)
    assert cost.forwards == math.ceil(3 * len(data) / 200)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = Strip(overlays=3, images_a_forward=77).judge(features)
    torch.testing.assert_close(other.scores, report.scores)


def test_one_class_is_judged_among_all() -> None:
    data, _ = marked_pixels()
    features, cleanser = Features(class_pixels_and_a_trigger(), data), Strip(overlays=2)
    alone = cleanser.examine(features, TARGET, data.indices_of(TARGET))
    among = cleanser.examine_all(features)[TARGET]
    assert alone.statistic == among.statistic
    assert torch.equal(alone.suspects, among.suspects)
