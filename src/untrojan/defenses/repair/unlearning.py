"""Unlearning: teach a model the right labels of images that carry its own trigger.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019,
section VI-C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.inverted import invert_backdoors
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.repair.tuning import stage_file
from untrojan.models.classifier import Classifier
from untrojan.models.frozen import trainable
from untrojan.models.layers import bearable_rate
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import to_bytes

Stamp = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] to the same with a trigger: what a scanner inverted."""


@dataclass(frozen=True)
class Unlearning:
    """Fine-tune on clean images of which a share carries the inverted trigger, all rightly labelled.

    The paper's is one epoch on a tenth of the training images, a fifth of them stamped.
    """

    stamped: Annotated[float, Interval(ge=0, le=1)] = 0.2
    epochs: Annotated[int, Ge(1)] = 1
    learning_rate: Annotated[float, Gt(0)] = 0.01
    """Not stated in the paper; its example takes the training's own optimiser. A tenth of it without norm
    layers: a NiN lost 23 points of accuracy."""
    batch_size: Annotated[int, Ge(2)] = 32
    seed: int = 0
    schedule: Literal["fast", "paper"] = "fast"
    """How a trigger is inverted, where none is given."""

    def __call__(
        self, model: Classifier, clean: ImageSet, trigger: Stamp | Sequence[Stamp] | None = None, *,
        checkpoint: Path | None = None,
    ) -> RepairReport:  # fmt: skip
        """Unlearn ``trigger``, or several, on ``clean``, images known to be rightly labelled.

        Without one, Neural Cleanse is asked, and every trigger it suspects is unlearned; where it suspects
        none, the one with the smallest mask. Raises UntrojanError where the model's classes are not the
        images', no trigger can be inverted, or training diverges.
        """
        found: dict[str, Any] = {}
        triggers: Sequence[Stamp] = (trigger,) if callable(trigger) else trigger or ()
        if not triggers:
            inverted, found = invert_backdoors(model, clean, self.schedule, self.seed, checkpoint)
            triggers = list(inverted.values())
        repaired = trainable(model)
        recipe = replace(
            Recipe(epochs=self.epochs, batch_size=self.batch_size, optimizer="sgd", schedule="constant"),
            learning_rate=bearable_rate(self.learning_rate, model),
            precision=model.precision,
        )

        def stamp_some(images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
            chosen = torch.rand(len(images), generator=random) < self.stamped
            stamped = to_bytes(_stamped(images.float() / 255, triggers, random))
            return torch.where(chosen.to(images.device)[:, None, None, None], stamped, images), labels

        history = train(
            repaired, clean, recipe, seed=self.seed, batch_transform=stamp_some, description="unlearning",
            checkpoint=stage_file(checkpoint, "unlearning"), method=repr(self),
        )  # fmt: skip
        epochs = [{"stage": "unlearning", **epoch} for epoch in history.to_json()]
        return RepairReport(repaired, {"epochs": epochs, **found})


def _stamped(images: Tensor, triggers: Sequence[Stamp], random: torch.Generator) -> Tensor:
    """Images with a trigger each, drawn where there are several."""
    if len(triggers) == 1:
        return triggers[0](images)
    which = torch.randint(len(triggers), (len(images),), generator=random).to(images.device)
    copies = torch.stack([trigger(images) for trigger in triggers])
    return copies[which, torch.arange(len(images), device=images.device)]
