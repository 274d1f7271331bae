"""What hardening does to each batch: which triggers it searches for, and which images get them.

:mod:`untrojan.defenses.repair.hardening` says in which order, and has the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.data.augment import collage
from untrojan.data.image_set import ImageSet, concatenate, numbered
from untrojan.data.sampling import some_of_each
from untrojan.defenses.repair.hardening_memory import PairStates, UniversalStates, choose_pairs, promise
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import ANY, Inversion, Problem, invert
from untrojan.inversion.generators import Generator
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import frozen
from untrojan.triggers.base import to_bytes

if TYPE_CHECKING:
    from untrojan.defenses.repair.hardening import Hardening

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


def kinds_of(turns: tuple[Turn, ...]) -> int:
    return 1 + max(turn.memory for turn in turns)


def from_any(clean: ImageSet) -> Tensor:
    """Pairs (K, 2) into each class from all others."""
    return torch.tensor([[ANY, target] for target in range(clean.num_classes)])


def first_of(turns: tuple[Turn, ...], kind: int) -> Turn:
    return next(turn for turn in turns if turn.memory == kind)


def first_searches(turns: tuple[Turn, ...]) -> tuple[Generator, ...]:
    """The first of each kind, in the kinds' order."""
    return tuple(first_of(turns, kind).generator for kind in range(kinds_of(turns)))


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
        self.problems = [first_of(turns, kind).generator.problem(settings.seed) for kind in kinds]
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
                self.model, some_of_each(self.clean, 10, seed, "universal"), from_any(self.clean), problem,
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
