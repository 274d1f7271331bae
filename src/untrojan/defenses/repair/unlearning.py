"""Unlearning: teach a model the right labels of images that carry its own trigger.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019,
section VI-C.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.report import RepairReport
from untrojan.models.classifier import Classifier
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import to_bytes

Stamp = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] to the same with a trigger: what a scanner inverted."""


@dataclass(frozen=True)
class Unlearning:
    """Fine-tune on clean images of which a share carries the inverted trigger, all rightly labelled.

    The paper's is one epoch on a tenth of the training images, a fifth of them stamped.
    """

    stamped: Annotated[float, Interval(ge=0, le=1)] = 0.2
    epochs: Annotated[int, Ge(1)] = 1
    learning_rate: Annotated[float, Gt(0)] = 0.01
    """Not stated in the paper; its example takes the training's own optimiser."""
    batch_size: Annotated[int, Ge(2)] = 32
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, trigger: Stamp) -> RepairReport:
        """Unlearn ``trigger`` on ``clean``, images known to be rightly labelled.

        Raises UntrojanError where the model's classes are not the images', or training diverges.
        """
        repaired = copy.deepcopy(model)
        recipe = replace(
            Recipe(epochs=self.epochs, batch_size=self.batch_size, optimizer="sgd", schedule="constant"),
            learning_rate=self.learning_rate,
            precision=model.precision,
        )

        def stamp_some(images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
            chosen = torch.rand(len(images), generator=random) < self.stamped
            stamped = to_bytes(trigger(images.float() / 255))
            return torch.where(chosen.to(images.device)[:, None, None, None], stamped, images), labels

        history = train(
            repaired, clean, recipe, seed=self.seed, batch_transform=stamp_some, description="unlearning"
        )
        return RepairReport(repaired, {"epochs": history.to_json()})
