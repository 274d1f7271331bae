"""Small data that a small net learns in a second: classes told apart by the colour of a noisy image."""

from __future__ import annotations

import torch

from untrojan.data.image_set import ImageSet, Splits, numbered
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe

QUICK = Recipe(epochs=3, batch_size=32, optimizer="sgd", learning_rate=0.05, schedule="one_cycle")
COLOURS = torch.full((5, 3), 110) + 14 * torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])


def coloured(per_class, seed, classes=5, side=16):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randint(-60, 61, (len(labels), 3, side, side), generator=random)
    images = (COLOURS[labels][:, :, None, None] + noise).to(torch.uint8)
    return ImageSet(images, labels, tuple("abcde"[:classes]), numbered(len(labels)))


def coloured_splits(train=60, test=20, classes=5, side=16):
    return Splits(coloured(train, 0, classes, side), coloured(test, 1, classes, side))


def quick_model(images, seed=0, architecture="cnn@0.25"):
    return train_new(images, architecture, QUICK, seed=seed)[0]
