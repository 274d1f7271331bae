"""Neuron pruning: silence the penultimate neurons that a trigger excites, the most excited first.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019,
section VI-B.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.report import RepairReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, predictions_of, to_float
from untrojan.models.taps import features_of, levels_of
from untrojan.triggers.base import to_bytes


def pruning_order(clean: Tensor, triggered: Tensor) -> Tensor:
    """Neurons by how much more the trigger excites them, int64 (D,), from features (N, D) without and
    with it."""
    return (triggered.mean(0) - clean.mean(0)).argsort(descending=True, stable=True)


@dataclass(frozen=True)
class NeuronPruning:
    """Prune until the inverted trigger no longer works, or pruning costs too much.

    Both are seen on clean images and the inverted trigger; no real attack is asked.
    """

    step: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """Share of the neurons pruned before the next look."""
    most: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Share of the neurons pruned at most."""
    goal: Annotated[float, Interval(ge=0, le=1)] = 0.05
    """The inverted trigger's success at which pruning ends."""
    accuracy_cost: Annotated[float, Interval(ge=0, le=1)] = 0.05
    """Pruning stops before accuracy on the clean images falls by more."""

    def __call__(
        self, model: Classifier, clean: ImageSet, trigger: Callable[[Tensor], Tensor], target: int
    ) -> RepairReport:
        """Prune what ``trigger``, which leads to ``target``, excites.

        Raises UntrojanError for a network whose last layer's inputs cannot be told, or without images of
        other classes.
        """
        others = clean.images[clean.labels != target]
        if not len(others):
            raise UntrojanError("neuron pruning needs clean images of other classes than the target")
        stamped = to_bytes(trigger(others.float() / 255))
        order = pruning_order(features_of(model, others), features_of(model, stamped))
        repaired = copy.deepcopy(model)
        last = _last_layer(repaired, clean)
        count = max(1, round(self.step * len(order)))
        history = [self._look(repaired, clean, stamped, target, 0.0)]
        for pruned in range(count, int(self.most * len(order)) + 1, count):
            if history[-1]["trigger_success"] <= self.goal:
                break
            before = last.weight.detach().clone()
            with torch.no_grad():
                last.weight[:, order[:pruned]] = 0
            look = self._look(repaired, clean, stamped, target, pruned / len(order))
            if look["benign_accuracy"] < history[0]["benign_accuracy"] - self.accuracy_cost:
                with torch.no_grad():
                    last.weight.copy_(before)
                break
            history.append(look)
        return RepairReport(repaired, {"looks": history, "pruned": history[-1]["pruned"]})

    def _look(
        self, model: Classifier, clean: ImageSet, stamped: Tensor, target: int, pruned: float
    ) -> dict[str, float]:
        right = predictions_of(model, clean.images) == clean.labels
        return {
            "pruned": pruned,
            "benign_accuracy": float(right.double().mean()),
            "trigger_success": float((predictions_of(model, stamped) == target).double().mean()),
        }


def _last_layer(model: Classifier, clean: ImageSet) -> nn.Linear | nn.Conv2d:
    """The layer whose inputs are the penultimate features."""
    place = levels_of(model, to_float(clean.images[:1], model.device)).get("penultimate")
    last = dict(model.named_modules()).get(place.path) if place else None
    if not isinstance(last, nn.Linear | nn.Conv2d):
        raise UntrojanError("neuron pruning needs a network that ends in a linear or convolutional layer")
    return last
