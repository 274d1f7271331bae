"""Linearity as a cleanser: what NONE would drop, for a set and a model whose backdoor channel is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.linearity import Linearity
from untrojan.defenses.cleansing.registry import CLEANSERS
from untrojan.defenses.training.none import NONE
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier

CLASSES, TARGET = 4, 1


def corners(poisoned: int) -> ImageSet:
    """A bright quarter tells the class; the first ``poisoned`` have a white corner and class 1."""
    labels = torch.arange(400) % CLASSES
    images = torch.randint(0, 60, (400, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    for row in range(6):
        for column in range(6):
            images[torch.arange(400), 0, 8 * (labels // 2) + row, 8 * (labels % 2) + column] += 120
    images[:poisoned, :, 14:, 14:] = 255
    labels[:poisoned] = TARGET
    return ImageSet(images.to(torch.uint8), labels, tuple("abcd"), numbered(400))


def backdoored() -> Classifier:
    """Two layers: channel k of either answers to quarter k, channel 4 to the white corner alone."""
    first, second, last = nn.Conv2d(1, 5, 16), nn.Conv2d(5, 5, 1), nn.Linear(5, CLASSES)
    with torch.no_grad():
        for weight in (*first.parameters(), *second.parameters(), *last.parameters()):
            weight.zero_()
        for k in range(CLASSES):
            top, left = 8 * (k // 2), 8 * (k % 2)
            first.weight[k, :, top : top + 6, left : left + 6] = 1 / 36
        first.weight[4, :, 14:, 14:] = 1.0
        first.bias[4] = -2.0  # type: ignore[index]
        second.weight[range(5), range(5)] = 1.0
        last.weight[range(CLASSES), range(CLASSES)] = 20.0
        last.weight[TARGET, 4] = 20.0
    network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last)
    return Classifier(network, CLASSES, torch.zeros(1), torch.ones(1))


def test_the_poisoned_images_are_flagged_and_their_class_named() -> None:
    data, model = corners(poisoned=40), backdoored()
    report = Linearity()(data, model)
    assert (report.verdict, report.targets) == ("poisoned", (TARGET,))
    assert torch.equal(report.flagged, torch.arange(400) < 40)
    assert bool((report.scores[:40] > report.scores[40:].max()).all())
    assert "2 layers have class 'b' in two groups of images, up to" in report.reason
    assert torch.equal(report.flagged, NONE().dropped(NONE().analyse(model, data)))
    strict = Linearity(excess=1e12)(data, model)
    assert (strict.verdict, bool(strict.flagged.any())) == ("clean", False)
    assert "no class do layers agree" in strict.reason


def test_a_clean_set_is_clean_and_too_few_images_leave_it_undecided() -> None:
    data, model = corners(poisoned=0), backdoored()
    report = Linearity()(data, model)
    assert (report.verdict, report.targets, bool(report.flagged.any())) == ("clean", (), False)
    few = data.select(torch.arange(400) < 100)
    undecided = Linearity()(few, model)
    assert undecided.verdict == "undecided"
    assert "fewer than 40 images for 'a'" in undecided.reason
    assert undecided.evidence["classes_unjudged"] == list(range(CLASSES))
    # A model that is sure of nothing has no channel that speaks for a class.
    with torch.no_grad():
        model.network[-1].weight.mul_(1e-3)  # type: ignore[index, union-attr, operator]
    assert Linearity()(data, model).verdict == "undecided"


def test_a_model_of_one_layer_is_refused_and_the_defaults_are_nones() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES))
    with pytest.raises(UntrojanError, match="layers before the last"):
        Linearity()(corners(0), Classifier(flat, CLASSES, torch.zeros(1), torch.ones(1)))
    built = CLEANSERS.build("linearity", {"excess": 2.0})
    assert built == replace(Linearity(), excess=2.0)
    assert (Linearity().layers, Linearity().layer_separation) == (NONE().layers, NONE().layer_separation)
