"""Input filtering: refuse images that excite the neurons a known trigger excites.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019,
section VI-A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.neuron_pruning import pruning_order
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.models.taps import features_of
from untrojan.triggers.base import to_bytes


@dataclass(frozen=True, eq=False)
class InputFilter:
    """Made by :func:`input_filter`; asked at the time of use."""

    model: Classifier
    neurons: Tensor
    """int64 (n,): the watched penultimate neurons."""
    limit: float
    """Mean activation above which an image is refused."""

    def scores(self, images: Tensor) -> Tensor:
        """Mean activation of the watched neurons, (N,), for uint8 images (N, C, H, W)."""
        return features_of(self.model, images)[:, self.neurons].mean(1)

    def __call__(self, images: Tensor) -> Tensor:
        """bool (N,): the images to refuse."""
        return self.scores(images) > self.limit


@dataclass(frozen=True)
class InputFiltering:
    """How a filter is made."""

    watched: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """Share of the penultimate neurons, those the trigger excites most; at least one."""
    false_rejection_rate: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    """Share of clean images that may be refused: the paper's figure at its operating point."""

    def __call__(
        self, model: Classifier, clean: ImageSet, trigger: Callable[[Tensor], Tensor]
    ) -> InputFilter:
        """A filter against ``trigger``, its limit set on ``clean`` images.

        Raises UntrojanError without any.
        """
        if not len(clean):
            raise UntrojanError("an input filter needs clean images to set its limit on")
        without = features_of(model, clean.images)
        order = pruning_order(without, features_of(model, to_bytes(trigger(clean.images.float() / 255))))
        neurons = order[: max(1, round(self.watched * len(order)))]
        limit = torch.quantile(without[:, neurons].mean(1), 1 - self.false_rejection_rate)
        return InputFilter(model, neurons, float(limit))
