"""Anti-backdoor learning: poisoned images are learned first, so the first learned are unlearned.

Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.report import TrainingReport, keeping_every_class
from untrojan.models.classifier import Classifier, logits_of
from untrojan.models.registry import build_for
from untrojan.training.loop import BatchLoss, train
from untrojan.training.recipe import Recipe

Isolation = Literal["ascent", "flooding"]


def trapped_loss(value: Tensor, threshold: float, isolation: Isolation) -> Tensor:
    """A batch's mean loss, kept from falling below ``threshold``.

    ``ascent`` is the paper's local gradient ascent, sign(loss - threshold) * loss (equation 3); ``flooding``
    is |loss - threshold| + threshold, the released code's default. Where a batch is learned too well, either
    unlearns it; only images that are learned at once keep a small loss.
    """
    if isolation == "ascent":
        return torch.sign(value.detach() - threshold) * value
    return (value - threshold).abs() + threshold


def most_learned(model: Classifier, data: ImageSet, share: float) -> Tensor:
    """bool (N,): the ``share`` of images with the least cross-entropy, at least one."""
    losses = F.cross_entropy(logits_of(model, data.images), data.labels, reduction="none")
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[losses.argsort(stable=True)[: max(1, round(share * len(data)))]] = True
    return chosen


@dataclass(frozen=True)
class ABL:
    """Anti-backdoor learning: isolate, train on the rest, unlearn what was isolated."""

    isolation: Isolation = "ascent"
    threshold: Annotated[float, Ge(0)] = 0.5
    """gamma: the mean loss that is not to be fallen below while isolating."""
    isolated: Annotated[float, Interval(gt=0, lt=1)] = 0.01
    """Share of the images taken for poison."""
    isolating_epochs: Annotated[int, Ge(1)] = 20
    """Of the recipe without augmentation, at its learning rate throughout."""
    unlearning_epochs: Annotated[int, Ge(1)] = 5
    unlearning_rate: Annotated[float, Gt(0)] = 5e-4
    seed: int = 0

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport:  # fmt: skip
        """Train a new classifier on ``data``, of which some images may be poisoned; the recipe's epochs are
        those on what was not isolated. Raises UntrojanError as training does."""
        model = build_for(data, architecture, precision=recipe.precision, seed=self.seed).to(device)
        plain = replace(
            recipe, schedule="constant", milestones=(), crop_padding=0, flip=False, rotation=0.0,
            label_smoothing=0.0,
        )  # fmt: skip
        stages: list[dict[str, float]] = []

        def stage(name: str, images: ImageSet, how: Recipe, loss: BatchLoss | None, number: int) -> None:
            place = None if checkpoint is None else checkpoint.with_name(f"{number}-{checkpoint.name}")
            history = train(
                model, images, how, seed=self.seed + number, checkpoint=place, description=name,
                loss=loss, method=f"{self} {name}",
            )  # fmt: skip
            stages.extend(history.to_json())

        def trapped(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(images)
            return trapped_loss(F.cross_entropy(logits, labels), self.threshold, self.isolation), logits

        def ascent(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(images)
            return -F.cross_entropy(logits, labels), logits

        stage("isolating", data, replace(plain, epochs=self.isolating_epochs), trapped, 0)
        dropped, kept_whole = keeping_every_class(most_learned(model, data, self.isolated), data)
        stage("training on the rest", data.select(~dropped), recipe, None, 1)
        taught = len(stages)
        if int(dropped.sum()) > 1:
            slow = replace(plain, epochs=self.unlearning_epochs, learning_rate=self.unlearning_rate)
            stage("unlearning", data.select(dropped), slow, ascent, 2)
        return TrainingReport(
            model, dropped, stages, {"isolated": int(dropped.sum()), "classes_kept_whole": kept_whole}, taught
        )
