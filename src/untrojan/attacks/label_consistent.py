"""Label-consistent backdoors (Turner, Tsipras & Madry 2019): poisoned images that look like their label.

Images of the target class are first perturbed so that a model no longer knows them (section 4.2 there), and
only then get the trigger: whoever trains on them has little but the trigger to learn their label by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.attacks.crafted import Crafted, CraftedAttack, needed
from untrojan.attacks.poisoning import PoisonedData, Poisoning, poison_with, selected_rows
from untrojan.data.image_set import Splits
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating, predictions_of, to_float
from untrojan.progress import task
from untrojan.seeding import generator
from untrojan.triggers.base import stamp, to_bytes

BATCH = 256


@dataclass(frozen=True)
class LabelConsistent(CraftedAttack):
    """Adversarial perturbation, then the trigger; labels kept, originals replaced.

    DECK's Clean Label attack is ``target=3`` with a 2x2 patch at the top left on half of that class; the
    authors' tool has the default 3x3 patch at the bottom right. Perturbations transfer best from an
    adversarially trained model (section 4.2.2), which any model that ``craft`` is given may be.
    """

    target: Annotated[int, Ge(0)] = 0
    trigger: str = "patch"
    trigger_options: dict[str, Any] = field(default_factory=dict)
    share: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Of the target class's training images, as the authors' tool counts."""
    norm: Literal["linf", "l2"] = "linf"
    radius: Annotated[float, Interval(gt=0, le=100_000)] = 8.0
    """In units of 1/255. The tool's data sets ``inf_8`` and ``two_1200`` are 8 and 1200 of these."""
    steps: Annotated[int, Interval(ge=1, le=100_000)] = 100
    step_size: Annotated[float, Interval(gt=0)] | None = None
    """In units of 1/255, along the gradient's sign or, for ``l2``, its direction. Where none is given: 1.5
    of a radius of 8, and as much of any other."""

    def craft(
        self, data: Splits, seed: int, model: Classifier | None = None, scratch: Path | None = None
    ) -> Crafted:
        """``rows`` int64 (M,), and ``images`` uint8 (M, C, H, W), perturbed but without the trigger."""
        model = needed(model, "label-consistent")
        rows = selected_rows(data.train, self._poisoning(data), seed)
        images, labels = data.train.images[rows], data.train.labels[rows]
        step = self.radius * 1.5 / 8 if self.step_size is None else self.step_size
        made = perturbed(
            model, images, labels, norm=self.norm, radius=self.radius / 255, step=step / 255,
            steps=self.steps, seed=seed,
        )  # fmt: skip
        known = [float((predictions_of(model, each) == labels).float().mean()) for each in (images, made)]
        facts = {"recognised_before": known[0], "recognised_after": known[1]}
        return Crafted({"rows": rows, "images": made}, facts)

    def poison(self, data: Splits, seed: int, tensors: Mapping[str, Tensor]) -> PoisonedData:
        attack = self._poisoning(data)
        trigger = attack.recipe().draw(data.train.image_shape, seed)
        images = stamp(trigger, tensors["images"])
        return poison_with(data, attack, seed, trigger, tensors["rows"], images)

    def _poisoning(self, data: Splits) -> Poisoning:
        if self.target >= data.train.num_classes:
            raise UntrojanError(
                f"no class {self.target}: the set has classes 0..{data.train.num_classes - 1}"
            )
        count = round(self.share * len(data.train.indices_of(self.target)))
        return Poisoning(self.trigger, self.trigger_options, self.target, count=count, clean_label=True)


def perturbed(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Literal["linf", "l2"] = "linf",
    radius: float,
    step: float,
    steps: int,
    seed: int = 0,
) -> Tensor:
    """uint8 images (N, C, H, W) within ``radius`` of ``images`` that ``model`` takes for ``labels`` least.

    ``radius`` and ``step`` are in units of the pixel range. The bound holds for the stored bytes: for
    ``l2`` their differences are rounded towards zero. Random starts depend on the seed and the image's place
    among ``images``. ``model`` is in evaluation mode meanwhile, and is left as it was.
    """
    from untrojan.training.adversarial import pgd

    batches = []
    with evaluating(model), task("perturbing", len(images), "images") as bar:
        for index, batch in enumerate(images.split(BATCH)):
            pixels = to_float(batch, model.device)
            truth = labels[index * BATCH :][: len(batch)].to(model.device)
            random = generator(seed, "perturbation", index)
            if norm == "linf":
                found = pgd(model, pixels, truth, epsilon=radius, step=step, steps=steps, random=random)
                batches.append(to_bytes(found).cpu())
            else:
                found = pgd_l2(model, pixels, truth, radius, step, steps, random)
                change = ((found - pixels) * 255).trunc()
                batches.append(to_bytes(pixels + change / 255).cpu())
            bar.advance(len(batch))
    return torch.cat(batches)


def pgd_l2(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    radius: float,
    step: float,
    steps: int,
    random: torch.Generator | None = None,
) -> Tensor:
    """Images within ``radius`` in L2, and within [0, 1], that raise the cross-entropy of ``labels``.

    ``images`` are float (N, C, H, W) in [0, 1]; ``radius`` and ``step`` in units of the pixel range. Each
    step goes ``step`` along the gradient and back onto the ball. The start is drawn uniformly from the ball
    by ``random``, a generator on the CPU, or is ``images`` without one.
    """
    change = torch.zeros_like(images)
    if random is not None:
        direction = torch.randn(images.shape, generator=random).to(images)
        # In D dimensions the D-th root of a uniform number is how far a uniform point lies out.
        far = torch.rand(len(images), generator=random).to(images) ** (1 / images[0].numel())
        change = _scaled_to(direction, far * radius).clamp(-images, 1 - images)
    for _ in range(steps):
        change = change.detach().requires_grad_()
        loss = F.cross_entropy(model(images + change), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, change)
        moved = change.detach() + _scaled_to(gradient, images.new_full((len(images),), step))
        size = moved.flatten(1).norm(dim=1)
        # Clipping to the pixel range only shortens the change: the bound still holds.
        change = _scaled_to(moved, size.clamp_max(radius)).clamp(-images, 1 - images)
    return (images + change).detach().clamp(0, 1)


def _scaled_to(vectors: Tensor, lengths: Tensor) -> Tensor:
    """(N, ...) each at its length (N,); the zero vector stays."""
    sizes = vectors.flatten(1).norm(dim=1).clamp_min(1e-12)
    scaled: Tensor = vectors * (lengths / sizes).view(-1, *[1] * (vectors.ndim - 1))
    return scaled
