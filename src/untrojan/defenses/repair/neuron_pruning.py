"""Neuron pruning: silence the penultimate neurons that a trigger excites, the most excited first.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019,
section VI-B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.inverted import invert_backdoors
from untrojan.defenses.repair.report import RepairReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, predictions_of, to_float
from untrojan.models.frozen import trainable
from untrojan.models.taps import features_of, levels_of
from untrojan.triggers.base import to_bytes

Stamp = Callable[[Tensor], Tensor]


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
    seed: int = 0
    schedule: Literal["fast", "paper"] = "fast"
    """How a trigger is inverted, where none is given."""

    def __call__(
        self, model: Classifier, clean: ImageSet, trigger: Stamp | None = None, target: int | None = None, *,
        checkpoint: Path | None = None,
    ) -> RepairReport:  # fmt: skip
        """Prune what ``trigger``, which leads to ``target``, excites.

        Without one, Neural Cleanse is asked, and the triggers it suspects are undone one after another;
        where it suspects none, the one with the smallest mask. Raises UntrojanError for a network whose last
        layer's inputs cannot be told, without images of other classes, or where no trigger can be inverted.
        """
        if trigger is not None and target is not None:
            return self._prune(model, clean, trigger, target)
        _last_layer(model, clean)
        inverted, found = invert_backdoors(model, clean, self.schedule, self.seed, checkpoint)
        looks: list[dict[str, Any]] = []
        pruned = 0.0
        for label, stamp in inverted.items():
            report = self._prune(model, clean, stamp, label)
            model = report.model
            looks += [{"target": label, **look} for look in report.history["looks"]]
            pruned = max(pruned, report.history["pruned"])
        return RepairReport(model, {"looks": looks, "pruned": pruned, **found})

    def _prune(self, model: Classifier, clean: ImageSet, trigger: Stamp, target: int) -> RepairReport:
        others = clean.images[clean.labels != target]
        if not len(others):
            raise UntrojanError("neuron pruning needs clean images of other classes than the target")
        stamped = to_bytes(trigger(others.float() / 255))
        order = pruning_order(features_of(model, others), features_of(model, stamped))
        repaired = trainable(model).eval()
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
