"""Neural attention distillation: the attention of a fine-tuned copy is taught to the backdoored model.

Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.finetune import Finetuning
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.repair.tuning import Tuning
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import trainable
from untrojan.models.taps import SDRM_LEVELS, levels_of, tapped
from untrojan.training.recipe import Recipe

_SMALL = 1e-6

Beta = Annotated[float, Ge(0)]
Side = Annotated[int, Ge(1)]


def attention(features: Tensor, power: float = 2.0) -> Tensor:
    """The attention map (N, H * W) of features (N, C, H, W): |F|^p summed over channels, at unit length
    (the paper's section 3.1, A^p_sum; the code's 1e-6 beside the norm)."""
    sums = features.abs().pow(power).sum(1).flatten(1)
    normalised: Tensor = sums / (sums.norm(dim=1, keepdim=True) + _SMALL)
    return normalised


def distillation_loss(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], weights: Mapping[str, float], power: float
) -> Tensor:
    """Scalar: over levels, weight times the squared distance of the attention maps, averaged over images
    (equation 3)."""
    gaps = [
        weight * (attention(student[level], power) - attention(teacher[level], power)).square().sum(1).mean()
        for level, weight in weights.items()
    ]
    return torch.stack(gaps).sum()


@dataclass(frozen=True)
class NAD(Tuning):
    """Neural attention distillation, as released: two epochs at 0.1, then 0.01.

    The levels are the last activations of the last three resolutions: on a wide ResNet the outputs of its
    three blocks, as published; networks with fewer resolutions are distilled at those they have. The paper
    fine-tunes the teacher at a learning rate of 0.1; here it is 0.02, with the same decay, as for DECK's
    table. ``start="teacher"`` is the variant of the toolbox of DECK's authors, which there goes with one
    level of weight 5,000 and six epochs at 1e-3.
    """

    epochs: Annotated[int, Ge(1)] = 20
    learning_rate: Annotated[float, Gt(0)] = 0.1
    milestones: tuple[Annotated[int, Ge(1)], ...] = (2,)
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    batch_size: Annotated[int, Ge(2)] = 64
    betas: tuple[Beta, Beta, Beta] = (500, 1000, 1000)
    """Weights of the three levels, shallow to deep, for maps of ``sides`` pixels a side."""
    sides: tuple[Side, Side, Side] = (32, 16, 8)
    """The published networks'. Maps are at unit length whatever their size and the published loss is a mean
    over their places, so that the same weight would be sixteen times as strong on a VGG's last maps of 2
    pixels a side. What is weighted is therefore their squared distance, by beta / side^2."""
    power: Annotated[float, Gt(0)] = 2.0
    """p of the attention map."""
    start: Literal["given", "teacher"] = "given"
    """Which model becomes the student."""
    teacher_epochs: Annotated[int, Ge(1)] = 10
    teacher_learning_rate: Annotated[float, Gt(0)] = 0.02

    def recipe(self, images: int, model: Classifier) -> Recipe:
        """As published; where so few images go in smaller batches, the learning rate shrinks with them, for
        0.1 is near the most that training bears."""
        usual = super().recipe(images, model)
        share = usual.batch_size / self.batch_size
        return replace(usual, learning_rate=share * usual.learning_rate)

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Distil on ``clean``, uint8 images rightly labelled.

        Raises UntrojanError for a network without feature maps, and as training does.
        """
        weights = self._weights(model, clean)
        teach = Finetuning(
            epochs=self.teacher_epochs, learning_rate=self.teacher_learning_rate, cutout=self.cutout,
            crop_padding=self.crop_padding, flip=self.flip, seed=self.seed,
        )  # fmt: skip
        teacher = trainable(model)
        epochs = teach.tune(teacher, clean, "fine-tuning the teacher", checkpoint=checkpoint)
        teacher.requires_grad_(False)
        student = trainable(model if self.start == "given" else teacher)
        epochs += self.distil(student, teacher, clean, weights, checkpoint)
        return RepairReport(student, {"epochs": epochs, "levels": list(weights)})

    def distil(
        self,
        student: Classifier,
        teacher: Classifier,
        clean: ImageSet,
        weights: Mapping[str, float],
        checkpoint: Path | None = None,
    ) -> list[dict[str, float]]:
        """Train ``student`` in place on cross-entropy and the teacher's attention; ``weights`` by level."""
        with tapped(student, list(weights)) as seen, tapped(teacher, list(weights)) as shown:

            def loss(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
                logits = model(images)
                value = F.cross_entropy(logits, labels)
                if weights:
                    with torch.no_grad():
                        teacher(images)
                    value = value + distillation_loss(seen, shown, weights, self.power)
                return value, logits

            return self.tune(student, clean, "distillation", checkpoint=checkpoint, loss=loss)

    def _weights(self, model: Classifier, clean: ImageSet) -> dict[str, float]:
        """Of the squared distance by level, of the levels that this network has and that count."""
        found: Sequence[str] = list(levels_of(model, to_float(clean.images[:1], model.device)))
        if not set(found) & set(SDRM_LEVELS):
            raise UntrojanError("NAD needs a network with feature maps: this one has no convolutional layer")
        return {
            level: beta / side**2
            for level, beta, side in zip(SDRM_LEVELS, self.betas, self.sides, strict=True)
            if beta > 0 and level in found
        }
