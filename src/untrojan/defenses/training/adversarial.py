"""Adversarial training: every batch is attacked before it is learned.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, equation 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.report import TrainingReport
from untrojan.models.classifier import evaluating
from untrojan.models.registry import build_for
from untrojan.training.adversarial import PGD
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe


@dataclass(frozen=True)
class AdversarialTraining:
    """Train on adversarial images alone, found anew for each batch after augmentation.

    The bounds are DECK's (appendix III-C): 8/255 for CIFAR-10, .03 for SVHN and GTSRB, .1 for LISA; the
    attack is that of MOTH's code: 7 steps of 2/255 for CIFAR-10, 8 of .005 for SVHN and GTSRB, 8 of .02
    for LISA.
    """

    epsilon: Annotated[float, Interval(ge=0, le=1)] = 8 / 255
    step: Annotated[float, Interval(ge=0, le=1)] = 2 / 255
    steps: Annotated[int, Ge(1)] = 7
    random_start: bool = True
    seed: int = 0

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport:  # fmt: skip
        """Train a new classifier on ``data`` by ``recipe``, a step of which costs ``steps`` passes more.

        The attack sees the model in evaluation mode, so that only what is learned moves batch norm's
        statistics. Nothing is dropped. Raises UntrojanError as training does.
        """
        model = build_for(data, architecture, precision=recipe.precision, seed=self.seed).to(device)
        attack = PGD(self.epsilon, self.step, self.steps, self.random_start)

        def attacked(
            images: Tensor, labels: Tensor, _: Tensor, random: torch.Generator
        ) -> tuple[Tensor, Tensor]:
            with evaluating(model):
                return attack(model, images, labels, random), labels

        history = train(
            model, data, recipe, seed=self.seed, checkpoint=checkpoint, augmented_transform=attacked,
            method=str(self), description="adversarial training",
        )  # fmt: skip
        return TrainingReport(model, torch.zeros(len(data), dtype=torch.bool), history.to_json())
