"""Screening: few pairs get full effort, the decisive ones among them, and the null stays unbiased."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.order_statistics import find_targets, fit_gamma
from untrojan.defenses.cleansing.pair_screening import screen
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import FAST, all_pairs, invert
from untrojan.models.classifier import Classifier


def linear_task(num_classes: int) -> tuple[Classifier, ImageSet]:
    """A linear model, and noise labelled as it sees it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, num_classes))
    with torch.no_grad():
        network[1].bias.copy_(-network[1].weight.sum(1) / 2)
    model = Classifier(network, num_classes, torch.zeros(3), torch.ones(3))
    images = torch.randint(64, 192, (120 * num_classes, 3, 6, 6), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    return model, ImageSet(images, labels, tuple(map(str, range(num_classes))), numbered(len(images)))


def test_four_pairs_a_class_stand_for_all_and_hold_the_decisive_ones() -> None:
    classes = 14
    model, data = linear_task(classes)
    kept, weights = screen(model, data, AdditivePattern())
    assert len(kept) == 4 * classes
    # Each column stands for its K - 1 pairs.
    np.testing.assert_allclose(weights.sum(0), classes - 1)
    assert not weights.diagonal().any()
    everything = invert(model, data, all_pairs(classes), AdditivePattern(), FAST)
    norms = torch.full((classes, classes), float("inf"))
    norms[everything.pairs[:, 0], everything.pairs[:, 1]] = everything.parameters.flatten(1).norm(dim=1)
    smallest_found = sum(
        float(norms[weights[:, t] == 1, t].min()) <= 1.25 * float(norms[:, t].min()) for t in range(classes)
    )
    assert smallest_found >= 0.8 * classes


def selected(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What screening would leave of (K, K) reciprocals: each column's two largest and two others."""
    random, classes = np.random.default_rng(seed), len(values)
    kept, weights = np.full_like(values, np.nan), np.zeros_like(values)
    for target in range(classes):
        others = np.delete(np.arange(classes), target)
        order = others[np.argsort(-values[others, target])]
        chosen = random.choice(order[2:], 2, replace=False)
        kept[order[:2], target], kept[chosen, target] = values[order[:2], target], values[chosen, target]
        weights[order[:2], target], weights[chosen, target] = 1, (classes - 3) / 2
    return kept, weights


def null(seed: int, classes: int) -> np.ndarray:
    values = np.random.default_rng(seed).gamma(6, 0.05, (classes, classes)) + 0.1
    np.fill_diagonal(values, np.nan)
    return values


def test_the_null_of_few_pairs_is_that_of_all() -> None:
    values = null(0, 60)
    kept, weights = selected(values, 1)
    whole, _ = fit_gamma(values[np.isfinite(values)], "zero")
    known = np.isfinite(kept)
    part, _ = fit_gamma(kept[known], "zero", weights[known])
    unweighted, _ = fit_gamma(kept[known], "zero")
    mean = whole.shape * whole.scale
    assert part.shape * part.scale == pytest.approx(mean, rel=0.05)
    assert unweighted.shape * unweighted.scale > 1.15 * mean


def test_an_attack_is_found_and_clean_sets_are_not_among_few_pairs() -> None:
    alarms = 0
    for seed in range(25):
        values = null(seed, 30)
        kept, weights = selected(values, seed)
        alarms += bool(find_targets(kept, weights=weights)[0])
        values[4, 11] = 3.0
        kept, weights = selected(values, seed)
        assert find_targets(kept, weights=weights)[0][0].target == 11
    # 5 % of 25 is 1.25; 4 is its .99 quantile.
    assert alarms <= 4
