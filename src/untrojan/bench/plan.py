"""Plan files: which attacks, defences, data, nets and seeds, and which tables are made of them.

A plan is TOML. It is checked in full before anything runs, and what is wrong is reported with the file, the
key, and what is allowed there.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from untrojan.bench.measures import MEASURES
from untrojan.bench.published import PUBLISHED
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.attacks.crafted import CraftedAttack
    from untrojan.attacks.infect import Infection
    from untrojan.attacks.poisoning import Poisoning
    from untrojan.attacks.sdrm import StatisticalDifferenceReduction
    from untrojan.training.recipe import Recipe

LARGEST_PLAN = 2**20
"""Bytes."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9+.=-]*$", max_length=64)]
"""Names become file names: letters, digits and ``+ . = -``."""
Axis = Literal["data", "net", "attack", "defense", "seed"]
Patterns = list[str]
Class = Annotated[int, Field(ge=0)] | str
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        # pydantic says that a key is not allowed, but not which ones are.
        if isinstance(given, dict):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}: choose one of {', '.join(cls.model_fields)}")
        return given


class DataEntry(_Strict):
    source: str | None = None
    """A known name or a path; the entry's own name where it is left out."""
    size: Annotated[int, Field(ge=8, le=1024)] | None = None
    train_per_class: Count | None = None
    """Keep at most so many training images of each class, drawn once."""
    test_per_class: Count | None = None


class NetEntry(_Strict):
    architecture: str
    victim: str
    """The recipe, of this plan or a preset's name, of the model that is attacked, and of retraining."""
    probe: str
    """The recipe of the defender's own classifier."""
    second_probe: str | None = None
    """The recipe of another one that the defender asks as well."""
    published: str | None = None
    """The net's name in the published figures; the architecture where it is left out."""


class SdrmEntry(_Strict):
    """A model infected by whoever trained it; see :mod:`untrojan.attacks.infect`."""

    trigger: str
    """``patched``, ``blended``, ``sig``, ``warped`` as the paper has them, or any trigger's name."""
    trigger_options: dict[str, Any] = {}
    target: Annotated[int, Field(ge=0)] | None = None
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    strength: Annotated[float, Field(ge=0)] = 0.3
    """Lambda; 0 is regular backdoor training."""
    levels: list[str] = ["s1", "s2", "s3"]
    form: Literal["paper", "released"] = "paper"
    kernel: str = "GMK2"

    def infection(self) -> Infection:
        """Who gets the trigger. Raises UntrojanError for an unknown trigger or option."""
        from untrojan.attacks.infect import Infection
        from untrojan.registry import validated

        fields = ("trigger", "trigger_options", "target", "rate")
        given = {key: value for key in fields if (value := getattr(self, key)) is not None}
        made = validated(Infection, given, "sdrm")
        made.poisoning()
        return made

    def method(self) -> StatisticalDifferenceReduction:
        """How the model is trained. Raises UntrojanError for a wrong option."""
        from untrojan.attacks.sdrm import StatisticalDifferenceReduction
        from untrojan.registry import validated

        fields = ("strength", "form", "kernel")
        given = {key: getattr(self, key) for key in fields} | {"levels": tuple(self.levels)}
        return validated(StatisticalDifferenceReduction, given, "sdrm")


class FederatedEntry(_Strict):
    """Clients who train one model together, some of them attackers; see :mod:`untrojan.attacks.distributed`.

    An honest client trains by the net's ``victim`` recipe in every round.
    """

    rounds: Count
    clients: Annotated[int, Field(ge=1, le=10_000)] = 10
    malicious: Annotated[int, Field(ge=0)] = 4
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Of the Dirichlet split; images are dealt out at random where it is left out."""
    weighting: Literal["equal", "images"] = "equal"
    expelled_at: Annotated[float, Field(gt=0)] = 0.1
    """Of its images dropped, the share from which on a client is left out; above 1, nobody is."""
    attack: dict[str, Any] = {}
    """Settings of the distributed backdoor; the rest is the paper's for images of the data's size."""

    @model_validator(mode="after")
    def _enough(self) -> FederatedEntry:
        if self.malicious > self.clients:
            raise ValueError(f"{self.malicious} malicious clients of {self.clients} can't be")
        return self

    def check(self) -> None:
        """Raises UntrojanError for an unknown setting of the attack."""
        from untrojan.attacks.distributed import DistributedBackdoor

        DistributedBackdoor.chosen((3, 32, 32), self.attack)


class AttackEntry(_Strict):
    named: str | None = None
    """One of RE's attacks (``A-3SC``, ``gtsrb``, ...); what follows below overrides its settings."""
    clean: bool = False
    """No attack: a control."""
    sdrm: SdrmEntry | None = None
    """An attacker who trains the model; ``exposure`` defences are asked about it."""
    federated: FederatedEntry | None = None
    """Attackers among the clients of a federation. Defended by nothing or by training = "none"."""
    method: str | None = None
    """An attack that computes before it poisons, such as ``label-consistent``; what follows below and its
    dataclass has too is set there."""
    options: dict[str, Any] | None = None
    """The other settings of ``method``."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Multiplies a named attack's count."""
    seed_offset: int = 0
    """Added to the cell's seed, so that several controls under one seed differ."""
    published: str | None = None
    """The attack's name in the published figures, where it is not its own."""
    trigger: str | None = None
    trigger_options: dict[str, Any] | None = None
    target: Class | None = None
    sources: list[Class] | Literal["all"] | None = None
    count: Count | None = None
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    clean_label: bool | None = None
    all_to_all: bool | None = None
    keep_originals: bool | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> AttackEntry:
        by_trigger = self.named is None and self.method is None and self.trigger is not None
        kinds = [each is not None for each in (self.named, self.method, self.sdrm, self.federated)]
        if sum([self.clean, by_trigger, *kinds]) != 1:
            raise ValueError(
                "give one of clean = true, named = an attack's name, trigger = a trigger's, "
                "method = that of an attack that computes, sdrm = {...}, or federated = {...}"
            )
        if self.options is not None and self.method is None:
            raise ValueError("options are those of a method: name it, or see trigger_options")
        return self

    def crafted(self, class_index: Callable[[Class], int] | None = None) -> CraftedAttack:
        """The attack that ``method`` names; ``class_index`` as in :meth:`poisoning`."""
        from untrojan.attacks.crafted import CRAFTED_ATTACKS
        from untrojan.triggers.registry import TRIGGERS

        number = class_index or stand_in
        given = dict(self.options or {})
        for key in ("trigger", "trigger_options", "target", "sources", "count", "rate", "keep_originals"):
            value = getattr(self, key)
            if value is not None:
                given[key] = value
        for key in ("clean_label", "all_to_all"):
            if getattr(self, key) is not None:
                raise UntrojanError(f"{self.method} takes no {key}")
        if "target" in given:
            given["target"] = number(given["target"])
        if isinstance(given.get("sources"), list):
            given["sources"] = tuple(number(each) for each in given["sources"])
        made = CRAFTED_ATTACKS.build(str(self.method), given)
        if (trigger := getattr(made, "trigger", None)) is not None:
            TRIGGERS.build(trigger, getattr(made, "trigger_options", {}))
        return made

    def poisoning(self, class_index: Callable[[Class], int] | None = None) -> Poisoning:
        """The attack. ``class_index`` turns names of classes into numbers; without it they only stand in."""
        from untrojan.attacks.poisoning import Poisoning
        from untrojan.attacks.reverse_engineering_attacks import named_attack
        from untrojan.registry import validated
        from untrojan.triggers.registry import TRIGGERS

        number = class_index or stand_in
        fields = [field.name for field in dataclasses.fields(Poisoning)]
        given = {key: value for key in fields if (value := getattr(self, key, None)) is not None}
        if "target" in given:
            given["target"] = number(given["target"])
        if isinstance(given.get("sources"), list):
            given["sources"] = tuple(number(each) for each in given["sources"])
        if self.named is not None:
            base = named_attack(self.named, self.scale)
            given = {field: getattr(base, field) for field in fields} | given
            if self.rate is not None:
                given["count"] = None
        attack = validated(Poisoning, given, f"attack {self.named or self.trigger!r}")
        TRIGGERS.build(attack.trigger, attack.trigger_options)
        return attack


class ProbeEntry(_Strict):
    """A net that a cleanser looks through, where it is not of the victim's kind."""

    architecture: str
    recipe: str
    """One of this plan or a preset's name."""


class ExposureEntry(_Strict):
    """How a detector is asked about an infected model; see :mod:`untrojan.metrics.exposure`."""

    clean: Annotated[int, Field(ge=10)] = 500
    ratio: Annotated[float, Field(gt=0)] = 1.0
    trusted_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the clean training images, known to the defender."""
    trusted_from: Literal["training", "test"] = "training"
    """``test``: as many that the model has not seen, set aside from the test images and not asked about."""
    trusted_as: Literal["labelled", "predicted"] = "labelled"
    """What these count as: what they show, or what the model takes them for, as the images in question do."""


class PruningEntry(_Strict):
    """Prune an infected model by its own trigger; see :mod:`untrojan.metrics.pruning`."""

    step: Annotated[float, Field(gt=0, le=1)] = 0.05
    images: Count = 200
    """Clean test images of each class that accuracy and attack success are measured on."""


class ScanEntry(_Strict):
    """A scanner that is asked about the model one ends with, with clean images."""

    method: str
    options: dict[str, Any] = {}
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Of the training set, in equal numbers of each class, drawn from what the attacker did not touch."""


class DefenseEntry(_Strict):
    exposure: ExposureEntry | None = None
    """Ask the cleanser, as a detector of triggered images at the time of use, about models that ``sdrm``
    attacks infected; about clean controls, whether it raises an alarm."""
    pruning: PruningEntry | None = None
    """Prune models that ``sdrm`` attacks infected by the trigger itself: no defence, but its limit."""
    cleanser: str | None = None
    """None leaves the set as it is."""
    training: str | None = None
    """A training defence: trains the model itself, by the victim's recipe. Such an entry has no cleanser."""
    repair: str | None = None
    """A repair: mends the victim with a few clean images. Such an entry has no cleanser."""
    after: Name | None = None
    """A training defence of this plan: the repair mends what that made, which then stands for the undefended
    model."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Of the training set, in equal numbers of each class, drawn from what the attacker did not touch: the
    images that the repair learns from."""
    robustness: bool = False
    """Measure accuracy under PGD of what the repair or the training defence made, and of the victim."""
    distance: Literal["mask", "filter", "feature"] | None = None
    """Measure the change of class distances in this way, on a few pairs."""
    distance_options: dict[str, Any] = {}
    """Where it is not to be the quick look of :func:`untrojan.distance_change.few_pairs`: fields of
    :class:`~untrojan.defenses.scanning.class_distance.ClassDistance`."""
    scan: ScanEntry | None = None
    """Ask a scanner about the victim; beside a training defence or a repair, about what that made."""
    options: dict[str, Any] = {}
    """Of the cleanser, the training defence or the repair."""
    trusted_per_class: Count | None = None
    """So many clean test images of each class, that the cleanser is given as trusted."""
    probe: ProbeEntry | None = None
    """The cleanser's own probe in place of the net's, and of its second one; retraining is the victim's."""
    retrain: bool = True
    target_known: bool = False
    """Retrain as if the auditor had been told the target class: only what was flagged there is removed. RE's
    comparison grants this to methods that remove a share of every class; verdicts and rates stay blind."""
    canaries: bool = True
    """Whether a ``clean`` is doubted until a twin of the probe has shown that it learns faint patterns: one
    more training. Published comparisons take every verdict at its word."""
    published: str | None = None
    """The defence's name in the published figures; where it is left out the cleanser's or the repair's, or
    ``training-`` and the training defence's; the scanner's where there is none of these."""

    @model_validator(mode="after")
    def _one_kind(self) -> DefenseEntry:
        if self.training is not None and (self.cleanser is not None or self.exposure is not None):
            raise ValueError("a training defence stands alone: drop cleanser and exposure")
        if self.repair is not None and (self.cleanser or self.exposure or self.training):
            raise ValueError("a repair stands alone: drop cleanser, exposure and training")
        if self.scan is not None and (self.cleanser or self.exposure):
            raise ValueError("a scan is of a model, and a cleanser's cell tells of a set: drop one of them")
        others = (self.cleanser, self.exposure, self.training, self.repair, self.scan)
        if self.pruning is not None and any(others):
            raise ValueError("pruning by the trigger stands alone: drop what stands beside it")
        if self.trusted_per_class and (self.cleanser is None or self.exposure is not None):
            raise ValueError("trusted_per_class is a cleanser's: name one, or see exposure's trusted_share")
        if self.probe is not None and (self.cleanser is None or self.exposure is not None):
            raise ValueError("a probe is a cleanser's: name one, or see the options of a training defence")
        if self.target_known and not (self.cleanser and self.retrain):
            raise ValueError("target_known is about retraining after a cleanser: name one, or drop it")
        if self.repair is None and self.model_fields_set & {"after", "share"}:
            raise ValueError("after and share are a repair's: name it, or drop them")
        measured = self.model_fields_set & {"robustness", "distance"}
        if self.repair is None and self.training is None and measured:
            raise ValueError("robustness and distance are of a repair or a training defence: name one")
        if self.distance_options and self.distance is None:
            raise ValueError("distance_options say how a distance is measured: name one, or drop them")
        if {"measure", "seed"} & set(self.distance_options):
            raise ValueError("distance_options has no measure and no seed: these are distance and the cell's")
        return self

    @property
    def published_name(self) -> str:
        trained = None if self.training is None else f"training-{self.training}"
        scanned = None if self.scan is None else self.scan.method
        return self.published or self.cleanser or trained or self.repair or scanned or "none"


class Choice(_Strict):
    """Which cells a grid is made of, or a table or a bound is about: the product of what these match."""

    data: Patterns = ["*"]
    nets: Patterns = ["*"]
    attacks: Patterns = ["*"]
    defenses: Patterns = ["*"]
    seeds: list[int] | None = None
    """None: all of the plan's."""

    def takes(self, axes: Mapping[str, Any]) -> bool:
        pairs = [
            ("data", self.data),
            ("net", self.nets),
            ("attack", self.attacks),
            ("defense", self.defenses),
        ]
        named = all(
            any(fnmatch.fnmatchcase(str(axes[axis]), pattern) for pattern in patterns)
            for axis, patterns in pairs
        )
        return named and (self.seeds is None or axes["seed"] in self.seeds)


Cells = Annotated[
    list[Choice],
    Field(min_length=1),
    BeforeValidator(lambda given: [given] if isinstance(given, dict) else given),
]
"""What any of these choices takes; a plan may give one alone."""


def takes(cells: Iterable[Choice], axes: Mapping[str, Any]) -> bool:
    return any(choice.takes(axes) for choice in cells)


class TableEntry(_Strict):
    name: Name
    title: str
    cells: Cells = [Choice()]
    rows: list[Axis] = ["attack"]
    """The axes that make a row; cells that differ in the others alone are averaged."""
    columns: list[str]
    published: list[str] = []
    """Files of published figures to set beside ours."""
    published_net: str | None = None
    """The published net to compare with; each net's own where it is left out."""
    published_data: str | None = None
    """The published data to compare with; the cell's where it is left out."""
    note: str = ""

    @model_validator(mode="after")
    def _known(self) -> TableEntry:
        for column in self.columns:
            _check_measure(column)
        for file in self.published:
            if file not in PUBLISHED:
                raise ValueError(f"no published figures {file!r}: choose one of {', '.join(PUBLISHED)}")
        return self


class BoundEntry(_Strict):
    """Something that is to hold; cells whose attack does not work are not counted."""

    text: str
    cells: Cells = [Choice()]
    measure: str
    statistic: Literal["mean", "largest", "smallest", "fraction"]
    """``fraction`` is the share of cells in which the measure is true."""
    given: str | None = None
    """Count only the cells in which this measure is true."""
    at_least: float | tuple[int, int] | None = None
    """A number, or [17, 18] for 17 of 18: as a share where more or fewer cells count."""
    at_most: float | tuple[int, int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        if isinstance(given, dict):
            limits = ("at_least", "at_most")
            return {
                key: tuple(value) if key in limits and isinstance(value, list) else value
                for key, value in given.items()
            }
        return given

    @model_validator(mode="after")
    def _known(self) -> BoundEntry:
        for measure in filter(None, [self.measure, self.given]):
            _check_measure(measure)
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self


class ComparisonEntry(_Strict):
    """One defence beside each other one, on the cells that both have and whose attack works.

    Means over whatever each defence happens to have are no comparison while a plan is half run.
    """

    name: Name
    title: str
    defense: Name
    cells: Cells = [Choice()]
    """The others', and so the one's."""
    columns: Annotated[list[str], Field(min_length=1)]
    note: str = ""

    @model_validator(mode="after")
    def _known(self) -> ComparisonEntry:
        for column in self.columns:
            _check_measure(column)
        return self


class Potency(_Strict):
    """When an attack counts: it works undefended, and the model is as good as a clean one."""

    attack_success: Annotated[float, Field(ge=0, le=1)] = 0.85
    accuracy_drop: Annotated[float, Field(ge=0, le=1)] | None = 0.02
    """Below the mean of the clean controls of the same data, net and seed, where there are any."""


class Plan(_Strict):
    name: Name
    title: str
    description: str = ""
    seeds: Annotated[list[int], Field(min_length=1)]
    data: Annotated[dict[Name, DataEntry], Field(min_length=1)]
    nets: Annotated[dict[Name, NetEntry], Field(min_length=1)]
    attacks: Annotated[dict[Name, AttackEntry], Field(min_length=1)]
    defenses: Annotated[dict[Name, DefenseEntry], Field(min_length=1)]
    recipes: dict[Name, dict[str, Any]] = {}
    """Fields of a recipe, or ``preset = NAME`` and the fields that differ from it."""
    grid: list[Choice] = [Choice()]
    potency: Potency = Potency()
    tables: list[TableEntry] = []
    comparisons: list[ComparisonEntry] = []
    bounds: list[BoundEntry] = []

    @model_validator(mode="after")
    def _known_trainings(self) -> Plan:
        trained = [name for name, entry in self.defenses.items() if entry.training is not None]
        for name, entry in self.defenses.items():
            if entry.after is not None and entry.after not in trained:
                known = ", ".join(trained) or "none"
                raise ValueError(
                    f"defenses.{name}.after: {entry.after!r} is no training defence of this plan, which has "
                    f"{known}"
                )
        return self

    def recipe(self, name: str) -> Recipe:
        """A recipe of the plan, or a preset. Raises UntrojanError where there is neither."""
        from untrojan.registry import options_of, validated
        from untrojan.training.recipe import Recipe

        if name not in self.recipes:
            return _preset(name, tuple(self.recipes))
        fields = dict(self.recipes[name])
        preset = fields.pop("preset", None)
        base = options_of(_preset(str(preset))) if preset is not None else {}
        return validated(Recipe, base | fields, f"recipe {name!r}")

    def resolve_sources(self, given: Mapping[str, str]) -> dict[str, str]:
        """For each data name its path or known name, ``--data NAME=PATH`` first."""
        for name in given:
            if name not in self.data:
                raise UntrojanError(f"--data {name}=...: the plan's data are {', '.join(self.data)}")
        return {name: given.get(name) or entry.source or name for name, entry in self.data.items()}


def read_plan(path: Path) -> Plan:
    """A plan file, checked in full. Raises UntrojanError with the file, the key and what is allowed."""
    try:
        if path.stat().st_size > LARGEST_PLAN:
            raise UntrojanError(f"{path} is larger than {LARGEST_PLAN} bytes: it is no plan")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UntrojanError(f"cannot read plan {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UntrojanError(f"{path} is not a TOML file: {error}") from None
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        raise UntrojanError(f"{path}: {_first_problem(error)}") from None
    for key, check in _checks(plan):
        try:
            check()
        except UntrojanError as error:
            raise UntrojanError(f"{path}: {key}: {error}") from None
    return plan


def _checks(plan: Plan) -> Iterable[tuple[str, Callable[[], object]]]:
    """What pydantic cannot know: the names and options that registries hold."""
    from untrojan.defenses.cleansing.registry import CLEANSERS
    from untrojan.defenses.repair.registry import REPAIRS
    from untrojan.defenses.scanning.registry import SCANNERS
    from untrojan.defenses.training.registry import TRAINING_DEFENSES
    from untrojan.distance_change import few_pairs
    from untrojan.models.registry import check_name

    for name, net in plan.nets.items():
        yield f"nets.{name}.architecture", partial(check_name, net.architecture)
        yield f"nets.{name}.victim", partial(plan.recipe, net.victim)
        yield f"nets.{name}.probe", partial(plan.recipe, net.probe)
        if net.second_probe is not None:
            yield f"nets.{name}.second_probe", partial(plan.recipe, net.second_probe)
    for name in plan.recipes:
        yield f"recipes.{name}", partial(plan.recipe, name)
    for name, attack in plan.attacks.items():
        if attack.sdrm is not None:
            yield f"attacks.{name}.sdrm", attack.sdrm.infection
            yield f"attacks.{name}.sdrm", attack.sdrm.method
        elif attack.federated is not None:
            yield f"attacks.{name}.federated", attack.federated.check
        elif attack.method is not None:
            yield f"attacks.{name}", attack.crafted
        elif not attack.clean:
            yield f"attacks.{name}", attack.poisoning
    for name, defense in plan.defenses.items():
        if defense.exposure is not None:
            yield f"defenses.{name}.exposure", partial(_check_detector, defense.cleanser)
        if defense.probe is not None:
            yield f"defenses.{name}.probe.architecture", partial(check_name, defense.probe.architecture)
            yield f"defenses.{name}.probe.recipe", partial(plan.recipe, defense.probe.recipe)
        if defense.cleanser is not None:
            yield f"defenses.{name}", partial(CLEANSERS.build, defense.cleanser, defense.options)
        if defense.training is not None:
            yield f"defenses.{name}", partial(TRAINING_DEFENSES.build, defense.training, defense.options)
        if defense.repair is not None:
            yield f"defenses.{name}", partial(REPAIRS.build, defense.repair, defense.options)
        if defense.distance is not None:
            asked = partial(few_pairs, defense.distance, 0, **defense.distance_options)
            yield f"defenses.{name}.distance_options", asked
        if defense.scan is not None:
            yield f"defenses.{name}.scan", partial(SCANNERS.build, defense.scan.method, defense.scan.options)
    choices: list[tuple[str, Choice]] = [
        *((f"grid.{index}", grid) for index, grid in enumerate(plan.grid)),
        *((f"tables.{table.name}.cells", choice) for table in plan.tables for choice in table.cells),
        *((f"comparisons.{each.name}.cells", choice) for each in plan.comparisons for choice in each.cells),
        *(
            (f"bounds.{index}.cells", choice)
            for index, bound in enumerate(plan.bounds)
            for choice in bound.cells
        ),
    ]
    for comparison in plan.comparisons:
        one = partial(matching, comparison.defense, list(plan.defenses))
        yield f"comparisons.{comparison.name}.defense", one
    for (key, choice), axis in itertools.product(choices, ("data", "nets", "attacks", "defenses")):
        for pattern in getattr(choice, axis):
            yield f"{key}.{axis}", partial(matching, pattern, list(getattr(plan, axis)))
    seeds = [str(seed) for seed in (*plan.seeds, *(seed for grid in plan.grid for seed in grid.seeds or ()))]
    for key, choice in choices:
        for seed in choice.seeds or ():
            yield f"{key}.seeds", partial(matching, str(seed), seeds)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern matches. Raises UntrojanError where none does."""
    known = list(names)
    found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise UntrojanError(f"{pattern!r} matches none of {', '.join(known)}")
    return found


def _check_detector(cleanser: str | None) -> None:
    from untrojan.defenses.cleansing.by_class import ClassCleanser
    from untrojan.defenses.cleansing.registry import CLEANSERS

    if cleanser is None or not issubclass(CLEANSERS.get(cleanser), ClassCleanser):
        raise UntrojanError("only a cleanser that looks at features class by class can be asked")


def _preset(name: str, own: tuple[str, ...] = ()) -> Recipe:
    from untrojan.training.presets import PRESETS

    if name not in PRESETS:
        raise UntrojanError(f"unknown recipe {name!r}: choose one of {', '.join([*own, *PRESETS])}")
    return PRESETS[name]


def _check_measure(name: str) -> None:
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}: choose one of {', '.join(MEASURES)}")


def stand_in(label: Class) -> int:
    """A number for a class whose name can only be looked up once the data are loaded; one for each name."""
    if isinstance(label, int):
        return label
    return 1_000_000 + int.from_bytes(label.encode()[:8], "big") % 1_000_000


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "[key]") or "plan"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{place}: this key is missing"
    if first["type"] == "value_error":
        return f"{place}: {message}"
    shown = repr(first.get("input"))
    return f"{place}: {shown if len(shown) <= 80 else shown[:77] + '...'} is not valid: {message}"
