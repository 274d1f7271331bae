"""What the repairs that train share: fine-tuning on few images, and Cutout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.models.classifier import Classifier
from untrojan.models.layers import bearable_rate
from untrojan.seeding import generator
from untrojan.training.loop import AugmentedTransform, BatchLoss, train
from untrojan.training.recipe import Recipe

FEWEST_STEPS = 20
"""Steps an epoch has at least, where that takes no batch below ``SMALLEST_BATCH`` images."""
SMALLEST_BATCH = 16

History = list[dict[str, Any]]
"""A row an epoch: stage, loss, accuracy, learning_rate, seconds."""


@dataclass(frozen=True)
class Tuning:
    """Stochastic gradient descent on a few clean images.

    The defaults are those of the toolbox of DECK's authors for fine-tuning with "a small learning rate" (Tao
    et al., "DECK: Model Hardening for Defending Pervasive Backdoors", section V): learning rate 0.02, a tenth
    of it after every two epochs, ten epochs; the augmentation is that of NAD's code.

    Published networks have batch norm. One without norm layers bears no such learning rates (a NiN lost 29
    points of accuracy to fine-tuning) and is trained at a tenth, which is ours.
    """

    epochs: Annotated[int, Ge(1)] = 10
    learning_rate: Annotated[float, Gt(0)] = 0.02
    milestones: tuple[Annotated[int, Ge(1)], ...] = (2, 4, 6, 8)
    """Epochs after which the learning rate falls to ``decay`` of itself."""
    decay: Annotated[float, Interval(gt=0, le=1)] = 0.1
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    batch_size: Annotated[int, Ge(2)] = 128
    """Of 2,500 images, a twentieth of CIFAR-10. Fewer images go in smaller batches, down to 16 images, so
    that an epoch keeps its twenty steps."""
    crop_padding: Annotated[int, Ge(0)] = 4
    flip: bool = True
    """Mirror left to right: not for data where that changes the class."""
    cutout: Annotated[int, Ge(0)] = 2
    """Side in pixels of a black square at a random place. NAD's code says 3 and, by halving, paints 2."""
    seed: int = 0

    def recipe(self, images: int, model: Classifier) -> Recipe:
        """For the one training loop, on so many images."""
        return Recipe(
            epochs=self.epochs, batch_size=batch_size_for(images, self.batch_size), optimizer="sgd",
            learning_rate=bearable_rate(self.learning_rate, model), momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="steps", milestones=self.milestones, decay=self.decay,
            crop_padding=self.crop_padding, flip=self.flip, precision=model.precision,
        )  # fmt: skip

    def tune(
        self,
        model: Classifier,
        clean: ImageSet,
        stage: str,
        *,
        checkpoint: Path | None = None,
        loss: BatchLoss | None = None,
    ) -> History:
        """Train ``model`` in place; its epochs. ``stage`` names the stage and its checkpoint file."""
        history = train(
            model, clean, self.recipe(len(clean), model), seed=self.seed, description=stage, loss=loss,
            checkpoint=stage_file(checkpoint, stage), method=f"{self} {stage}",
            augmented_transform=cutting_out(self.cutout) if self.cutout else None,
        )  # fmt: skip
        return [{"stage": stage, **epoch} for epoch in history.to_json()]


def batch_size_for(images: int, most: int) -> int:
    """The batch size for so many images: ``most``, or less so that an epoch has ``FEWEST_STEPS`` steps."""
    return max(2, min(most, max(SMALLEST_BATCH, images // FEWEST_STEPS)))


def stage_file(checkpoint: Path | None, stage: str) -> Path | None:
    """Where a stage of a repair keeps its state, beside the repair's own ``checkpoint``."""
    return checkpoint and checkpoint.with_name(f"{checkpoint.stem}-{stage.replace(' ', '-')}.pt")


def cutout(images: Tensor, places: Tensor, side: int) -> Tensor:
    """``images`` (N, C, H, W) with a black square each, of ``side`` pixels, ``places`` int64 (N, 2) being the
    row and column of its middle (for an even side, of the first pixel after the middle). What lies beyond
    the edge is cut off, so that corners are hidden as often as the rest.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    first = places - side // 2
    hidden = [
        (torch.arange(length) >= first[:, axis, None]) & (torch.arange(length) < first[:, axis, None] + side)
        for axis, length in enumerate(images.shape[2:])
    ]
    square = hidden[0][:, :, None] & hidden[1][:, None, :]
    return images.masked_fill(square[:, None].to(images.device), 0)


def cutting_out(side: int) -> AugmentedTransform:
    """:func:`cutout` as the training loop's hook, at places drawn anew for each image and step."""

    def transform(
        images: Tensor, labels: Tensor, rows: Tensor, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        drawn = [torch.randint(0, length, (len(images),), generator=random) for length in (height, width)]
        return cutout(images, torch.stack(drawn, 1), side), labels

    return transform


def balanced(clean: ImageSet, of_each: int, seed: int, purpose: str) -> Tensor:
    """bool (N,): ``of_each`` images of every class, or all of a class that has fewer."""
    order = torch.randperm(len(clean), generator=generator(seed, purpose))
    labels = clean.labels[order]
    chosen = torch.zeros(len(clean), dtype=torch.bool)
    for label in range(clean.num_classes):
        chosen[order[labels == label][:of_each]] = True
    return chosen


def apart(clean: ImageSet, share: float, seed: int, purpose: str) -> tuple[ImageSet, ImageSet]:
    """Two parts of a set, class by class: the second has ``share`` of each class, rounded, and one image of
    any class that has two or more."""
    order = torch.randperm(len(clean), generator=generator(seed, purpose))
    labels = clean.labels[order]
    second = torch.zeros(len(clean), dtype=torch.bool)
    for label, count in enumerate(clean.class_counts.tolist()):
        taken = min(count - 1, max(1, round(share * count)))
        second[order[labels == label][: max(taken, 0)]] = True
    return clean.select(~second), clean.select(second)
