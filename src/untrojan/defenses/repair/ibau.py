"""I-BAU: unlearn the perturbation that misleads most, and what its answer to new weights would be.

Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.clean_data import weights_fingerprint
from untrojan.defenses.repair.report import RepairReport
from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.models.frozen import frozen, trainable
from untrojan.seeding import generator
from untrojan.training.gradients import carrying
from untrojan.training.loop import Epoch, train
from untrojan.training.recipe import Recipe

Solver = Literal["fixed_point", "conjugate_gradient"]
Norm = Literal["l2", "linf"]


def implicit_gradients(
    inner: Tensor,
    outer: Tensor,
    variable: Tensor,
    weights: Sequence[Tensor],
    *,
    solver: Solver = "fixed_point",
    iterations: int = 5,
    rate: float = 0.1,
) -> list[Tensor]:
    """What ``weights`` do to ``outer`` through ``variable``, the minimiser of ``inner`` given the weights.

    With H the second derivative of ``inner`` in the variable, -d(d inner / d variable . v) / d weights for
    the v of H v = d outer / d variable (implicit function theorem). ``fixed_point``
    adds up the Neumann series v <- v - rate H v + d outer / d variable, from zero, times ``rate``;
    ``conjugate_gradient`` ends early at a direction of no positive curvature. ``inner`` and ``outer`` are
    scalars on the graph of both; ``outer`` keeps its graph.
    """
    (wanted,) = torch.autograd.grad(outer, variable, retain_graph=True)
    (slope,) = torch.autograd.grad(inner, variable, create_graph=True)

    def curvature(direction: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(slope, variable, direction, retain_graph=True)
        return product

    if solver == "fixed_point":
        solution = torch.zeros_like(wanted)
        for _ in range(iterations):
            solution = solution - rate * curvature(solution) + wanted
        solution = rate * solution
    else:
        solution = conjugate_gradient(curvature, wanted, iterations)
    found = torch.autograd.grad(slope, list(weights), -solution, allow_unused=True, materialize_grads=True)
    return list(found)


def conjugate_gradient(product: Callable[[Tensor], Tensor], wanted: Tensor, iterations: int) -> Tensor:
    """v with ``product(v)`` = ``wanted``, for a symmetric positive definite ``product``."""
    solution, residual = torch.zeros_like(wanted), wanted
    direction, square = residual, residual.square().sum()
    for _ in range(iterations):
        image = product(direction)
        curved = (direction * image).sum()
        if float(curved) <= 0 or float(square) == 0:
            break
        length = square / curved
        solution, residual = solution + length * direction, residual - length * image
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return solution


def projected(perturbation: Tensor, radius: float, norm: Norm) -> Tensor:
    """The nearest perturbation in the ball of ``radius`` about zero."""
    if norm == "linf":
        return perturbation.clamp(-radius, radius)
    shrink: Tensor = (radius / perturbation.norm().clamp_min(1e-12)).clamp_max(1)
    return perturbation * shrink


@dataclass(frozen=True)
class IBAU:
    """Alternate between the perturbation of all images that raises the loss most, and weights that lower it
    for perturbed images, with the perturbation's own dependence on the weights.

    The defaults are the released code's. Against it, perturbed images are clipped to [0, 1], as images are;
    the perturbation is kept in its ball, which the code has commented out; it is found with true labels and
    by a number of steps that does not depend on how many images there are.
    """

    rounds: Annotated[int, Ge(1)] = 5
    radius: Annotated[float, Gt(0)] = 10.0
    """In units of the pixel range."""
    norm: Norm = "l2"
    perturbation_steps: Annotated[int, Ge(1)] = 50
    """Of plain gradient ascent, a batch each. In the code one pass over 5,000 images."""
    perturbation_rate: Annotated[float, Gt(0)] = 10.0
    penalty: Annotated[float, Ge(0)] = 1e-3
    """Of the perturbation's squared l2 norm, in its own objective."""
    perturbed: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """Share of each batch that is perturbed in the weights' objective, one image at least. In the paper all
    are, in the released code one in a hundred."""
    solver: Solver = "fixed_point"
    iterations: Annotated[int, Ge(0)] = 5
    """Of the solver; with 0 the perturbation counts as fixed."""
    rate: Annotated[float, Gt(0)] = 0.1
    """Of the gradient descent whose fixed point the perturbation is."""
    batch_size: Annotated[int, Ge(2)] = 100
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Of Adam."""
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Unlearn on ``clean``, a pass over it a round; in float32, batch norm's statistics as they are.

        Raises UntrojanError as training does.
        """
        repaired = trainable(model)
        recipe = Recipe(epochs=self.rounds, batch_size=self.batch_size, learning_rate=self.learning_rate)
        perturbation = torch.zeros(1, *clean.image_shape, device=model.device)
        # Second derivatives of what is rounded to bfloat16 are noise.
        repaired.precision = "float32"

        def renew(finished: int, _: Epoch | None = None) -> None:
            if finished < self.rounds:
                perturbation.copy_(self.perturbation(repaired, clean, finished))

        if checkpoint is None or not checkpoint.exists():
            renew(0)
        history = train(
            repaired, clean, recipe, seed=self.seed, checkpoint=checkpoint,
            loss=self._loss(perturbation), freeze_statistics=True, after_epoch=renew,
            state={"perturbation": perturbation}, method=f"{self} {weights_fingerprint(model)}",
            description="unlearning",
        )  # fmt: skip
        repaired.precision = model.precision
        return RepairReport(
            repaired, {"epochs": history.to_json(), "perturbation_norm": float(perturbation.norm())}
        )

    def perturbation(self, model: Classifier, clean: ImageSet, number: int) -> Tensor:
        """The perturbation (1, C, H, W) of all of ``clean`` that ``model`` answers worst to."""
        attacked = frozen(model)
        order = torch.randperm(len(clean), generator=generator(self.seed, "perturbation", number))
        batches = order.split(self.batch_size)
        found = torch.zeros(1, *clean.image_shape, device=model.device)
        for step in range(self.perturbation_steps):
            rows = batches[step % len(batches)]
            found.requires_grad_()
            images = to_float(clean.images[rows], model.device)
            objective = self._inner(attacked, images, clean.labels[rows].to(model.device), found)
            (gradient,) = torch.autograd.grad(objective, found)
            found = projected((found - self.perturbation_rate * gradient).detach(), self.radius, self.norm)
        return found

    def _inner(self, model: Classifier, images: Tensor, labels: Tensor, perturbation: Tensor) -> Tensor:
        """What the perturbation minimises."""
        logits = model((images + perturbation).clamp(0, 1))
        return self.penalty * perturbation.square().sum() - F.cross_entropy(logits, labels)

    def _loss(self, fixed: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        def loss(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            perturbation = fixed.detach().clone().requires_grad_()
            chosen = torch.zeros(len(images), 1, 1, 1)
            chosen[torch.randperm(len(images))[: max(1, int(self.perturbed * len(images)))]] = 1
            weights: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
            # No unit dropped: the perturbation answers to the whole network.
            with evaluating(model, gradients_to_weights=True):
                logits = model((images + chosen.to(images) * perturbation).clamp(0, 1))
                outer = F.cross_entropy(logits, labels)
                if self.iterations == 0:
                    return outer, logits
                corrections = implicit_gradients(
                    self._inner(model, images, labels, perturbation), outer, perturbation, weights,
                    solver=self.solver, iterations=self.iterations, rate=self.rate,
                )  # fmt: skip
            return carrying(outer, zip(weights, corrections, strict=True)), logits

        return loss
