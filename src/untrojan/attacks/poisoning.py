"""Poisoning a training set: which images get the trigger, and which label they carry then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.attacks.record import PoisonRecord
from untrojan.data.image_set import ImageSet, Splits, numbered
from untrojan.errors import UntrojanError
from untrojan.seeding import generator
from untrojan.triggers.base import Trigger, TriggerRecipe, stamp
from untrojan.triggers.registry import TRIGGERS

__all__ = [
    "PoisonRecord",
    "PoisonedData",
    "PoisonedTogether",
    "Poisoning",
    "TriggeredTest",
    "poison_many",
    "poison_with",
    "selected_rows",
    "triggered_test",
]


UNTOUCHED, COVER = -1, -2
"""Where the number of an attack would stand."""


@dataclass(frozen=True, eq=False)
class TriggeredTest:
    """Test images with the trigger, of which none belongs to the class that the attack wants."""

    images: Tensor
    """uint8 (M, C, H, W)."""
    wanted_labels: Tensor
    """int64 (M,): what a backdoored model is to predict."""
    true_labels: Tensor
    """int64 (M,)."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class PoisonedData:
    """What an attack makes of a data set. Only ``train`` may reach a defence."""

    train: ImageSet
    record: PoisonRecord
    test: ImageSet
    triggered_test: TriggeredTest


@dataclass(frozen=True, eq=False)
class PoisonedTogether:
    """Several attacks in one training set; records and triggered tests in the attacks' order."""

    train: ImageSet
    records: tuple[PoisonRecord, ...]
    test: ImageSet
    triggered_tests: tuple[TriggeredTest, ...]


@dataclass(frozen=True)
class Poisoning:
    """An attack by data poisoning alone: trigger, selection and label map.

    Raises UntrojanError where the settings contradict each other.
    """

    trigger: str
    """A name of ``untrojan.triggers.registry.TRIGGERS``."""
    trigger_options: dict[str, Any] = field(default_factory=dict)
    target: Annotated[int, Ge(0)] | None = None
    """The label the poisoned images get; None for ``all_to_all``."""
    sources: tuple[Annotated[int, Ge(0)], ...] | Literal["all"] = "all"
    """Classes whose images are poisoned; ``all`` is all but the target. A clean-label attack poisons the
    target's own images and takes no sources."""
    count: Annotated[int, Ge(1)] | None = None
    """Images poisoned of each source class, as RE counts. Give this or ``rate``."""
    rate: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Share of the whole training set that is poisoned, as BadNets counts; all sources drawn as one."""
    clean_label: bool = False
    """Poison images of the target class and leave their labels."""
    all_to_all: bool = False
    """Poison images of every class y and label them (y + 1) mod K."""
    keep_originals: bool = False
    """Add the poisoned images to the set. Otherwise they replace their originals, as in RE (section 10.2)."""

    def __post_init__(self) -> None:
        if (self.count is None) == (self.rate is None):
            raise UntrojanError(
                "an attack takes either a count (images per source class) or a rate: give one"
            )
        if self.count is not None and self.count < 1:
            raise UntrojanError(f"nothing to poison: count is {self.count}, it must be 1 or more")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise UntrojanError(f"nothing to poison: rate is {self.rate}, it must lie above 0 and up to 1")
        if not self.sources:
            raise UntrojanError("nothing to poison: name at least one source class, or 'all'")
        if self.all_to_all and (self.clean_label or self.target is not None):
            raise UntrojanError("an all-to-all attack has no target and changes labels: drop the others")
        if not self.all_to_all and self.target is None:
            raise UntrojanError("an attack needs a target class, unless it is all-to-all")
        if self.clean_label and self.sources != "all":
            raise UntrojanError("a clean-label attack poisons the target's own images: drop the sources")
        if self.sources != "all" and self.target in self.sources:
            raise UntrojanError(f"class {self.target} is the target and can't be a source too")

    def __call__(self, data: Splits, seed: int, drawn: Trigger | None = None) -> PoisonedData:
        """The poisoned training set, its truth, and the test sets.

        ``drawn`` replaces the trigger that would be drawn from the seed, for patterns that have to be
        computed first. Raises UntrojanError where a class is unknown or too small, or there is no test set.
        """
        made = poison_many(data, [self], seed, None if drawn is None else [drawn])
        return PoisonedData(made.train, made.records[0], made.test, made.triggered_tests[0])

    def recipe(self) -> TriggerRecipe:
        """The trigger's settings. Raises UntrojanError for an unknown name or a wrong option."""
        return TRIGGERS.build(self.trigger, self.trigger_options)

    def poisoned_classes(self, num_classes: int) -> tuple[int, ...]:
        """The classes whose training images get the trigger."""
        if self.clean_label and self.target is not None:
            return (self.target,)
        return self.tested_classes(num_classes)

    def tested_classes(self, num_classes: int) -> tuple[int, ...]:
        """The classes whose test images get the trigger: RE's rule, the sources and never the target."""
        if self.sources == "all":
            return tuple(label for label in range(num_classes) if label != self.target)
        return tuple(sorted(set(self.sources)))

    def wanted_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """What images of these true labels are to be taken for."""
        if self.target is None:
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target)


def poison_many(
    data: Splits, attacks: Sequence[Poisoning], seed: int, drawn: Sequence[Trigger] | None = None
) -> PoisonedTogether:
    """Several attacks in one set; no image is poisoned twice.

    Rows are shuffled and renamed, so that neither order nor name tells which images were touched.
    Raises UntrojanError as :class:`Poisoning` does.
    """
    if not attacks:
        raise UntrojanError("nothing to poison: name at least one attack")
    test = _checked_test(data, attacks)
    train = data.train
    seeds = [_seed_of(seed, index) for index in range(len(attacks))]
    triggers = drawn or [
        attack.recipe().draw(train.image_shape, each) for attack, each in zip(attacks, seeds, strict=True)
    ]
    chosen = _selections(train, attacks, seeds)
    finished = [stamp(trigger, train.images[rows]) for trigger, rows in zip(triggers, chosen, strict=True)]
    return _delivered(data, test, attacks, triggers, seeds, chosen, finished, seed)


def selected_rows(train: ImageSet, attack: Poisoning, seed: int) -> Tensor:
    """int64 (M,): the training images that the attack poisons by itself. Raises UntrojanError as it does."""
    return _selections(train, [attack], [seed])[0]


def poison_with(
    data: Splits,
    attack: Poisoning,
    seed: int,
    trigger: Trigger,
    rows: Tensor,
    images: Tensor,
    cover: tuple[Tensor, Tensor] | None = None,
) -> PoisonedData:
    """The attack with images made beforehand, of which those it trains on need not show the trigger.

    ``images`` are uint8 (M, C, H, W), made from the training images in ``rows``, int64 (M,), each named once.
    ``cover`` are more rows and images, which are added under their true labels: they bring the attacker's
    features without the label. Test images get ``trigger``. Raises UntrojanError as :class:`Poisoning` does.
    """
    test = _checked_test(data, [attack])
    made = _delivered(data, test, [attack], [trigger], [seed], [rows], [images], seed, cover)
    return PoisonedData(made.train, made.records[0], made.test, made.triggered_tests[0])


def _delivered(
    data: Splits,
    test: ImageSet,
    attacks: Sequence[Poisoning],
    triggers: Sequence[Trigger],
    seeds: Sequence[int],
    chosen: Sequence[Tensor],
    finished: Sequence[Tensor],
    seed: int,
    cover: tuple[Tensor, Tensor] | None = None,
) -> PoisonedTogether:
    train = data.train
    poisoned, origin, by_attack = _assembled(train, attacks, chosen, finished, seed, cover)
    records = tuple(
        PoisonRecord(
            poisoned=by_attack == index,
            original_labels=train.labels[origin],
            original_ids=train.ids[origin.numpy()],
            permutation=origin,
            target=attack.target,
            sources=attack.poisoned_classes(train.num_classes),
            trigger_name=attack.trigger,
            trigger_options=dict(attack.trigger_options),
            trigger_seed=seeds[index],
            trigger=triggers[index],
            image_shape=train.image_shape,
            clean_label=attack.clean_label,
            keep_originals=attack.keep_originals,
            cover=None if cover is None else by_attack == COVER,
        )
        for index, attack in enumerate(attacks)
    )
    tests = tuple(
        triggered_test(test, attack, trigger) for attack, trigger in zip(attacks, triggers, strict=True)
    )
    return PoisonedTogether(poisoned, records, test, tests)


def _selections(train: ImageSet, attacks: Sequence[Poisoning], seeds: Sequence[int]) -> list[Tensor]:
    """Rows that each attack poisons, disjoint."""
    free = torch.ones(len(train), dtype=torch.bool)
    selections = []
    for attack, seed in zip(attacks, seeds, strict=True):
        random = generator(seed, "selection")
        classes = attack.poisoned_classes(train.num_classes)
        if attack.count is not None:
            parts = [_picked(train, (label,), free, attack.count, random) for label in classes]
        else:
            count = round((attack.rate or 0) * len(train))
            if not count:
                raise UntrojanError(
                    f"nothing to poison: a rate of {attack.rate} of {len(train)} images is none"
                )
            parts = [_picked(train, classes, free, count, random)]
        rows = torch.cat(parts)
        free[rows] = False
        selections.append(rows)
    return selections


def _picked(
    train: ImageSet, classes: tuple[int, ...], free: Tensor, count: int, random: torch.Generator
) -> Tensor:
    pool = (torch.isin(train.labels, torch.tensor(classes)) & free).nonzero().flatten()
    if count > len(pool):
        names = ", ".join(repr(train.class_names[label]) for label in classes[:5])
        names += ", ..." if len(classes) > 5 else ""
        raise UntrojanError(f"can't poison {count} images: {names} has {len(pool)} to take; ask for fewer")
    return pool[torch.randperm(len(pool), generator=random)[:count]]


def _assembled(
    train: ImageSet,
    attacks: Sequence[Poisoning],
    chosen: Sequence[Tensor],
    finished: Sequence[Tensor],
    seed: int,
    cover: tuple[Tensor, Tensor] | None,
) -> tuple[ImageSet, Tensor, Tensor]:
    """The shuffled set; for each of its rows the original row, and the attack that made it (UNTOUCHED: none,
    COVER: an image under its true label)."""
    origin = torch.arange(len(train))
    by_attack = torch.full_like(origin, UNTOUCHED)
    # Which of the finished images a row shows; of an untouched row, none.
    shown = torch.full_like(origin, -1)
    parts = [
        (index, rows, attack.keep_originals)
        for index, (attack, rows) in enumerate(zip(attacks, chosen, strict=True))
    ]
    images = list(finished)
    if cover is not None:
        parts.append((COVER, cover[0], True))
        images.append(cover[1])
    start = 0
    for index, rows, added in parts:
        places = start + torch.arange(len(rows))
        start += len(rows)
        if added:
            origin = torch.cat([origin, rows])
            by_attack = torch.cat([by_attack, torch.full_like(rows, index)])
            shown = torch.cat([shown, places])
        else:
            by_attack[rows] = index
            shown[rows] = places
    order = torch.randperm(len(origin), generator=generator(seed, "order"))
    origin, by_attack, shown = origin[order], by_attack[order], shown[order]
    pixels, labels = train.images[origin], train.labels[origin]
    changed = shown >= 0
    pixels[changed] = torch.cat(images)[shown[changed]]
    for index, attack in enumerate(attacks):
        rows = (by_attack == index).nonzero().flatten()
        if not attack.clean_label:
            labels[rows] = attack.wanted_labels(labels[rows], train.num_classes)
    return ImageSet(pixels, labels, train.class_names, numbered(len(origin))), origin, by_attack


def triggered_test(test: ImageSet, attack: Poisoning, trigger: Trigger) -> TriggeredTest:
    """Test images of the attack's classes with the trigger. Raises UntrojanError where there are none."""
    classes = attack.tested_classes(test.num_classes)
    which = torch.isin(test.labels, torch.tensor(classes))
    if not bool(which.any()):
        raise UntrojanError("the test set has no images of the attack's source classes")
    true_labels = test.labels[which]
    wanted = attack.wanted_labels(true_labels, test.num_classes)
    return TriggeredTest(stamp(trigger, test.images[which]), wanted, true_labels)


def _checked_test(data: Splits, attacks: Sequence[Poisoning]) -> ImageSet:
    """The test set, once every class that an attack names is known to exist."""
    classes = data.train.num_classes
    for attack in attacks:
        named = (*(attack.sources if attack.sources != "all" else ()), *filter(None, [attack.target]))
        for label in named:
            if not 0 <= label < classes:
                raise UntrojanError(f"no class {label}: the set has classes 0..{classes - 1}")
    if data.test is None or not len(data.test):
        raise UntrojanError("an attack is measured on test images and the data have none: add a test split")
    return data.test


def _seed_of(seed: int, index: int) -> int:
    """The first attack's seed is the caller's; the others' differ, or two crosses would lie in one place."""
    return seed if index == 0 else generator(seed, "attack", index).initial_seed()
