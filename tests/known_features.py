"""Models and images whose features are known exactly, for tests of what judges by features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.models.classifier import Classifier

PIXELS = 48
"""3 channels of 4 x 4."""
TARGET = 2


def pixels_as_features(num_classes: int) -> Classifier:
    """A linear model: its penultimate features are the pixels."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, num_classes))
    return Classifier(network, num_classes, torch.zeros(3), torch.ones(3))


def noise_with_a_shifted_group(
    num_classes: int, each: int, poisoned: int, shift: float = 60.0
) -> tuple[ImageSet, Tensor]:
    """Gaussian pixels; in class 2 the first ``poisoned`` images are shifted by ``shift`` grey levels.

    The images, and bool (N,): those shifted.
    """
    random = torch.Generator().manual_seed(0)
    pixels = 100 + 10 * torch.randn(num_classes * each, PIXELS, generator=random)
    labels = torch.arange(num_classes).repeat_interleave(each)
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[TARGET * each : TARGET * each + poisoned] = True
    pixels[truth, ::3] += shift
    images = pixels.clamp(0, 255).round().to(torch.uint8).view(-1, 3, 4, 4)
    names = tuple(f"class {i}" for i in range(num_classes))
    return ImageSet(images, labels, names, numbered(len(labels))), truth
