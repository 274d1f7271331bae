"""The distributed backdoor attack (DBA): the attackers of a federation share one trigger among them.

Xie et al., "DBA: Distributed Backdoor Attacks against Federated Learning", ICLR 2020. Each attacker stamps a
strip of the trigger on a part of every local batch and trains longer than the others do; the averaged model
answers to all strips together. Here without the paper's scaling of the attackers' weights, as Wang et al.
(NONE, section 5.4) have it: all clients take part in every round and count alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from untrojan.attacks.poisoning import Poisoning, TriggeredTest, triggered_test
from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.registry import options_of, validated
from untrojan.training.loop import BatchTransform
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import ImageShape, Trigger, stamp
from untrojan.triggers.registry import TRIGGERS, draw_trigger
from untrojan.triggers.strips import PARTS, SMALL_SIDE

AfterDefense = Literal["poisons", "keeps-rate", "stops"]


@dataclass(frozen=True)
class DistributedBackdoor:
    """What the attackers of one federation have agreed on. The defaults are the paper's for CIFAR-10."""

    target: Annotated[int, Ge(0)] = 2
    trigger: str = "strips"
    """A name of ``untrojan.triggers.registry.TRIGGERS``. Strips are dealt out; of any other trigger every
    attacker stamps the whole (the paper's centralised attack)."""
    trigger_options: dict[str, Any] = field(default_factory=dict)
    poisoned: Annotated[int, Ge(1)] = 5
    """Images stamped and relabelled in each local batch: 5 of 64 on CIFAR-10, 20 of 64 on MNIST."""
    epochs: Annotated[int, Ge(1)] = 6
    """Local epochs of an attacker: 6 on CIFAR-10, 10 on MNIST."""
    learning_rate: Annotated[float, Gt(0)] = 0.05
    """Multiplied by .1 after a fifth and again after four fifths of the epochs (rounded to whole ones)."""
    after_defense: AfterDefense = "poisons"
    """What the attackers do once a defence has looked at the model, which no source says: go on as before at
    the learning rate the server asks for, go on at their own, or train honestly from then on."""
    hides: bool = False
    """Report the activations of clean images where a defence asks for those of one's own. Then the server
    never sees the trigger: NONE trusts what clients report."""

    @classmethod
    def for_images(cls, shape: ImageShape, **changes: Any) -> DistributedBackdoor:
        """The paper's settings for images like MNIST's (28 pixels or less a side), else for CIFAR-10's."""
        if min(shape[1:]) > SMALL_SIDE:
            return cls(**changes)
        return cls(**{"poisoned": 20, "epochs": 10, **changes})

    @classmethod
    def chosen(cls, shape: ImageShape, given: Mapping[str, Any]) -> DistributedBackdoor:
        """The paper's settings for such images with those of ``given`` that are not None.

        Raises UntrojanError for an unknown trigger, setting or value.
        """
        defaults = options_of(cls.for_images(shape))
        made = validated(cls, defaults | {k: v for k, v in given.items() if v is not None}, "the attack")
        TRIGGERS.build(made.trigger, made.trigger_options)
        return made

    def part(self, attacker: int, attackers: int, shape: ImageShape, seed: int) -> Trigger:
        """What ``attacker`` (0-based) of ``attackers`` stamps. Strips are dealt in turn: fewer attackers than
        strips carry several, more share. Raises UntrojanError as drawing the trigger does."""
        options = dict(self.trigger_options)
        if self.trigger == "strips":
            TRIGGERS.build(self.trigger, options)
            strips = list(options.get("parts", range(PARTS)))
            options["parts"] = strips[attacker::attackers] or [strips[attacker % len(strips)]]
        return draw_trigger(self.trigger, options, shape, seed)

    def on_batches(self, trigger: Trigger) -> BatchTransform:
        """For the training loop: the first images of every batch get the trigger and the target's label."""

        def transform(images: Tensor, labels: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
            images, labels = images.clone(), labels.clone()
            images[: self.poisoned] = stamp(trigger, images[: self.poisoned])
            labels[: self.poisoned] = self.target
            return images, labels

        return transform

    def stamped(self, images: Tensor, trigger: Trigger, batch_size: int) -> Tensor:
        """uint8 (N, C, H, W): the attacker's images with the trigger on as many as in training."""
        images = images.clone()
        rows = torch.arange(len(images))
        chosen = rows % batch_size < self.poisoned
        images[chosen] = stamp(trigger, images[chosen])
        return images

    def recipe(self, asked: Recipe, after_defense: bool = False) -> Recipe:
        """How an attacker trains where the server asks for ``asked``."""
        if after_defense and self.after_defense != "keeps-rate":
            return replace(asked, epochs=self.epochs)
        at = {round(0.2 * self.epochs), round(0.8 * self.epochs)}
        return replace(
            asked, epochs=self.epochs, learning_rate=self.learning_rate, schedule="steps",
            milestones=tuple(sorted(each for each in at if 0 < each < self.epochs)), decay=0.1,
        )  # fmt: skip

    def triggered_test(self, test: ImageSet, seed: int) -> TriggeredTest:
        """Test images of all classes but the target with the whole trigger.

        Raises UntrojanError for an unknown target, trigger or option.
        """
        if self.target >= test.num_classes:
            raise UntrojanError(f"no class {self.target}: the set has classes 0..{test.num_classes - 1}")
        whole = Poisoning(
            trigger=self.trigger, trigger_options=self.trigger_options, target=self.target, rate=1.0
        )
        return triggered_test(test, whole, whole.recipe().draw(test.image_shape, seed))


@dataclass(frozen=True, eq=False)
class Attacker:
    """One malicious client: the common plan and its own part of the trigger."""

    plan: DistributedBackdoor
    trigger: Trigger
