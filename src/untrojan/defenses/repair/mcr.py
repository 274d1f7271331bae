"""Mode connectivity repair: a model from the middle of a curve of low loss between two backdoored ones.

Zhao et al., "Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.func import functional_call

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.finetune import Finetuning
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.repair.tuning import Tuning, apart
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import trainable

Weights = Mapping[str, Tensor]

POINTS = 11
"""Places on the curve that are looked at, its ends included."""


def bezier(first: Weights, bend: Weights, last: Weights, t: float | Tensor) -> dict[str, Tensor]:
    """The quadratic Bezier curve (1 - t)^2 first + 2 t (1 - t) bend + t^2 last, weight by weight
    (the paper's section 3.2); at 0 and 1 exactly its ends."""
    start, middle, end = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return {name: start * first[name] + middle * bend[name] + end * last[name] for name in first}


def halvings(epochs: int) -> tuple[int, ...]:
    """Epochs after which to halve the learning rate, so as to follow the released schedule: constant for half
    of the epochs, then straight down to a hundredth at nine tenths."""
    crossings = [0.5 + 0.4 * (1 - 0.5 ** (k - 0.5)) / 0.99 for k in range(1, 8)]
    return tuple(max(1, round(epochs * crossing)) for crossing in crossings)


@torch.no_grad()
def recompute_statistics(model: Classifier, images: Tensor, batch_size: int = 128) -> None:
    """Batch norm's running statistics of ``model`` as it now is, in place: the mean over batches of uint8
    images (N, C, H, W), by their sizes. Weights on a curve have activations of their own."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    before = [(module.momentum, module.training) for module in norms]
    model.eval()
    seen = 0
    # As even as they come: a last batch of one image would have no variance.
    for batch in images.chunk(-(-len(images) // batch_size)):
        seen += len(batch)
        for module in norms:
            module.train()
            module.momentum = len(batch) / seen
        model(to_float(batch, model.device))
    for module, (momentum, training) in zip(norms, before, strict=True):
        module.momentum = momentum
        module.train(training)


@dataclass(frozen=True)
class MCR(Tuning):
    """Mode connectivity repair between the given model and a fine-tuned copy of it, as for DECK's table.

    The bend of the curve is trained at a place drawn for each batch, with the released code's constants: 100
    epochs, its schedule followed by halvings. By clean accuracy alone an end of the curve would often be
    chosen, and both ends are backdoored: so the place is sought in its middle, on images kept from training.
    """

    epochs: Annotated[int, Ge(1)] = 100
    learning_rate: Annotated[float, Gt(0)] = 0.01
    milestones: tuple[Annotated[int, Ge(1)], ...] = ()
    """Where none is given, halvings along the released schedule."""
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    """Of the weights on the curve: half of it times their squared norm is part of the loss."""
    least: Annotated[float, Interval(gt=0, lt=0.5)] = 0.1
    """The place t is chosen in least .. 1 - least, from tenths of the curve."""
    validation: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Share of the clean images on which the place is chosen; not trained on."""
    end_epochs: Annotated[int, Ge(1)] = 10
    """The other end is made by standard fine-tuning."""
    end_learning_rate: Annotated[float, Gt(0)] = 0.02

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Find the curve on part of ``clean``, uint8 images rightly labelled, and the place on the rest.

        Raises UntrojanError as training does.
        """
        data, validation = apart(clean, self.validation, self.seed, "mcr validation")
        tuned = trainable(model)
        end = Finetuning(
            epochs=self.end_epochs, learning_rate=self.end_learning_rate, cutout=self.cutout,
            crop_padding=self.crop_padding, flip=self.flip, seed=self.seed,
        )  # fmt: skip
        epochs = end.tune(tuned, data, "fine-tuning the other end", checkpoint=checkpoint)
        first, last = weights_of(model), weights_of(tuned)
        bend, more = self._bend(model, first, last, data, checkpoint)
        curve = []
        for t in torch.linspace(0, 1, POINTS, dtype=torch.float64).tolist():
            here = self.at(model, first, bend, last, t, data)
            curve.append({"t": t, "benign_accuracy": benign_accuracy(here, validation)})
        inside = [point for point in curve if self.least - 1e-9 <= point["t"] <= 1 - self.least + 1e-9]
        # Of places equally good, the one furthest from both ends.
        chosen = max(inside, key=lambda point: (point["benign_accuracy"], -abs(point["t"] - 0.5)))["t"]
        repaired = self.at(model, first, bend, last, chosen, data)
        return RepairReport(repaired, {"epochs": epochs + more, "curve": curve, "t": chosen})

    def _bend(
        self, model: Classifier, first: Weights, last: Weights, data: ImageSet, checkpoint: Path | None
    ) -> tuple[Weights, list[dict[str, float]]]:
        """The trained weights between the ends, set out from their mean."""
        between = trainable(model)
        with torch.no_grad():
            for name, parameter in between.named_parameters():
                parameter.copy_((first[name] + last[name]) / 2)

        def loss(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            # Torch's own random state, which the loop seeds and a checkpoint keeps.
            weights = bezier(first, dict(model.named_parameters()), last, torch.rand(()).item())
            logits: Tensor = functional_call(model, weights, (images,))
            squared = torch.stack([weight.square().sum() for weight in weights.values()]).sum()
            return F.cross_entropy(logits, labels) + self.weight_decay / 2 * squared, logits

        if self.milestones:
            schedule = replace(self, weight_decay=0.0)
        else:
            schedule = replace(self, weight_decay=0.0, milestones=halvings(self.epochs), decay=0.5)
        epochs = schedule.tune(between, data, "training the curve", checkpoint=checkpoint, loss=loss)
        return weights_of(between), epochs

    def at(
        self, model: Classifier, first: Weights, bend: Weights, last: Weights, t: float, data: ImageSet
    ) -> Classifier:
        """The model at place ``t`` in [0, 1], with batch-norm statistics of ``data``; in evaluation mode."""
        made = trainable(model)
        with torch.no_grad():
            for name, weight in bezier(first, bend, last, t).items():
                made.get_parameter(name).copy_(weight)
        recompute_statistics(made, data.images)
        return made.eval()


def weights_of(model: Classifier) -> dict[str, Tensor]:
    """All weights by name, without history."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
