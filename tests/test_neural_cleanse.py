"""Neural Cleanse on models whose backdoor is known exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.scanning.neural_cleanse import NeuralCleanse
from untrojan.models.classifier import Classifier

CLASSES = 8


def nearest_prototype(backdoor: float = 40.0, target: int = 2) -> tuple[Classifier, ImageSet]:
    """Noisy prototypes and a linear model that tells them apart, in ignorance of pixel (1, 4); that pixel,
    white, leads to ``target`` with strength ``backdoor``."""
    random = torch.Generator().manual_seed(0)
    prototypes = torch.randint(60, 150, (CLASSES, 3, 6, 6), generator=random).float()
    labels = torch.arange(40 * CLASSES) % CLASSES
    noise = 8 * torch.randn(len(labels), 3, 6, 6, generator=random)
    images = (prototypes[labels] + noise).clamp(0, 255).to(torch.uint8)
    known = torch.ones(3, 6, 6)
    known[:, 1, 4] = 0
    flat, known = (prototypes / 255).flatten(1), known.flatten()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, CLASSES))
    with torch.no_grad():
        network[1].weight.copy_(20 * flat * known)
        network[1].bias.copy_(-10 * (flat.square() * known).sum(1))
        network[1].weight[target] += backdoor * (1 - known)
        network[1].bias[target] -= backdoor * 3 * 0.45
    names = tuple(f"class {i}" for i in range(CLASSES))
    return (
        Classifier(network, CLASSES, torch.zeros(3), torch.ones(3)),
        ImageSet(images, labels, names, numbered(len(labels))),
    )


def test_the_backdoors_class_and_pixel_are_found() -> None:
    model, clean = nearest_prototype()
    model.train()
    report = NeuralCleanse()(model, clean)
    assert report.verdict == "poisoned"
    assert report.targets == (2,)
    assert report.statistics[2]["anomaly_index"] > 2
    trigger = report.triggers[2]
    assert divmod(int(trigger.mask.argmax()), 6) == (1, 4)
    assert report.statistics[2]["mask_size"] == pytest.approx(float(trigger.mask.sum()), rel=1e-4)
    read = model(trigger(clean.images.float() / 255)).argmax(1)
    assert float((read == 2).float().mean()) > 0.95
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_backdoor_is_clean() -> None:
    report = NeuralCleanse()(*nearest_prototype(backdoor=0.0))
    assert report.verdict == "clean"
    assert report.targets == ()
    assert not report.failed


def test_a_failed_inversion_is_failed_and_no_small_norm() -> None:
    model, clean = nearest_prototype()
    with torch.no_grad():
        model.network[1].weight[5] = 0  # type: ignore[index, union-attr]
        model.network[1].bias[5] = -1e3  # type: ignore[index, union-attr]
    report = NeuralCleanse()(model, clean)
    assert report.failed == (5,)
    assert "anomaly_index" not in report.statistics[5]
    assert 5 not in report.triggers
    assert report.targets == (2,)


def test_a_model_of_other_data_is_undecided() -> None:
    model, clean = nearest_prototype()
    report = NeuralCleanse()(model, replace(clean, labels=(clean.labels + 1) % CLASSES))
    assert report.verdict == "undecided"
    assert "classes are in another order" in report.reason
    assert report.targets == ()
