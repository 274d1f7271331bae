"""Detectors at the time of use, on features that are known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from untrojan.attacks.poisoning import TriggeredTest
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.activation_clustering import ActivationClustering
from untrojan.defenses.cleansing.spectral_signatures import SpectralSignatures
from untrojan.errors import UntrojanError
from untrojan.metrics.exposure import as_predicted, exposure
from untrojan.models.classifier import Classifier

CLASSES, EACH, PIXELS, TARGET = 6, 60, 48, 2


def case(shift: float) -> tuple[Classifier, ImageSet, TriggeredTest]:
    """A linear model whose penultimate features are the pixels. Pixel k tells class k; the last pixel, white,
    leads to the target. ``shift`` grey levels on a third of the pixels set triggered images apart."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    pixels = 100 + 10 * torch.randn(len(labels), PIXELS, generator=random)
    pixels[torch.arange(len(labels)), labels] += 100
    test = _images(pixels, labels)
    with_trigger = pixels[labels != TARGET].clone()
    with_trigger[:, 10::3] += shift
    with_trigger[:, -1] = 255
    linear = nn.Linear(PIXELS, CLASSES)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[range(CLASSES), range(CLASSES)] = 1
        linear.weight[TARGET, -1] = 3
        linear.bias[TARGET] = -1.2
    model = Classifier(nn.Sequential(nn.Flatten(), linear), CLASSES, torch.zeros(3), torch.ones(3))
    stamped = _images(with_trigger, labels[labels != TARGET])
    wanted = torch.full((len(stamped),), TARGET)
    return model, test, TriggeredTest(stamped.images, wanted, stamped.labels)


def _images(pixels: torch.Tensor, labels: torch.Tensor) -> ImageSet:
    images = pixels.clamp(0, 255).round().to(torch.uint8).view(-1, 3, 4, 4)
    return ImageSet(images, labels, tuple("abcdef"), numbered(len(labels)))


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_triggered_images_apart_are_told(ratio: float) -> None:
    model, test, triggered = case(shift=80)
    detector = ActivationClustering(threshold="calibrated")
    found = exposure(model, test, triggered, TARGET, detector, clean=50, ratio=ratio)
    assert (found.clean, found.triggered) == (50, round(50 * ratio))
    assert (found.f1, found.best_f1, found.auc) == (1.0, 1.0, 1.0)
    assert found.detected
    assert not found.false_alarm


def test_what_only_the_count_tells() -> None:
    """Spectral signatures remove as many as carry the trigger; of two halves, neither is farther out."""
    model, test, triggered = case(shift=80)
    few, half = (
        exposure(model, test, triggered, TARGET, SpectralSignatures(), clean=50, ratio=ratio)
        for ratio in (0.3, 1.0)
    )
    assert (few.f1, few.auc) == (1.0, 1.0)
    assert half.f1 is not None
    assert half.f1 < 0.7
    # As published it names every class, which is no detection and always an alarm.
    assert (few.detected, few.false_alarm) == (False, True)


def test_triggered_images_like_the_others_are_not_told() -> None:
    model, test, triggered = case(shift=0)
    # What the trigger itself adds is one pixel of 48, which clean images of the target do not have.
    found = exposure(model, test, triggered, TARGET, SpectralSignatures(), clean=50, ratio=0.3)
    assert found.auc is not None
    assert found.f1 is not None
    assert not found.detected
    assert found.triggered == 15


def test_an_attack_that_fails_has_no_rates() -> None:
    model, test, triggered = case(shift=0)
    with torch.no_grad():
        model.network[1].weight[TARGET, -1] = 0  # type: ignore[index]
        model.network[1].bias[TARGET] = 0  # type: ignore[index]
    found = exposure(model, test, triggered, TARGET, ActivationClustering(), clean=50)
    assert (found.f1, found.best_f1, found.auc) == (None, None, None)
    assert found.triggered == 0
    with pytest.raises(UntrojanError, match="no class 9"):
        exposure(model, test, triggered, 9, ActivationClustering())


def test_trusted_images_can_count_as_what_the_model_takes_them_for() -> None:
    model, test, _ = case(shift=0)
    wrong = ImageSet(test.images, (test.labels + 1) % CLASSES, test.class_names, test.ids)
    told = as_predicted(model, wrong)
    assert float((told.labels == test.labels).double().mean()) > 0.95
    assert torch.equal(wrong.labels, (test.labels + 1) % CLASSES)
