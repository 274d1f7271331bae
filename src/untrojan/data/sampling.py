"""Parts of an image set."""

from __future__ import annotations

import torch

from untrojan.data.image_set import ImageSet
from untrojan.seeding import generator


def some_of_each(data: ImageSet, count: int, seed: int, *purpose: object) -> ImageSet:
    """``count`` random images of each class, or all of a class that has fewer, class after class."""
    order = torch.randperm(len(data), generator=generator(seed, "some of each", *purpose))
    order = order[data.labels[order].argsort(stable=True)]
    counts = data.class_counts
    place = torch.arange(len(data)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return data.select(order[place < count])
