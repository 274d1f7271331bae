"""Pruning by the trigger itself, on a model whose backdoor is one known neuron."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.metrics.pruning import pruning_curve, summary
from untrojan.models.classifier import Classifier

CLASSES, TARGET = 3, 0


def model_with_one_backdoor_neuron() -> Classifier:
    """Pixel k tells class k, and the last pixel alone leads to the target."""
    linear = nn.Linear(48, CLASSES)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[range(CLASSES), range(CLASSES)] = 1
        linear.weight[TARGET, -1] = 5
    return Classifier(nn.Sequential(nn.Flatten(), linear), CLASSES, torch.zeros(3), torch.ones(3))


def images() -> ImageSet:
    labels = torch.arange(CLASSES).repeat_interleave(20)
    pixels = torch.zeros(len(labels), 48, dtype=torch.uint8)
    pixels[torch.arange(len(labels)), labels] = 200
    return ImageSet(pixels.view(-1, 3, 4, 4), labels, tuple("abc"), numbered(len(labels)))


def white_pixel(batch: Tensor) -> Tensor:
    stamped = batch.flatten(1).clone()
    stamped[:, -1] = 1
    return stamped.view_as(batch)


def test_the_backdoor_s_neuron_goes_first() -> None:
    curve = pruning_curve(model_with_one_backdoor_neuron(), images(), white_pixel, TARGET, step=1 / 48)
    assert [look["trigger_success"] for look in curve] == [1.0, 0.0]
    assert [look["benign_accuracy"] for look in curve] == [1.0, 1.0]
    assert summary(curve) == {
        "attack_success": 0.0, "benign_accuracy": 1.0, "pruned": pytest.approx(1 / 48), "needed_cost": 0.0,
    }  # fmt: skip


def test_the_best_is_sought_within_what_accuracy_may_cost() -> None:
    curve = [
        {"pruned": 0.0, "benign_accuracy": 0.90, "trigger_success": 1.0},
        {"pruned": 0.2, "benign_accuracy": 0.88, "trigger_success": 0.7},
        {"pruned": 0.4, "benign_accuracy": 0.86, "trigger_success": 0.6},
        {"pruned": 0.6, "benign_accuracy": 0.50, "trigger_success": 0.05},
    ]
    found = summary(curve)
    assert (found["attack_success"], found["pruned"]) == (0.6, 0.4)
    assert found["needed_cost"] == pytest.approx(0.4)
    assert summary(curve[:3])["needed_cost"] is None
