"""From a data set to an infected model: an attack that owns the training, start to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Interval

from untrojan.attacks.poisoning import PoisonedData, Poisoning, TriggeredTest
from untrojan.attacks.record import PoisonRecord
from untrojan.attacks.sdrm import (
    PAPER_RATE,
    PAPER_TARGET,
    PAPER_TRIGGERS,
    Form,
    InfectedSet,
    StatisticalDifferenceReduction,
)
from untrojan.data.image_set import ImageSet, Splits
from untrojan.errors import UntrojanError
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.metrics.mmd import LevelDifference, level_differences
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build_for
from untrojan.models.taps import SDRM_LEVELS, levels_of
from untrojan.training.loop import TrainingHistory
from untrojan.training.recipe import Recipe
from untrojan.triggers.registry import TRIGGERS


@dataclass(frozen=True, eq=False)
class InfectedModel:
    """A backdoored model, what it was trained with, and how well the backdoor works and hides."""

    model: Classifier
    history: TrainingHistory
    record: PoisonRecord
    """In the released form nothing is poisoned for good: it then flags no row."""
    test: ImageSet
    triggered_test: TriggeredTest
    training_images: int
    """Clean and poisoned ones together."""
    benign_accuracy: float
    attack_success_rate: float
    differences: Mapping[str, LevelDifference]
    """At every level of the paper's that the network has, whether or not it was constrained."""

    def metrics(self) -> dict[str, Any]:
        """JSON types, for ``metrics.json``."""
        return {
            "training_images": self.training_images,
            "training_accuracy": self.history.epochs[-1].accuracy,
            "benign_accuracy": self.benign_accuracy,
            "attack_success_rate": self.attack_success_rate,
            "mmd_squared": {level: found.to_json() for level, found in self.differences.items()},
        }


@dataclass(frozen=True)
class Infection:
    """Who gets the trigger in an attack that owns the training.

    The defaults are SDRM's (section 3.3): class 0, from all others, |U| / |D| = 0.1.
    """

    trigger: str
    """``patched``, ``blended``, ``sig``, ``warped`` as the paper sets them, or any trigger's name."""
    trigger_options: dict[str, Any] = field(default_factory=dict)
    """Beside, or in place of, the paper's settings."""
    target: Annotated[int, Ge(0)] = PAPER_TARGET
    sources: tuple[Annotated[int, Ge(0)], ...] | Literal["all"] = "all"
    rate: Annotated[float, Interval(gt=0, le=1)] = PAPER_RATE
    """Poisoned images for each clean one; in the released form, the chance of an image to be poisoned."""

    def poisoning(self) -> Poisoning:
        """The same attack by data alone. Raises UntrojanError for an unknown trigger or option."""
        names = (*PAPER_TRIGGERS, *TRIGGERS.names())
        if self.trigger not in names:
            raise UntrojanError(f"unknown trigger {self.trigger!r}: choose one of {', '.join(names)}")
        known = PAPER_TRIGGERS.get(self.trigger)
        made = Poisoning(
            trigger=known.trigger if known else self.trigger,
            trigger_options={**(known.options if known else {}), **self.trigger_options},
            target=self.target,
            sources=self.sources,
            rate=self.rate,
            keep_originals=True,
        )
        made.recipe()
        return made


def infect(
    data: Splits,
    infection: Infection,
    method: StatisticalDifferenceReduction,
    architecture: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> InfectedModel:
    """Train a backdoored model on ``data`` and measure it on their test images.

    ``checkpoint`` makes the training resumable. Raises UntrojanError for an unknown class, trigger,
    architecture or level, where the data have no test images, and as training does.
    """
    made = infection.poisoning()(data, seed)
    infected, record = infected_set(data.train, made, infection, method.form)
    model = build_for(data.train, architecture, precision=recipe.precision, seed=seed).to(device)
    history = method(model, infected, recipe, seed=seed, checkpoint=checkpoint)
    place = torch.zeros(1, *data.train.image_shape, device=device)
    levels = [level for level in SDRM_LEVELS if level in levels_of(model, place)]
    return InfectedModel(
        model=model,
        history=history,
        record=record,
        test=made.test,
        triggered_test=made.triggered_test,
        training_images=len(infected.train),
        benign_accuracy=benign_accuracy(model, made.test),
        attack_success_rate=attack_success_rate(model, made.triggered_test),
        differences=level_differences(
            model, made.test, made.triggered_test, infection.target, levels, seed=seed
        ),
    )


def infected_set(
    train: ImageSet, made: PoisonedData, infection: Infection, form: Form
) -> tuple[InfectedSet, PoisonRecord]:
    """What SDRM trains on, and the truth about it, from the same attack by data alone.

    ``paper``: the clean set and, beside it, the poisoned images, as yet without their trigger. ``released``:
    the clean set, of which every epoch poisons other images.
    """
    record = made.record
    if form == "released":
        nothing = torch.zeros(len(train), dtype=torch.bool)
        record = replace(
            record,
            poisoned=nothing,
            original_labels=train.labels,
            original_ids=np.asarray(train.ids),
            permutation=torch.arange(len(train)),
            keep_originals=False,
        )
        sources = infection.poisoning().poisoned_classes(train.num_classes)
        infected = InfectedSet(
            train, train.labels, record.trigger, infection.target, None, infection.rate, sources
        )
        return infected, record
    bare = replace(made.train, images=train.images[record.permutation])
    infected = InfectedSet(
        bare, record.original_labels, record.trigger, infection.target, record.poisoned, infection.rate
    )
    return infected, record
