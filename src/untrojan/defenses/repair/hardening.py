"""Class-distance hardening: train on images that were made to look like another class, rightly labelled.

Tao et al., "Model Orthogonalization: Class Distance Hardening in Neural Networks for Better Security"
(MOTH), S&P 2022, section IV, with the constants of its released code; Tao et al., "DECK: Model Hardening for
Defending Pervasive Backdoors" keeps the procedure and replaces what makes the images.

First a trigger into each class from all others, which tells how near each is. Then, for three steps each, the
pairs of classes with the most to gain: triggers for both ways are found together, stamped on a share of the
pair's images in the batch, labels kept. Triggers set out from those found for the pair before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.augment import collage
from untrojan.data.image_set import ImageSet, concatenate, numbered
from untrojan.data.sampling import some_of_each
from untrojan.defenses.repair.clean_data import epochs_for, weights_fingerprint
from untrojan.defenses.repair.hardening_memory import PairStates, UniversalStates, choose_pairs, promise
from untrojan.defenses.repair.report import RepairReport
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import ANY, Inversion, Problem, Schedule, Shrink, invert
from untrojan.inversion.generators import Generator
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import frozen, trainable
from untrojan.training.adversarial import PGD
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import to_bytes

FEWEST_IMAGES = 5
"""Of each class: fewer make a trigger that fits them alone."""
REPLAYED_AT_ONCE = 16
"""Images: DECK's triggers have half a megabyte each, or two."""
RAMP = 1000
"""Steps after which distances outweigh gains fully in the choice of pairs: a = min(.1 step / 100, 1)."""


@dataclass(frozen=True)
class Turn:
    """How one period searches."""

    generator: Generator
    memory: int = 0
    """Turns that share one set out from each other's triggers, so these must be of one kind."""
    universal: float = 0.0
    """Where it is not 0, triggers are searched for into each class from all others, anew in each period, in
    place of pairs, and this share of all images gets them. What a backdoor answers to is found, not what it
    was made with: one such trigger is not enough."""


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
        self._check(model, clean)
        generator = self.generator(model, clean)
        turns = self.by_turns(generator, clean)
        searches = (*_first_searches(turns), *self.opens(generator, clean))
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
        self._check(model, clean)
        generator = self.generator(model, clean)
        turns = self.by_turns(generator, clean)
        searches = (*_first_searches(turns), *self.opens(generator, clean))
        return self._hardener(model, clean, turns, searches, steps, checkpoint)

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
            self._memory(model, clean, _first_of(turns, kind), kind, periods, found[kind])
            for kind in range(_kinds(turns))
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
            model, some_of_each(clean, 10, seed, "warm-up"), _from_any(clean), generator.problem(seed),
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


def _kinds(turns: tuple[Turn, ...]) -> int:
    return 1 + max(turn.memory for turn in turns)


def _from_any(clean: ImageSet) -> Tensor:
    """Pairs (K, 2) into each class from all others."""
    return torch.tensor([[ANY, target] for target in range(clean.num_classes)])


def _first_of(turns: tuple[Turn, ...], kind: int) -> Turn:
    return next(turn for turn in turns if turn.memory == kind)


def _first_searches(turns: tuple[Turn, ...]) -> tuple[Generator, ...]:
    """The first of each kind, in the kinds' order."""
    return tuple(_first_of(turns, kind).generator for kind in range(_kinds(turns)))


@torch.no_grad()
def universal_effects(
    model: Classifier, sample: ImageSet, generator: Generator, seed: int, found: Inversion
) -> tuple[Tensor, Tensor]:
    """U and the sizes, (K, K) with zero diagonals: what each target's trigger does to each source's images.

    U is (CE before - CE after) / CE before, cross-entropies with the target averaged over the source's images
    first: an image that lies in the target's region already would divide by nothing.
    """
    asked, problem, count = frozen(model), generator.problem(seed), sample.num_classes
    images = to_float(sample.images, model.device)
    labels = sample.labels.to(model.device)
    by_class = F.one_hot(labels, count).float() / sample.class_counts.to(model.device)
    before = -torch.cat([asked(part).log_softmax(1) for part in images.split(512)])
    gains, sizes = torch.zeros(count, count), torch.zeros(count, count)
    for target in range(count):
        parameters = found.parameters[target : target + 1].to(model.device)
        after, moved = [], []
        for part in images.split(512):
            after.append(-asked(problem.embed(parameters, part[None])[0]).log_softmax(1)[:, target])
            moved.append(generator.moved(problem, parameters, part[None])[0])
        start = by_class.T @ before[:, target]
        gains[:, target] = ((start - by_class.T @ torch.cat(after)) / start.clamp_min(1e-6)).cpu()
        sizes[:, target] = (by_class.T @ torch.cat(moved)).cpu()
    return gains.fill_diagonal_(0), sizes.fill_diagonal_(0)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of N images."""

    log_probabilities: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """(N, K)."""
    trusted: Tensor = field(default_factory=lambda: torch.empty(0))
    """float (N,): 1 where the likeliest class is one that the image may be taken for, and 0 elsewhere."""

    @staticmethod
    @torch.no_grad()
    def of(model: Classifier, images: Tensor, *labels: Tensor) -> Answers:
        """Each image may be taken for any of its ``labels``, int64 (N,) each."""
        said = model(images).log_softmax(1)
        likeliest = said.argmax(1)
        return Answers(said, torch.stack([likeliest == right for right in labels]).any(0).float())

    def apart(self, logits: Tensor) -> Tensor:
        """Kullback-Leibler divergence (N,) of what is said now, (N, K), from these."""
        each = F.kl_div(logits.log_softmax(1), self.log_probabilities, log_target=True, reduction="none")
        return each.sum(1)


class Hardener:
    """What happens to each batch: an :data:`~untrojan.training.loop.AugmentedTransform`.

    Its ``tensors`` change with every batch: give them to the training loop.
    """

    def __init__(
        self,
        settings: Hardening,
        model: Classifier,
        clean: ImageSet,
        turns: tuple[Turn, ...],
        memories: Sequence[PairStates | UniversalStates],
        warm_up: Sequence[tuple[Problem, Tensor]],
    ) -> None:
        """``warm_up`` has kinds of triggers, each with parameters (K, ...) into every class, which are
        stamped before all others, in as many steps as there are."""
        self.settings, self.model, self.clean = settings, model, clean
        self.given = frozen(model) if settings.taught or settings.pasted else model
        self.answers = Answers()
        """The given model's for the batch in hand, ..."""
        self.pasted, self.pasted_answers = torch.empty(0), Answers()
        """... the batch with rectangles pasted in, and those for it."""
        self.turns, self.memories, self.warm_up = turns, memories, warm_up
        self.step = torch.zeros((), dtype=torch.int64)
        kinds = range(len(memories))
        self.problems = [_first_of(turns, kind).generator.problem(settings.seed) for kind in kinds]
        """Of each memory's triggers."""
        self.schedules = [settings.schedules(turn.generator) for turn in turns]
        self.average = {
            f"average {name}": value.clone()
            for name, value in model.state_dict().items()
            if settings.averaging and value.is_floating_point()
        }
        """What the repaired model is to be."""

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, by name."""
        remembered = {
            f"memory {place} {name}": value
            for place, memory in enumerate(self.memories)
            for name, value in memory.tensors().items()
        }
        return {"step": self.step, **remembered, **self.average}

    @property
    def turn(self) -> int:
        """The place in ``turns`` of the one whose period it is."""
        return sum(int(memory.periods) for memory in self.memories) % len(self.turns)

    @property
    def warm_up_steps(self) -> int:
        return self.clean.num_classes * len(self.warm_up)

    def __call__(
        self, images: Tensor, labels: Tensor, rows: Tensor, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        step = int(self.step)
        self._remember()
        if self.settings.taught:
            self.answers = Answers.of(self.given, images, labels)
        if self.settings.pasted:
            self.pasted, others = collage(images, random)
            self.pasted_answers = Answers.of(self.given, self.pasted, labels, labels[others])
        if self.settings.adversarial is not None:
            images = self.settings.adversarial(frozen(self.model), images, labels, random)
        if step < self.warm_up_steps:
            stamped = self._stamp_universal(images, labels, step, random)
        else:
            memory, begins = self._in_turn()
            stamped = (
                self._stamp_pairs(memory, images, labels, begins, random)
                if isinstance(memory, PairStates)
                else self._stamp_anew(memory, images, labels, begins, random)
            )
        self.step += 1
        return stamped, labels

    def loss(
        self, model: Classifier, images: Tensor, labels: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A :data:`~untrojan.training.loop.BatchLoss` for the batch that was hardened last."""
        taught, pasted = self.settings.taught, self.settings.pasted
        seen = model(torch.cat([images, self.pasted]) if pasted else images)
        logits = seen[: len(images)]
        each = F.cross_entropy(logits, labels, reduction="none")
        if taught:
            weights = taught * self.answers.trusted
            each = (1 - weights) * each + weights * self.answers.apart(logits)
        if pasted:
            answers = self.pasted_answers
            each = each + pasted * answers.trusted * answers.apart(seen[len(images) :])
        return each.mean(), logits

    def _remember(self) -> None:
        now, decay = self.model.state_dict(), self.settings.averaging
        for name, average in self.average.items():
            average.lerp_(now[name.removeprefix("average ")], 1 - decay)

    def settle(self) -> None:
        """After the last step: close its period, and give the model the averages, where there are any."""
        if int(self.step) > self.warm_up_steps:
            self.memories[self.turns[self.turn].memory].close_period(int(self.step))
        self._remember()
        averages = {name.removeprefix("average "): value for name, value in self.average.items()}
        self.model.load_state_dict(self.model.state_dict() | averages)

    def history(self) -> list[dict[str, float | None]]:
        """One entry for each period and way."""
        seen = [visit for memory in self.memories for visit in memory.history()]
        return sorted(seen, key=lambda visit: visit["step"] or 0)

    def searches(self) -> dict[str, int]:
        """How many ways were searched, and for how many the last search failed.

        Raises UntrojanError where not one ever succeeded.
        """
        seen = self.history()
        failed = sum(visit["after"] is None for visit in seen)
        if seen and not any(memory.succeeded for memory in self.memories):
            raise UntrojanError(
                f"nothing was hardened: none of {failed} searches made images of one class look like "
                "another's; search longer (schedule=paper) or ask for less (flip_fraction=0.5)"
            )
        return {"made": len(seen), "failed": failed}

    def _stamp_universal(self, images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> Tensor:
        """Half of the other classes' images get a target's trigger."""
        place, target = divmod(step, self.clean.num_classes)
        others = (labels != target).nonzero().flatten()
        drawn = torch.randperm(len(others), generator=random)[: len(others) // 2].to(labels.device)
        rows, count = others[drawn], len(self.warm_up)
        mixed = min(self.settings.mixed, count)
        for first in range(mixed):
            problem, triggers = self.warm_up[(place + first * count // mixed) % count]
            images = self._embedded(problem, images, rows[first::mixed], triggers[target])
        return images

    def _in_turn(self) -> tuple[PairStates | UniversalStates, bool]:
        """The memory whose period it is, and whether it begins: then the one before is closed."""
        memory = self.memories[self.turns[self.turn].memory]
        begins = int(memory.left) == 0
        if begins and int(self.step) > self.warm_up_steps:
            memory.close_period(int(self.step))
            memory = self.memories[self.turns[self.turn].memory]
        return memory, begins

    def _stamp_anew(
        self, states: UniversalStates, images: Tensor, labels: Tensor, begins: bool, random: torch.Generator
    ) -> Tensor:
        """A share of the images gets a trigger, each into a class drawn for it."""
        turn = self.turns[self.turn]
        if begins:
            seed = self.settings.seed + int(self.step)
            problem = turn.generator.problem(seed)
            found = invert(
                self.model, some_of_each(self.clean, 10, seed, "universal"), _from_any(self.clean), problem,
                self.schedules[self.turn][1], seed=seed, description="inverting universal triggers",
            )  # fmt: skip
            states.begin_period(found, problem.size(found.parameters), self.settings.period)
        states.left -= 1
        drawn = torch.randperm(len(labels), generator=random)
        rows = drawn[: int(turn.universal * len(labels))]
        out = self._led_astray(images, labels, rows, [turn.memory], random)
        left = torch.ones(len(labels), dtype=torch.bool)
        left[rows] = False
        return self._replay(out, labels, left, random)

    def _stamp_pairs(
        self, states: PairStates, images: Tensor, labels: Tensor, begins: bool, random: torch.Generator
    ) -> Tensor:
        turn = self.turns[self.turn]
        if begins:
            self._choose(states, random)
        problem = self.problems[turn.memory]
        # A way that failed has to be looked for again from afar.
        _, first, later = self.schedules[self.turn]
        schedule = first if begins or not bool(states.solved.all()) else later
        data = self._images_of(states.pairs, images, labels, random)
        found = invert(
            self.model, data, states.pairs.clone(), problem, schedule,
            seed=self.settings.seed + int(self.step), start=states.known(states.pairs),
            description="inverting pairs",
        )  # fmt: skip
        states.keep(found.parameters, self._sizes(turn.generator, problem, data, found), found.solved)
        states.left -= 1
        stamped = torch.zeros(len(labels), dtype=torch.bool)
        for place in found.solved.nonzero().flatten().tolist():
            source, target = states.pairs[place].tolist()
            rows = self._some(labels, source, target, random)
            images = self._embedded(problem, images, rows, found.parameters[place])
            stamped[rows.cpu()] = True
        return self._replay(images, labels, ~stamped, random)

    def _replay(self, images: Tensor, labels: Tensor, left: Tensor, random: torch.Generator) -> Tensor:
        """A share of the images that are ``left`` with earlier triggers of all kinds."""
        rows = left.nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=random)[: int(self.settings.replayed * len(rows))]]
        return self._led_astray(images, labels, rows, range(len(self.memories)), random)

    def _led_astray(
        self, images: Tensor, labels: Tensor, rows: Tensor, kinds: Sequence[int], random: torch.Generator
    ) -> Tensor:
        """``rows`` of the images with triggers of these kinds by turns, each into a class drawn for it."""
        if not len(rows):
            return images
        sources, classes = labels.cpu()[rows], self.clean.num_classes
        targets = (sources + torch.randint(1, classes, (len(rows),), generator=random)) % classes
        pairs, out = torch.stack([sources, targets], 1), images.clone()
        for place, kind in enumerate(kinds):
            mine, their_pairs = rows[place :: len(kinds)], pairs[place :: len(kinds)]
            memory = self.memories[kind]
            for some, part in zip(
                mine.split(REPLAYED_AT_ONCE), their_pairs.split(REPLAYED_AT_ONCE), strict=True
            ):
                some = some.to(images.device)
                parameters = memory.known(part).to(images.device)
                with torch.no_grad():
                    out[some] = self.problems[kind].embed(parameters, images[some, None])[:, 0]
        return out

    def _choose(self, states: PairStates, random: torch.Generator) -> None:
        """The pairs of the period that begins."""
        settings, main_steps = self.settings, int(self.step) - self.warm_up_steps
        promised = promise(states.gains, states.distances, min(main_steps / RAMP, 1.0))
        chosen = choose_pairs(promised, settings.pairs_at_once, settings.explore, random)
        states.begin_period(chosen, settings.period)

    def _images_of(
        self, pairs: Tensor, images: Tensor, labels: Tensor, random: torch.Generator
    ) -> ImageSet:  # fmt: skip
        """The batch's images of the pairs' classes, filled up from the whole set where they are few."""
        wanted = pairs.unique()
        in_batch = torch.isin(labels.cpu(), wanted)
        batch = _as_set(
            to_bytes(images[in_batch.to(images.device)]).cpu(), labels.cpu()[in_batch], self.clean
        )
        more: list[Tensor] = []
        for label in wanted.tolist():
            rows = self.clean.indices_of(label)
            lacking = self.schedules[0][1].images_a_side - int((batch.labels == label).sum())
            more.append(rows[torch.randperm(len(rows), generator=random)[: max(0, lacking)]])
        return concatenate([batch, self.clean.select(torch.cat(more))])

    @torch.no_grad()
    def _sizes(self, generator: Generator, problem: Problem, data: ImageSet, found: Inversion) -> Tensor:
        """Mean movement (A,) of the sources' images."""
        sizes = []
        for (source, _), parameters in zip(found.pairs.tolist(), found.parameters, strict=True):
            images = to_float(data.images[data.indices_of(source)], self.model.device)[None]
            sizes.append(generator.moved(problem, parameters[None].to(images.device), images).mean())
        return torch.stack(sizes).cpu()

    def _some(self, labels: Tensor, source: int, target: int, random: torch.Generator) -> Tensor:
        """Rows of the source's images to be stamped: a share of the smaller class, one at least."""
        rows = (labels == source).nonzero().flatten()
        smaller = min(len(rows), int((labels == target).sum()))
        count = max(1, int(self.settings.stamped * smaller))
        return rows[torch.randperm(len(rows), generator=random)[:count].to(rows.device)]

    @torch.no_grad()
    def _embedded(self, problem: Problem, images: Tensor, rows: Tensor, parameters: Tensor) -> Tensor:
        """Images with the trigger on some rows."""
        if not len(rows):
            return images
        out = images.clone()
        out[rows] = problem.embed(parameters[None].to(images.device), images[rows][None])[0]
        return out


def _as_set(images: Tensor, labels: Tensor, like: ImageSet) -> ImageSet:
    return ImageSet(images, labels, like.class_names, numbered(len(labels)))
