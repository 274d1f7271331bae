"""Class-distance hardening: train on images that were made to look like another class, rightly labelled.

Tao et al., "Model Orthogonalization: Class Distance Hardening in Neural Networks for Better Security"
(MOTH), S&P 2022, section IV, with the constants of its released code; Tao et al., "DECK: Model Hardening for
Defending Pervasive Backdoors" keeps the procedure and replaces what makes the images.

First a trigger into each class from all others, which tells how near each is. Then, for three steps each, the
pairs of classes with the most to gain: triggers for both ways are found together, stamped on a share of the
pair's images in the batch, labels kept. Triggers set out from those found for the pair before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from untrojan.data.image_set import ImageSet
from untrojan.data.sampling import some_of_each
from untrojan.defenses.repair.clean_data import epochs_for, weights_fingerprint
from untrojan.defenses.repair.hardener import Hardener, Turn, first_of, first_searches, from_any, kinds_of
from untrojan.defenses.repair.hardening_memory import PairStates, UniversalStates, universal_effects
from untrojan.defenses.repair.report import RepairReport
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import Inversion, Schedule, Shrink, invert
from untrojan.inversion.generators import Generator
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.models.classifier import Classifier
from untrojan.models.frozen import trainable
from untrojan.training.adversarial import PGD
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe

FEWEST_IMAGES = 5
"""Of each class: fewer make a trigger that fits them alone."""


@dataclass(frozen=True)
class Hardening:
    """MOTH's loop over any :class:`~untrojan.inversion.generators.Generator`."""

    steps: Annotated[int, Ge(1)] = 300
    """Training steps after the warm-up, at least: the last epoch is finished. Two epochs of the whole
    training set in the released code; of the papers' 5 % that would visit a quarter of ten classes' pairs."""
    period: Annotated[int, Ge(1)] = 3
    """Steps that pairs are kept for."""
    pairs_at_once: Annotated[int, Ge(1)] = 1
    """Disjoint pairs hardened in each step, all in one batch of the inversion. The papers' 1; many classes
    have more pairs than there are steps."""
    explore: Annotated[float, Interval(ge=0, le=1)] = 0.3
    """How often a pair is drawn at random."""
    stamped: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Share of the smaller class's images in the batch, but at least one image, that get a trigger either
    way: distance is bought with accuracy. MOTH's code has a tenth and goes through the whole training set; of
    128 images of ten classes that is a single one, and as few steps as a few clean images allow leave a patch
    as it was. Not stated in DECK's paper."""
    replayed: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of the other images of the batch that get what was found before for their class and another: a
    search takes a hundred times as long as a training step, and leaves most of the batch as it was. Ours; not
    in the papers."""
    averaging: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """The repaired model's weights and statistics are averages over the steps, each weighing so much of what
    the next one weighs; 0 takes the last as they are. From step to step attack success swings by tens of
    points. Ours."""
    taught: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Weight, in the loss, of the Kullback-Leibler divergence from what the given model says of the images
    before they get triggers; the rest is the labels' cross-entropy. Few images teach less than the model
    knows, so that a higher rate of training can be borne. Of images that it takes for another class the model
    teaches nothing: that may be its backdoor speaking. Ours."""
    pasted: Annotated[float, Ge(0)] = 0.0
    """Weight, beside all that, of the same divergence for images without triggers that have a rectangle of
    another one pasted in: few images in many combinations teach more of what the model knows. What it takes
    for neither image's class teaches nothing. Ours."""
    mixed: Annotated[int, Ge(1)] = 1
    """Kinds of triggers, of all that the warm-up searched for, in one of its steps: into one class, each on
    its part of the images. As many steps are taken either way. 1 stamps one kind for each class in turn, then
    the next: one that answers to a backdoor has a part in the first steps or the last ones alone, and between
    them it comes back. With too many, none has images enough to hold it down. Ours."""
    schedule: Literal["fast", "paper"] = "fast"
    """Steps and images of each inversion; see :meth:`schedules`."""
    flip_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.9
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """The released Keras code's; the PyTorch code has a tenth."""
    rate_schedule: Literal["constant", "one_cycle"] = "constant"
    """``one_cycle`` climbs to the learning rate and falls to nothing: what a high rate costs in accuracy is
    won back while it falls. Ours."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    batch_size: Annotated[int, Ge(2)] = 128
    crop_padding: Annotated[int, Ge(0)] = 0
    flip: bool = False
    freeze_statistics: bool = False
    """Leave batch norm's running statistics as they are. The released PyTorch code does from the first
    inversion on, which leaves its model in evaluation mode; its authors' Keras code does not."""
    adversarial: PGD | None = None
    """For adversarially trained models, or hardening would unlearn their robustness: batches are perturbed
    before triggers are found for them and stamped. The released code's for CIFAR-10 is 7 steps of 2/255
    within 8/255, for SVHN and GTSRB 8 of 0.005 within 0.03, for LISA 8 of 0.02 within 0.1."""
    seed: int = 0
    fast_steps: ClassVar[tuple[int, int, int]] = (200, 60, 20)
    """Of the fast schedule's searches: in the warm-up, for a pair's first step and for its later ones."""

    def generator(self, model: Classifier, clean: ImageSet) -> Generator:
        """What makes one class look like another."""
        raise NotImplementedError

    def by_turns(self, generator: Generator, clean: ImageSet) -> tuple[Turn, ...]:
        """Searches that take turns from period to period."""
        return (Turn(generator),)

    def opens(self, generator: Generator, clean: ImageSet) -> tuple[Generator, ...]:
        """Searches of the warm-up besides the first one of each kind: the given model answers to a backdoor
        as no later one does, and a single search may miss it."""
        return ()

    def rate(self, model: Classifier) -> float:
        """The learning rate for ``model``."""
        return self.learning_rate

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Harden a copy of ``model`` with ``clean``, images known to be rightly labelled.

        The history holds "epochs", and "visits": for each period and way the trigger's size before and after,
        None where the last search failed. Raises UntrojanError for fewer than five images of a class, where
        the model's classes are not the images', where training diverges or leaves less than half of the
        accuracy on ``clean``, or where no search ever made one class look like another: that is no hardening.
        """
        generator, turns, searches = self._searches(model, clean)
        warm_up = clean.num_classes * len(searches)
        epochs = epochs_for(warm_up + self.steps, len(clean), self.batch_size)
        recipe = Recipe(
            epochs=epochs, batch_size=self.batch_size, optimizer="sgd", learning_rate=self.rate(model),
            weight_decay=self.weight_decay, schedule=self.rate_schedule, crop_padding=self.crop_padding,
            flip=self.flip, precision=model.precision,
        )  # fmt: skip
        steps = epochs * -(-len(clean) // self.batch_size)
        repaired = trainable(model)
        hardener = self._hardener(repaired, clean, turns, searches, steps, checkpoint)
        history = train(
            repaired, clean, recipe, seed=self.seed, checkpoint=checkpoint, description="hardening",
            augmented_transform=hardener, loss=hardener.loss,
            freeze_statistics=self.freeze_statistics, state=hardener.tensors(),
            method=f"{self} {weights_fingerprint(model)}",
        )  # fmt: skip
        hardener.settle()
        self._check_survived(model, repaired, clean)
        told = {"visits": hardener.history(), "searches": hardener.searches(), **self.told(generator)}
        return RepairReport(repaired, {"epochs": history.to_json(), **told})

    def hardener(
        self, model: Classifier, clean: ImageSet, steps: int, checkpoint: Path | None = None
    ) -> Hardener:
        """What a training that takes its batches through it hardens ``model`` with, in ``steps`` of its own.

        The model is looked at as it is now, and whenever a batch comes. Raises UntrojanError as calling does.
        """
        _, turns, searches = self._searches(model, clean)
        return self._hardener(model, clean, turns, searches, steps, checkpoint)

    def _searches(
        self, model: Classifier, clean: ImageSet
    ) -> tuple[Generator, tuple[Turn, ...], tuple[Generator, ...]]:
        """The generator, the searches of the periods, and all those of the warm-up."""
        self._check(model, clean)
        generator = self.generator(model, clean)
        turns = self.by_turns(generator, clean)
        return generator, turns, (*first_searches(turns), *self.opens(generator, clean))

    def _hardener(
        self,
        model: Classifier,
        clean: ImageSet,
        turns: tuple[Turn, ...],
        searches: tuple[Generator, ...],
        steps: int,
        checkpoint: Path | None,
    ) -> Hardener:
        periods = max(1, -(-(steps - clean.num_classes * len(searches)) // self.period))
        found = [
            self._universal(model, clean, each, place, checkpoint) for place, each in enumerate(searches)
        ]
        memories = [
            self._memory(model, clean, first_of(turns, kind), kind, periods, found[kind])
            for kind in range(kinds_of(turns))
        ]
        warm_up = [
            (each.problem(self.seed), inversion.parameters)
            for each, inversion in zip(searches, found, strict=True)
        ]
        return Hardener(self, model, clean, turns, memories, warm_up)

    def told(self, generator: Generator) -> dict[str, Any]:
        """What else the history says."""
        return {}

    def schedules(self, generator: Generator) -> tuple[Schedule, Schedule, Schedule]:
        """Of the warm-up, of a pair's first step and of its later ones.

        ``paper``: 500, 200 and 50 steps of 32 images a step in the warm-up and 16 a way after. ``fast``:
        ``fast_steps`` of 12 and 8. A flip fraction of .99 in the warm-up; the later steps' cost ten times the
        first's.
        """
        paper = self.schedule == "paper"
        universal, first, later = (500, 200, 50) if paper else self.fast_steps

        def of(steps: int, images: int, flips: float, cost: float) -> Schedule:
            # The released code looks at every step; a step of few images tells little.
            look = 1 if paper else 2
            shrink = Shrink(cost, look_every=look, patience=10 if paper else 3, give_up=steps)
            return Schedule(generator.stepper, images, flips, most_steps=steps, shrink=shrink)

        cost = generator.cost
        return (
            of(universal, 32 if paper else 12, 0.99, cost),
            of(first, 16 if paper else 8, self.flip_fraction, cost),
            of(later, 16 if paper else 8, self.flip_fraction, 10 * cost),
        )

    def _check(self, model: Classifier, clean: ImageSet) -> None:
        least = int(clean.class_counts.argmin())
        count = int(clean.class_counts[least])
        if count < FEWEST_IMAGES:
            raise UntrojanError(
                f"hardening needs at least {FEWEST_IMAGES} clean images of every class: "
                f"{clean.class_names[least]!r} has {count}"
            )
        if model.num_classes != clean.num_classes:
            raise UntrojanError(
                f"the model has {model.num_classes} outputs and the data have {clean.num_classes} classes: "
                "they must be as many"
            )

    def _check_survived(self, model: Classifier, repaired: Classifier, clean: ImageSet) -> None:
        before, after = benign_accuracy(model, clean), benign_accuracy(repaired, clean)
        if after < before / 2:
            raise UntrojanError(
                f"hardening ruined the model: of the clean images it had {before:.1%} right and has "
                f"{after:.1%}; lower the learning rate (learning_rate={self.learning_rate / 10:g})"
            )

    def _universal(
        self, model: Classifier, clean: ImageSet, generator: Generator, place: int, checkpoint: Path | None
    ) -> Inversion:
        """The warm-up's search at that place: triggers for all classes at once, on ten images of each."""
        seed, number = self.seed + place, f"-{place}" if place else ""
        kept = (
            None
            if checkpoint is None
            else checkpoint.with_name(f"universal{number}-{checkpoint.stem}.safetensors")
        )
        return invert(
            model, some_of_each(clean, 10, seed, "warm-up"), from_any(clean), generator.problem(seed),
            self.schedules(generator)[0], seed=seed, checkpoint=kept,
            description="inverting universal triggers",
        )  # fmt: skip

    def _memory(
        self, model: Classifier, clean: ImageSet, turn: Turn, kind: int, periods: int, found: Inversion
    ) -> PairStates | UniversalStates:
        """Of a kind of trigger, with what the warm-up found."""
        seed = self.seed + kind
        if turn.universal:
            sizes = turn.generator.problem(seed).size(found.parameters)
            return UniversalStates(found.parameters, sizes, periods)
        sample = some_of_each(clean, 10, seed, "warm-up")
        gains, sizes = universal_effects(model, sample, turn.generator, seed, found)
        return PairStates(gains, sizes, found.parameters, self.pairs_at_once, periods)
