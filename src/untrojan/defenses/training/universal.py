"""Universal adversarial training: one perturbation of all images, learned along with the weights.

Shafahi et al., "Universal Adversarial Training", AAAI 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.report import TrainingReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating
from untrojan.models.registry import build_for
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe


def ascended(perturbation: Tensor, gradient: Tensor, epsilon: float, step: float) -> Tensor:
    """``perturbation`` one ``step`` along the gradient's sign, within ``epsilon`` of zero."""
    return (perturbation + step * gradient.sign()).clamp(-epsilon, epsilon)


@dataclass(frozen=True)
class UniversalAdversarialTraining:
    """Descend in the weights and ascend in a perturbation that all images share, a step of each a batch.

    The bounds are DECK's (appendix III-C): 4/255 for CIFAR-10, .05 for SVHN, .03 for LISA and GTSRB.
    """

    epsilon: Annotated[float, Interval(gt=0, le=1)] = 4 / 255
    step: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Of the perturbation; ``epsilon`` where it is not given."""
    simultaneous: bool = False
    """Both steps from one gradient, at half the cost; else the perturbation's is taken after
    the weights', at the new weights in evaluation mode."""
    loss_cap: Annotated[float, Gt(0)] | None = None
    """An image's cross-entropy is clipped to so much in the perturbation's objective (beta);
    none by default."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.simultaneous and self.loss_cap is not None:
            raise UntrojanError("loss_cap needs a gradient of its own: give simultaneous=false with it")

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport:  # fmt: skip
        """Train a new classifier on ``data`` by ``recipe``. Nothing is dropped. Raises UntrojanError as
        training does."""
        model = build_for(data, architecture, precision=recipe.precision, seed=self.seed).to(device)
        perturbation = torch.zeros(1, *data.image_shape, device=device)
        perturbation.requires_grad_(self.simultaneous)
        batch: list[Tensor] = []

        def perturbed(
            images: Tensor, labels: Tensor, _: Tensor, __: torch.Generator
        ) -> tuple[Tensor, Tensor]:
            batch[:] = [images, labels]
            return (images + perturbation).clamp(0, 1), labels

        def ascend(model: Classifier) -> None:
            if self.simultaneous:
                gradient, perturbation.grad = perturbation.grad, None
            else:
                gradient = self._gradient(model, batch[0], batch[1], perturbation)
            if gradient is not None:
                with torch.no_grad():
                    step = self.epsilon if self.step is None else self.step
                    perturbation.copy_(ascended(perturbation, gradient, self.epsilon, step))

        history = train(
            model, data, recipe, seed=self.seed, checkpoint=checkpoint, augmented_transform=perturbed,
            after_step=ascend, state={"perturbation": perturbation}, method=str(self),
            description="universal adversarial training",
        )  # fmt: skip
        found = {"largest_perturbation": float(perturbation.detach().abs().max())}
        return TrainingReport(model, torch.zeros(len(data), dtype=torch.bool), history.to_json(), found)

    def _gradient(self, model: Classifier, images: Tensor, labels: Tensor, perturbation: Tensor) -> Tensor:
        """Of the mean cross-entropy, each image's capped, to the perturbation."""
        moved = perturbation.detach().clone().requires_grad_()
        with evaluating(model):
            losses = F.cross_entropy(model((images + moved).clamp(0, 1)), labels, reduction="none")
        if self.loss_cap is not None:
            losses = losses.clamp_max(self.loss_cap)
        (gradient,) = torch.autograd.grad(losses.mean(), moved)
        return gradient
