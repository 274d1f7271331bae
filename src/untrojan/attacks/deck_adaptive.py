"""DECK's adaptive attack (section V-E): a pattern that is learned while the model is being hardened.

Tao et al., "DECK: Model Hardening for Defending Pervasive Backdoors". The attacker knows that whoever gets
the model will harden it with DECK. He starts from a model trained on clean data and trains on: the model on
clean and on poisoned images, one step in every few as DECK does, and the pattern over the whole image that
poisons them along with it, for what still leads to the target then and is small. What he delivers is that
model, or the set so poisoned.

Not stated in the paper and chosen here: the size's weight, the pattern's step, and how the steps are shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.attacks.crafted import Crafted, CraftedAttack, needed
from untrojan.attacks.poisoning import PoisonedData, Poisoning, poison_with, selected_rows
from untrojan.data.image_set import ImageSet, Splits
from untrojan.defenses.repair.clean_data import weights_fingerprint
from untrojan.defenses.repair.deck import DECK
from untrojan.defenses.repair.hardener import Hardener
from untrojan.defenses.repair.hardening import Hardening
from untrojan.inversion.engine import Adam
from untrojan.models.classifier import Classifier
from untrojan.models.frozen import trainable
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe
from untrojan.triggers.additive import Additive
from untrojan.triggers.base import stamp


@dataclass(frozen=True)
class DeckAdaptive(CraftedAttack):
    """Poison, optimise the pattern and harden at once. DECK's table V has rates of 0.2 and 0.5."""

    delivers_model = True

    target: Annotated[int, Ge(0)] = 0
    sources: tuple[Annotated[int, Ge(0)], ...] | Literal["all"] = "all"
    count: Annotated[int, Ge(1)] | None = None
    rate: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Share of the whole training set; 0.2 where there is no ``count`` either."""
    epochs: Annotated[int, Ge(1)] = 10
    learning_rate: Annotated[float, Interval(gt=0)] = 0.01
    batch_size: Annotated[int, Ge(2)] = 128
    pattern_rate: Annotated[float, Interval(gt=0)] = 0.01
    """Adam's step, of pixels in [0, 1]."""
    size_weight: Annotated[float, Ge(0)] = 1e-3
    """Weight of the pattern's mean square, of pixels in 0 to 255, beside the cross-entropy."""
    harden_every: Annotated[int, Ge(1)] = 4
    """Of so many steps the first is DECK's as well."""
    encoder: str = "local"
    """As in :class:`~untrojan.defenses.repair.deck.DECK`."""

    def craft(
        self, data: Splits, seed: int, model: Classifier | None = None, scratch: Path | None = None
    ) -> Crafted:
        """``pattern`` float (C, H, W). Facts: its L2 norm over pixels in [0, 1] and its largest change in
        grey levels. The model is the attacker's.

        Raises UntrojanError, besides, as DECK does: for fewer than five images of a class, or where no
        decoder of sufficient quality can be had.
        """
        images = data.train
        rows = selected_rows(images, self._poisoning(), seed)
        victim = trainable(needed(model, "deck-adaptive"))
        # The attacker's loss is the attack's own: there is nothing to be taught by. Nor is there a backdoor
        # yet for the warm-up to search for more than once.
        hardening = DECK(
            encoder=self.encoder, opening=(), mixed=1, taught=0, pasted=0, seed=seed
        )  # fmt: skip
        return self.learned(victim, images, rows, hardening, seed, scratch)

    def learned(
        self,
        victim: Classifier,
        images: ImageSet,
        rows: Tensor,
        hardening: Hardening,
        seed: int = 0,
        scratch: Path | None = None,
    ) -> Crafted:
        """Train ``victim`` in place on ``images``, of which ``rows`` (n,) are poisoned, and harden it."""
        poisoned = torch.zeros(len(images), dtype=torch.bool)
        poisoned[rows] = True
        checkpoint = None if scratch is None else scratch / "adaptive.pt"
        steps = self.epochs * math.ceil(len(images) / self.batch_size)
        hardener = hardening.hardener(victim, images, math.ceil(steps / self.harden_every), checkpoint)
        before = weights_fingerprint(victim)
        learner = _PatternLearner(self, poisoned, hardener, images.image_shape, victim.device)
        recipe = Recipe(
            epochs=self.epochs, batch_size=self.batch_size, optimizer="sgd", precision=victim.precision,
            learning_rate=self.learning_rate, weight_decay=5e-4, schedule="one_cycle",
        )  # fmt: skip
        train(
            victim, images, recipe, seed=seed, checkpoint=checkpoint, description="adaptive attack",
            loss=learner.loss, augmented_transform=learner.prepare, after_step=learner.improve,
            state=learner.tensors() | hardener.tensors(), method=f"{self} {hardening} {before}",
        )  # fmt: skip
        pattern = learner.pattern.detach().cpu()
        facts = {"pattern_norm": float(pattern.norm()), "largest_change": float(255 * pattern.abs().max())}
        return Crafted({"pattern": pattern}, facts, victim)

    def poison(self, data: Splits, seed: int, tensors: Mapping[str, Tensor]) -> PoisonedData:
        attack, trigger = self._poisoning(), Additive(tensors["pattern"])
        rows = selected_rows(data.train, attack, seed)
        return poison_with(data, attack, seed, trigger, rows, stamp(trigger, data.train.images[rows]))

    def _poisoning(self) -> Poisoning:
        rate = 0.2 if self.count is None and self.rate is None else self.rate
        return Poisoning("universal", {}, self.target, self.sources, self.count, rate)


class _PatternLearner:
    """The training loop's hooks, and what they remember from step to step."""

    def __init__(
        self,
        attack: DeckAdaptive,
        poisoned: Tensor,
        hardener: Hardener,
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self.attack, self.poisoned, self.hardener = attack, poisoned, hardener
        self.stepper = Adam(attack.pattern_rate, (0.9, 0.999))
        self.pattern = torch.zeros(shape, device=device)
        self.memory = torch.zeros(self.stepper.memories, *shape, device=device)
        self.steps = torch.zeros((), dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        return {"pattern": self.pattern, "pattern_memory": self.memory, "pattern_steps": self.steps}

    def prepare(
        self, images: Tensor, labels: Tensor, rows: Tensor, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Clean images hardened in every few steps; poisoned ones labelled with the target."""
        clean = ~self._which(rows, images)
        images, labels = images.clone(), labels.clone()
        if int(self.steps) % self.attack.harden_every == 0 and bool(clean.any()):
            images[clean], _ = self.hardener(images[clean], labels[clean], rows[clean.cpu()], random)
        labels[~clean] = self.attack.target
        return images, labels

    def loss(self, model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, poisoned images with the pattern, and the pattern's weighted mean square."""
        self.pattern.requires_grad_(True)
        which = self._which(rows, images)[:, None, None, None]
        logits = model(torch.where(which, Additive(self.pattern)(images), images))
        size = (255 * self.pattern).square().mean()
        return F.cross_entropy(logits, labels) + self.attack.size_weight * size, logits

    @torch.no_grad()
    def improve(self, model: Classifier) -> None:
        """The pattern's own step, on the gradients of the loss just stepped on."""
        gradient = self.pattern.grad
        self.pattern.grad = None
        self.pattern.requires_grad_(False)
        if gradient is not None and bool(gradient.isfinite().all()):
            one = torch.ones(1, device=gradient.device)
            moved, memory = self.stepper(
                self.pattern[None], gradient[None], self.memory[None], one, self.steps[None].to(one.device)
            )
            self.pattern.copy_(moved[0])
            self.memory.copy_(memory[0])
        self.steps += 1

    def _which(self, rows: Tensor, like: Tensor) -> Tensor:
        return self.poisoned[rows.cpu()].to(like.device)
