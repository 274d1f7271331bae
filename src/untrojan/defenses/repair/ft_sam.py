"""FT-SAM: fine-tuning that looks for flat minima, which moves a backdoor's large weights more.

Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023; the
minimisation is Foret et al.'s (ICLR 2021), in its adaptive form Kwon et al.'s (ICML 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.clean_data import weights_fingerprint
from untrojan.defenses.repair.report import RepairReport
from untrojan.models.classifier import Classifier
from untrojan.models.frozen import trainable
from untrojan.models.layers import bearable_rate
from untrojan.training.gradients import carrying
from untrojan.training.loop import BatchLoss, train
from untrojan.training.recipe import Recipe, Share


def sharpest_direction(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool
) -> list[Tensor]:
    """The step e of all weights together that raises the loss most to first order, within ``rho``.

    Plainly rho g / ||g||, with ||e|| <= rho. ``adaptive`` measures each weight's step against the weight
    itself, ||e / |w||| <= rho, which gives rho w^2 g / |||w| g||.
    """
    scales = [weight.abs() if adaptive else torch.ones_like(weight) for weight in weights]
    scaled = [scale * gradient for scale, gradient in zip(scales, gradients, strict=True)]
    length = torch.stack([each.norm() for each in scaled]).norm()
    return [rho * scale * each / length.clamp_min(1e-12) for scale, each in zip(scales, scaled, strict=True)]


def sharpness_aware(loss: BatchLoss, rho: float, adaptive: bool) -> BatchLoss:
    """``loss`` with the gradient that it has at the worst weights within ``rho`` of the present ones.

    Value and logits are those at the present weights. Both passes drop the same units, and only the first
    moves batch norm's statistics. With ``rho`` 0 the gradient is ``loss``'s own, bit for bit.
    """

    def sharp(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        before_dropout = torch.get_rng_state()
        value, logits = loss(model, images, labels, rows)
        named = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(value, named, allow_unused=True)
        used = [
            (weight, gradient) for weight, gradient in zip(named, found, strict=True) if gradient is not None
        ]
        weights = [weight for weight, _ in used]
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            steps = sharpest_direction(kept, [gradient for _, gradient in used], rho, adaptive)
            for weight, step in zip(weights, steps, strict=True):
                weight.add_(step)
        with torch.random.fork_rng(devices=[]), still_statistics(model):
            torch.set_rng_state(before_dropout)
            sharp_value, _ = loss(model, images, labels, rows)
            gradients = torch.autograd.grad(sharp_value, weights)
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
        return carrying(value.detach(), zip(weights, gradients, strict=True)), logits

    return sharp


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises as it would, but its running statistics stay as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracking in zip(norms, tracked, strict=True):
            norm.track_running_stats = tracking


@dataclass(frozen=True)
class FTSAM:
    """Fine-tune by sharpness-aware minimisation; the defaults are the authors' for CIFAR-10."""

    rho: Annotated[float, Ge(0)] = 2.0
    """2 for CIFAR-10, 8 for Tiny ImageNet."""
    adaptive: bool = True
    epochs: Annotated[int, Ge(1)] = 100
    batch_size: Annotated[int, Ge(2)] = 256
    learning_rate: Annotated[float, Gt(0)] = 0.01
    """At the start; it falls to nothing along a cosine. A tenth of it without norm layers."""
    momentum: Share = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    label_smoothing: Share = 0.1
    crop_padding: Annotated[int, Ge(0)] = 4
    flip: bool = True
    """Mirrored images; turn it off where the class depends on left and right."""
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Fine-tune a copy of ``model`` on ``clean``. Raises UntrojanError as training does."""
        repaired = trainable(model)
        recipe = Recipe(
            epochs=self.epochs, batch_size=self.batch_size, optimizer="sgd",
            learning_rate=bearable_rate(self.learning_rate, model), momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="one_cycle", warm_up=0.0, crop_padding=self.crop_padding, flip=self.flip,
            precision=model.precision,
        )  # fmt: skip

        def smoothed(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(images)
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits

        history = train(
            repaired, clean, recipe, seed=self.seed, checkpoint=checkpoint,
            loss=sharpness_aware(smoothed, self.rho, self.adaptive),
            method=f"{self} {weights_fingerprint(model)}", description="fine-tuning",
        )  # fmt: skip
        return RepairReport(repaired, {"epochs": history.to_json()})
