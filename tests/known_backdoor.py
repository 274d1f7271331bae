"""Images and a net whose backdoor channel is known, for tests of what looks for such channels."""

from __future__ import annotations

import torch
from torch import nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.models.classifier import Classifier

CLASSES, TARGET, BACKDOOR = 4, 1, 5


def blocks(count: int = 400, poisoned: int = 0, seed: int = 0) -> ImageSet:
    """A bright block whose place tells the class; the first ``poisoned`` have a white corner and class 1."""
    random, labels = torch.Generator().manual_seed(seed), torch.arange(count) % CLASSES
    images = torch.randint(0, 60, (count, 3, 16, 16), generator=random)
    for row in range(6):
        for column in range(6):
            images[torch.arange(count), :, 8 * (labels // 2) + row, 8 * (labels % 2) + column] += 120
    images[:poisoned, :, 14:, 14:] = 255
    labels[:poisoned] = TARGET
    return ImageSet(images.to(torch.uint8), labels, tuple("abcd"), numbered(count))


def known_net(num_classes: int = CLASSES, *, normed: bool = False, layers: int = 1) -> nn.Sequential:
    """Channel k of a first layer answers to block k, channel 5 to a white 2x2 corner alone; further
    ``layers`` before the last pass on what they get."""
    first, last = nn.Conv2d(3, 8, 16), nn.Linear(8, num_classes)
    with torch.no_grad():
        for parameter in (*first.parameters(), *last.parameters()):
            parameter.zero_()
        for k in range(CLASSES):
            top, left = 8 * (k // 2), 8 * (k % 2)
            first.weight[k, :, top : top + 6, left : left + 6] = 1 / 108
        first.weight[BACKDOOR, :, 14:, 14:] = 1.0
        first.bias[BACKDOOR] = -6.0  # type: ignore[index]
        last.weight[range(CLASSES), range(CLASSES)] = 20.0
        last.weight[TARGET, BACKDOOR] = 20.0
    before = [first, *([nn.BatchNorm2d(8)] if normed else []), nn.ReLU()]
    for _ in range(layers - 1):
        passing = nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            passing.weight.copy_(torch.eye(8)[:, :, None, None])
            passing.bias.zero_()  # type: ignore[union-attr]
        before += [passing, nn.ReLU()]
    return nn.Sequential(*before, nn.Flatten(), last)


def backdoored(*, normed: bool = False, layers: int = 1) -> Classifier:
    """:func:`known_net` as a classifier."""
    return Classifier(known_net(normed=normed, layers=layers), CLASSES, torch.zeros(3), torch.ones(3))
