"""What every training defence answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class TrainingReport:
    """``(train: ImageSet, architecture: str, recipe: Recipe) -> TrainingReport``."""

    model: Classifier
    dropped: Tensor
    """bool (N,): images that the final model was not trained on at the end."""
    history: list[dict[str, float]] = field(default_factory=list)
    """An entry an epoch, of all of the training."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """The method's own findings, as JSON types."""
    taught: int | None = None
    """How many of the history's epochs taught, where those after them unlearn; None: all."""

    @property
    def training_accuracy(self) -> float:
        """Share of the images predicted as labelled in the last epoch that taught them, 0..1."""
        return self.history[(len(self.history) if self.taught is None else self.taught) - 1]["accuracy"]


def keeping_every_class(dropped: Tensor, data: ImageSet) -> tuple[Tensor, list[int]]:
    """``dropped``, bool (N,), without the classes that it would leave empty; and those classes.

    Without any image of a class there is nothing to train it on.
    """
    before, after = data.class_counts, data.select(~dropped).class_counts
    emptied = (before > 0) & (after == 0)
    return dropped & ~emptied[data.labels], emptied.nonzero().flatten().tolist()
