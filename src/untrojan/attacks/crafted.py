"""Attacks that have to compute something before they poison: perturbed images, an encoder, a style.

Computing (:meth:`CraftedAttack.craft`) is slow and leaves tensors; poisoning with them
(:meth:`CraftedAttack.poison`) is fast and exact, so that a stored result makes the same set again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from untrojan.attacks.poisoning import PoisonedData
from untrojan.attacks.record import PoisonRecord
from untrojan.data.image_set import ImageSet, Splits
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.registry import Registry

Surrogate = Literal["none", "all classes", "other classes"]
"""What a model of the attacker's is trained on: nothing, the clean data, or their other classes."""


@dataclass(frozen=True, eq=False)
class Crafted:
    """What an attack computed."""

    tensors: Mapping[str, Tensor]
    """Enough, with the data and the seed, to poison."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was measured on the way, as JSON types."""
    model: Classifier | None = None
    """The attacker's own infected model, where making one is part of the attack."""


class CraftedAttack(ABC):
    """A frozen dataclass of an attack's settings, registered by name in :data:`CRAFTED_ATTACKS`."""

    surrogate: ClassVar[Surrogate] = "all classes"
    """Which model ``craft`` has to be given."""
    delivers_model: ClassVar[bool] = False
    """Whether the attacker makes an infected model, too; who gets it need not train on the set."""

    def __call__(self, data: Splits, seed: int, model: Classifier | None = None) -> PoisonedData:
        """The poisoned set. Raises UntrojanError as :meth:`craft` and
        :class:`~untrojan.attacks.poisoning.Poisoning` do."""
        return self.poison(data, seed, self.craft(data, seed, model).tensors)

    def clean(self, data: Splits) -> ImageSet:
        """What that model is trained on. Raises UntrojanError for classes that the data don't have."""
        return data.train

    @abstractmethod
    def craft(
        self, data: Splits, seed: int, model: Classifier | None = None, scratch: Path | None = None
    ) -> Crafted:
        """Compute. ``model`` is not modified; ``scratch`` is a folder for checkpoints of what takes long.

        Raises UntrojanError for unknown or too small classes, data without test images, a missing model.
        """

    @abstractmethod
    def poison(self, data: Splits, seed: int, tensors: Mapping[str, Tensor]) -> PoisonedData:
        """The poisoned set, its truth and its test sets, from what ``craft`` left."""


CRAFTED_ATTACKS: Registry[CraftedAttack] = Registry(
    "attack",
    {
        "label-consistent": "untrojan.attacks.label_consistent:LabelConsistent",
        "hidden-trigger": "untrojan.attacks.hidden_trigger:HiddenTrigger",
        "invisible": "untrojan.attacks.invisible:InvisibleAttack",
        "dfst-style": "untrojan.attacks.dfst:DetoxifiedStyle",
        "deck-adaptive": "untrojan.attacks.deck_adaptive:DeckAdaptive",
    },
)


def needed(model: Classifier | None, attack: str) -> Classifier:
    """The model that was given. Raises UntrojanError where none was."""
    if model is None:
        raise UntrojanError(f"{attack} perturbs images against a model: give one trained on clean images")
    return model


def truth(attack: CraftedAttack, record: PoisonRecord, crafted: Crafted) -> dict[str, Any]:
    """The poisoned set's record with the attack's settings and findings, as JSON types."""
    described = CRAFTED_ATTACKS.describe(attack)
    return {**record.to_json(), "attack": described, "crafted": dict(crafted.facts)}
