"""What each kind of stage does: thin calls of the package's own functions.

Poisoned sets are not stored: remaking one from the data, the attack and the seed takes about a second, and
its fingerprint says that it came out the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untrojan.bench.graph import Cell, Place, StageFunction
from untrojan.bench.plan import AttackEntry, ExposureEntry, Plan
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    import torch

    from untrojan.attacks.infect import Infection
    from untrojan.attacks.poisoning import PoisonedData
    from untrojan.data.image_set import ImageSet, Splits
    from untrojan.defenses.scanning.class_distance import ClassDistance
    from untrojan.defenses.scanning.report import ScanReport
    from untrojan.inversion.generators import Generator
    from untrojan.metrics.exposure import Question, SortedTest
    from untrojan.models.classifier import Classifier
    from untrojan.triggers.base import Trigger

MODEL = "model.safetensors"
PATTERN = "pattern.safetensors"
FLAGS = "flags.safetensors"
CRAFTED = "crafted.safetensors"
DISTANCES = "distances.safetensors"


def data(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Look at the data. Its fingerprint ties every later stage to these very images."""
    splits = _load(_settings(config, place.sources))
    return {
        "fingerprint": _fingerprint(splits),
        "classes": list(splits.train.class_names),
        "shape": list(splits.train.image_shape),
        "train": len(splits.train),
        "test": len(splits.test) if splits.test else 0,
    }


def poison(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Make a poisoned set, to learn its fingerprint; compute first what has to be computed."""
    facts: dict[str, Any] = {}
    attack: Mapping[str, Any] = config["attack"] or {}
    if "method" in attack:
        facts = _craft(config, place)
    elif "surrogate" in place.inputs:
        _compute_pattern(attack, place)
    made = _make(config, place.inputs["data"], place.sources, place.out)
    known = {"fingerprint": made.train.fingerprint(), "train": len(made.train), "poisoned": 0}
    if made.attack is not None:
        record = made.attack.record
        known |= {"poisoned": int(record.poisoned.sum()), "target": record.target, "sources": record.sources}
    return known | ({"crafted": facts} if facts else {})


def train(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Train a classifier on the poisoned set."""
    return _train(config, place, _poisoned(place).train)


def deliver(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The infected model that the attacker made along with the poisoned set."""
    shutil.copyfile(place.inputs["poisoned"] / MODEL, place.out / MODEL)
    return {"unchanged": False}


def retrain(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Train as the victim was trained, on what the defence has left. Where that is everything: the victim."""
    flagged = _flags(place.inputs["audit"])
    made = _poisoned(place)
    if config.get("target_known"):
        # Of a clean set nothing is the target: whoever knows that, removes nothing.
        target = made.attack.record.target if made.attack else None
        flagged &= made.train.labels == (-1 if target is None else target)
    if not bool(flagged.any()):
        (place.out / "same-as").write_text(str(_model_folder(place.inputs["victim"])))
        return {"unchanged": True}
    return _train(config, place, made.train.select(~flagged))


def evaluate(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Accuracy on clean test images, attack success, and the share of the poison that was learned."""
    from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
    from untrojan.models.classifier import predictions_of

    made, model = _poisoned(place), _model(place.inputs["model"])
    result: dict[str, Any] = {"benign_accuracy": benign_accuracy(model, made.test)}
    if made.attack is not None:
        poisoned = made.train.select(made.attack.record.poisoned)
        learned = predictions_of(model, poisoned.images) == poisoned.labels
        result["attack_success"] = attack_success_rate(model, made.attack.triggered_test)
        result["poison_fit"] = float(learned.double().mean())
    return result


def audit(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Run a cleanser and doubt it, as ``untrojan audit`` does. It gets the training set and the probes, and
    nothing else."""
    from safetensors.torch import save_file

    from untrojan.audit import ProbeTraining, judge
    from untrojan.defenses.cleansing.registry import CLEANSERS
    from untrojan.registry import validated
    from untrojan.runs import json_text, write_bytes_atomically
    from untrojan.training.recipe import Recipe

    folders = [place.inputs[name] for name in ("probe", "second_probe") if name in place.inputs]
    trained = [_record(folder)["config"] for folder in folders] if config.get("canaries", True) else []
    made, of_each = _poisoned(place), config.get("trusted_per_class")
    found = judge(
        made.train,
        [_model(folder) for folder in folders],
        {config["cleanser"]: CLEANSERS.build(config["cleanser"], config["options"])},
        [
            ProbeTraining(how["architecture"], validated(Recipe, how["recipe"], "recipe"), how["seed"])
            for how in trained
        ],
        trusted=None if of_each is None else _thinned(made.test, of_each),
        work=place.scratch,
        device=_device(),
    )
    report, canaries = found.report, found.check.canaries
    save_file({"flagged": report.flagged, "scores": report.scores}, place.out / FLAGS)
    evidence = dict(report.evidence)
    patterns = evidence.pop("patterns", {})
    evidence.pop("readings", None)
    if patterns:
        tensors = {str(target): pattern.contiguous() for target, pattern in patterns.items()}
        save_file(tensors, place.out / PATTERN)
    write_bytes_atomically(place.out / "evidence.json", json_text(evidence).encode())
    return {
        "verdict": report.verdict,
        "targets": report.targets,
        "sources": report.sources,
        "flagged": int(report.flagged.sum()),
        "reason": report.reason,
        "p_value": evidence.get("p_value"),
        "log10_p_value": evidence.get("log10_p_value"),
        "log10_p_value_uncalibrated": evidence.get("log10_p_value_uncalibrated"),
        "canaries": canaries,
        "weakest_canary": min(canaries.values(), default=None),
    }


def score(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Hold an audit against the truth, which it never saw."""
    from untrojan.metrics.cleansing import cleansing_rates

    made, found = _poisoned(place), _summary(place.inputs["audit"])
    flagged = _flags(place.inputs["audit"])
    if made.attack is None:
        rates = cleansing_rates(flagged, made.train.labels)
        removed = {"removed": rates.removed, "false_positive_rate": rates.false_positive_rate}
        return {"sections": {"detection": _of_a_clean_one(found), "cleansing": removed}}
    record = made.attack.record
    detection = _detection(found, record.target)
    first = found["sources"][0][0] if found["sources"] and found["sources"][0] else None
    detection["right_source"] = detection["right_target"] and first in record.sources
    rates = cleansing_rates(flagged, made.train.labels, record)
    return {"sections": {"detection": detection, "cleansing": rates.to_json()}}


def _of_a_clean_one(found: Mapping[str, Any]) -> dict[str, bool]:
    """What a verdict is worth where there is nothing to find."""
    return {"false_alarm": found["verdict"] == "poisoned", "undecided": found["verdict"] == "undecided"}


def _detection(found: Mapping[str, Any], target: int | None) -> dict[str, bool]:
    """What a verdict is worth where every attacked class leads to ``target``, or None: each to another."""
    poisoned = found["verdict"] == "poisoned"
    return {
        "detected": poisoned,
        # One target is right where it is the only one found: a second would cost a clean class its images.
        "right_target": poisoned and (target is None or list(found["targets"]) == [target]),
        "undecided": found["verdict"] == "undecided",
    }


def defend(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Train by a training defence, which gets the training set and nothing else. Whoever was handed a model
    along with the set, or transferred one to it, goes on from there."""
    from safetensors.torch import save_file

    from untrojan.defenses.training.none import NONE
    from untrojan.defenses.training.registry import TRAINING_DEFENSES
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.registry import validated
    from untrojan.runs import json_text, write_bytes_atomically
    from untrojan.training.recipe import Recipe

    images, recipe = _poisoned(place).train, validated(Recipe, config["recipe"], "recipe")
    method = TRAINING_DEFENSES.build(config["defense"], config["options"])
    checkpoint = place.scratch / "training.pt"
    if "start" in place.inputs:
        assert isinstance(method, NONE)
        report = method.defend(_model(place.inputs["start"]), images, recipe, checkpoint=checkpoint)
    else:
        report = method(images, config["architecture"], recipe, checkpoint=checkpoint, device=_device())
    save_checkpoint(place.out / MODEL, report.model, images.class_names)
    save_file({"flagged": report.dropped}, place.out / FLAGS)
    write_bytes_atomically(place.out / "evidence.json", json_text(report.evidence).encode())
    return {
        "architecture": report.model.architecture,
        "dropped": int(report.dropped.sum()),
        "epochs": len(report.history),
        "notes": report.evidence.get("notes", []),
    }


def score_dropped(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Hold what a training defence dropped against the truth, which it never saw."""
    from untrojan.metrics.cleansing import cleansing_rates

    made, dropped = _poisoned(place), _flags(place.inputs["defense"])
    records = made.attack.record if made.attack else ()
    return {"sections": {"dropping": cleansing_rates(dropped, made.train.labels, records).to_json()}}


def repair(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Mend the victim with clean images, which are all that the repair gets beside it."""
    from untrojan.cost import measure
    from untrojan.defenses.repair.registry import REPAIRS
    from untrojan.metrics.accuracy import benign_accuracy
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.repair import check_above_chance
    from untrojan.runs import json_text, write_bytes_atomically

    victim = _model(place.inputs["victim"])
    clean = _untouched(_poisoned(place), config["share"], config["seed"])
    check_above_chance(benign_accuracy(victim, clean), clean)
    with measure() as cost:
        report = REPAIRS.build(config["repair"], config["options"])(
            victim, clean, checkpoint=place.scratch / "repair.pt"
        )
    save_checkpoint(place.out / MODEL, report.model, clean.class_names)
    write_bytes_atomically(place.out / "history.json", json_text(report.history).encode())
    spent = cost.to_json()
    return {
        "images": len(clean),
        "seconds": spent["seconds"],
        "forwards": spent["forwards"],
        "backwards": spent["backwards"],
        "passed": spent["images"],
    }


def _untouched(made: _Made, share: float, seed: int) -> ImageSet:
    """Training images that the attacker left as they were: ``share`` of the set, as many of each class."""
    import torch

    from untrojan.defenses.repair.tuning import balanced

    touched = torch.zeros(len(made.train), dtype=torch.bool)
    if made.attack is not None:
        record = made.attack.record
        touched = record.poisoned if record.cover is None else record.poisoned | record.cover
    pool = made.train.select(~touched)
    of_each = max(1, round(share * len(made.train) / pool.num_classes))
    return pool.select(balanced(pool, of_each, seed, "repair images"))


def gauge(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Accuracy under attack and class distances of a victim: once, for all the defences that are held against
    it."""
    from safetensors.torch import save_file

    victim, sections = _model(place.inputs["victim"]), {}
    if config["robustness"]:
        sections["robustness"] = _robust_accuracy(victim, config, place)
    if config["distance"] is not None:
        asked, generator = _distance_question(victim, config, place)
        found = asked.distances(
            victim, _poisoned(place).test, generator, checkpoint=place.scratch / "distances.safetensors"
        )
        save_file(found.tensors(), place.out / DISTANCES)
    return sections


def assess(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """What a defence did beside its task: accuracy under attack and class distances, before and after."""
    from safetensors.torch import load_file

    from untrojan.defenses.scanning.class_distance import Distances
    from untrojan.distance_change import DistanceProbe

    victim, defended = (_model(place.inputs[name]) for name in ("victim", "defended"))
    sections: dict[str, Any] = {}
    if config["robustness"]:
        before = _summary(place.inputs["gauged"])["robustness"]
        after = _robust_accuracy(defended, config, place)
        sections["robustness"] = {"before": before, "after": after, "cost": before - after}
    if config["distance"] is not None:
        asked, generator = _distance_question(victim, config, place)
        found = Distances.of_tensors(load_file(place.inputs["gauged"] / DISTANCES))
        probe = DistanceProbe(victim, _poisoned(place).test, asked, generator, found)
        sections["distance"] = probe.compare(defended, place.scratch / "after.safetensors").to_json()
    return {"sections": sections}


def _robust_accuracy(model: Classifier, config: Mapping[str, Any], place: Place) -> float:
    from untrojan.metrics.robustness import PROTOCOLS, robust_accuracy

    name = _record(place.inputs["data"])["config"]["name"]
    return robust_accuracy(model, _poisoned(place).test, PROTOCOLS.get(name), seed=config["seed"])


def _distance_question(
    victim: Classifier, config: Mapping[str, Any], place: Place
) -> tuple[ClassDistance, Generator]:
    """How to measure, and what with: an encoder is made of the images that a repair has."""
    from untrojan.distance_change import few_pairs

    asked = few_pairs(config["distance"], config["seed"], **config.get("distance_options", {}))
    return asked, asked.generator(victim, _untouched(_poisoned(place), config["share"], config["seed"]))


def infect(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Train a model that its trainer infects, and measure how well its backdoor works and hides."""
    from untrojan.attacks import infect as attacks
    from untrojan.attacks.sdrm import StatisticalDifferenceReduction
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.registry import validated
    from untrojan.training.recipe import Recipe

    splits = _known_data(place.inputs["data"], place.sources)
    made = attacks.infect(
        splits, validated(attacks.Infection, config["infection"], "sdrm"),
        validated(StatisticalDifferenceReduction, config["method"], "sdrm"), config["architecture"],
        validated(Recipe, config["recipe"], "recipe"), seed=config["seed"],
        checkpoint=place.scratch / "training.pt", device=_device(),
    )  # fmt: skip
    save_checkpoint(place.out / MODEL, made.model, splits.train.class_names)
    known: dict[str, float | None] = {
        "benign_accuracy": made.benign_accuracy,
        "attack_success": made.attack_success_rate,
    }
    for level, found in made.differences.items():
        known |= {
            f"mmd_{level}": found.difference,
            f"mmd_unbiased_{level}": found.difference_unbiased,
            f"intra_{level}": found.intra_class,
            f"inter_{level}": found.inter_class,
        }
    return known


def federate(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Train one model among simulated clients, of whom some attack, and defend it by what they report."""
    from untrojan.attacks.distributed import DistributedBackdoor
    from untrojan.defenses.training.none import NONE
    from untrojan.federated.server import Federation
    from untrojan.federated.simulation import Population, simulate
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.registry import validated
    from untrojan.runs import json_text, write_bytes_atomically
    from untrojan.training.recipe import Recipe

    splits, settings = _known_data(place.inputs["data"], place.sources), config["federated"]
    defense = None if config["defense"] is None else validated(NONE, config["defense"], "none")
    population = Population(
        settings["clients"], settings["malicious"], settings["alpha"], config["seed"]
    )  # fmt: skip
    report = simulate(
        splits,
        Federation(
            config["architecture"], settings["rounds"], validated(Recipe, config["recipe"], "recipe"),
            defense, settings["weighting"], config["seed"], settings["expelled_at"],
        ),
        population,
        DistributedBackdoor.chosen(splits.train.image_shape, settings["attack"]),
        work=place.scratch,
    )  # fmt: skip
    save_checkpoint(place.out / MODEL, report.model, splits.train.class_names)
    evidence = {"rounds": report.history, "excluded": report.excluded, "defense": report.defense}
    write_bytes_atomically(place.out / "evidence.json", json_text(evidence).encode())
    sections = {"undefended": report.before()}
    if (after := report.after()) is not None:
        expelled = {name for found in report.defense for name in found["expelled"]}
        attackers = {population.name(number) for number in range(population.malicious)}
        sections["defended"] = after | {
            "attackers_expelled": len(expelled & attackers) / max(1, len(attackers)),
            "others_expelled": len(expelled - attackers),
        }
    return {"sections": sections}


def expose(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Ask a detector about an infected model: it gets test images, of which some carry the trigger. About a
    clean model, where none does, the question is whether it raises an alarm."""
    from untrojan.defenses.cleansing.by_class import ClassCleanser
    from untrojan.defenses.cleansing.registry import CLEANSERS

    detector = CLEANSERS.build(config["cleanser"], config["options"])
    assert isinstance(detector, ClassCleanser)
    infected = "infected" in place.inputs
    given = {name: config[name] for name in ExposureEntry.model_fields if name in config}
    asked = ExposureEntry.model_validate(given)
    model = place.inputs["infected" if infected else "model"]
    question = _question(model, infected, place.inputs["data"], _sources(place), asked, config["seed"])
    if infected:
        return question.put_to(detector).to_json()
    return {"false_alarm": question.alarms(detector), "clean": question.clean}


@lru_cache(maxsize=4)
def _question(
    model: Path, infected: bool, data_folder: Path, sources: tuple[tuple[str, str], ...],
    asked: ExposureEntry, seed: int,
) -> Question:  # fmt: skip
    """What the detectors of a plan are asked about one model; kept, for they share its features."""
    import torch

    from untrojan.metrics.exposure import as_predicted
    from untrojan.models.taps import SDRM_LEVELS, levels_of

    data, unseen = _known_data(data_folder, dict(sources)), asked.trusted_from == "test"
    train, trusted, of_each = data.train, None, 0
    if asked.trusted_share:
        of_each = max(1, round(asked.trusted_share * int(train.class_counts.max())))
        pool = data.test if unseen else train
        assert pool is not None
        trusted = _thinned(pool, of_each)
    seen = _sorted_test(model, infected, data_folder, sources, of_each if unseen else 0)
    if trusted is not None and asked.trusted_as == "predicted":
        trusted = as_predicted(seen.model, trusted)
    question = seen.question(asked.clean, asked.ratio, trusted, seed)
    # One pass for the detectors of every level.
    known = levels_of(seen.model, torch.zeros(1, *train.image_shape, device=seen.model.device))
    for features in (question.ordinary, question.attacked):
        features.extract(level for level in SDRM_LEVELS if level in known)
    return question


@lru_cache(maxsize=1)
def _sorted_test(
    model: Path, infected: bool, data_folder: Path, sources: tuple[tuple[str, str], ...], aside: int
) -> SortedTest:
    """Of the test images but ``aside`` of each class, which the defender has."""
    import torch

    from untrojan.attacks.poisoning import triggered_test
    from untrojan.metrics.exposure import SortedTest

    test = _known_data(data_folder, dict(sources)).test
    assert test is not None
    asked = torch.ones(len(test), dtype=torch.bool)
    asked[_first_of_each(test, aside)] = False
    if not infected:
        return SortedTest.of_clean(_model(model), test.select(asked))
    made, infection = _infection(model, data_folder, sources)
    rest = made.test.select(asked)
    triggered = triggered_test(rest, infection.poisoning(), made.record.trigger)
    return SortedTest.of(_model(model), rest, triggered, infection.target)


@lru_cache(maxsize=1)
def _infection(
    infected: Path, data_folder: Path, sources: tuple[tuple[str, str], ...]
) -> tuple[PoisonedData, Infection]:
    """The attack that a trainer infected a model with, by data alone, made again."""
    from untrojan.attacks import infect as attacks
    from untrojan.registry import validated

    trained = _record(infected)["config"]
    infection = validated(attacks.Infection, trained["infection"], "sdrm")
    return infection.poisoning()(_known_data(data_folder, dict(sources)), trained["seed"]), infection


def prune(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Prune the neurons that an infected model's own trigger excites, and watch accuracy and attack success:
    the most that neuron pruning could do, for no defender knows the trigger."""
    from untrojan.metrics.pruning import pruning_curve, summary

    made, infection = _infection(place.inputs["infected"], place.inputs["data"], _sources(place))
    curve = pruning_curve(
        _model(place.inputs["infected"]), _thinned(made.test, config["images"]), made.record.trigger,
        infection.target, config["step"],
    )  # fmt: skip
    return {"sections": {"pruning": summary(curve) | {"curve": curve}}}


def scan(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Ask a scanner about a model. It gets clean images, and nothing else."""
    from untrojan.cost import measure
    from untrojan.defenses.scanning.registry import SCANNERS
    from untrojan.runs import json_text, write_bytes_atomically

    clean = _untouched(_poisoned(place), config["share"], config["seed"])
    scanner = SCANNERS.build(config["scanner"], config["options"])
    with measure() as cost:
        report = scanner(_model(place.inputs["model"]), clean, checkpoint=place.scratch / "scan.safetensors")
    statistics = {str(label): values for label, values in report.statistics.items()}
    evidence = {"statistics": statistics, "evidence": report.evidence}
    write_bytes_atomically(place.out / "evidence.json", json_text(evidence).encode())
    return {
        "verdict": report.verdict,
        "targets": report.targets,
        "failed": report.failed,
        "reason": report.reason,
        "images": len(clean),
        "seconds": cost.seconds,
        "anomaly_index": _extreme(report, "anomaly_index", max),
        "smallest_mask": _extreme(report, "mask_size", min),
        "log10_p_value": report.evidence.get("log10_p_value"),
        "mean_max_reasr": report.evidence.get("mean_max_reasr"),
    }


def _extreme(report: ScanReport, name: str, of: Callable[[Iterable[float]], float]) -> float | None:
    """The most suspicious class's statistic; None where no class has that one."""
    values = [each[name] for each in report.statistics.values() if name in each]
    return of(values) if values else None


def score_scan(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Hold a scan against the truth, which it never saw."""
    found, made = _summary(place.inputs["scan"]), _poisoned(place)
    if "infected" in place.inputs:
        target = _record(place.inputs["infected"])["config"]["infection"]["target"]
        return {"sections": {"detection": _detection(found, target)}}
    if made.attack is None:
        return {"sections": {"detection": _of_a_clean_one(found)}}
    return {"sections": {"detection": _detection(found, made.attack.record.target)}}


STAGES: Mapping[str, StageFunction] = {
    "data": data,
    "poison": poison,
    "train": train,
    "deliver": deliver,
    "evaluate": evaluate,
    "audit": audit,
    "score": score,
    "retrain": retrain,
    "infect": infect,
    "federate": federate,
    "expose": expose,
    "prune": prune,
    "defend": defend,
    "score_dropped": score_dropped,
    "repair": repair,
    "gauge": gauge,
    "assess": assess,
    "scan": scan,
    "score_scan": score_scan,
}


def check_data(plan: Plan, cells: Iterable[Cell], sources: Mapping[str, str]) -> None:
    """Load every data set that these cells need, and look up the classes that their attacks name.

    Raises UntrojanError where data cannot be loaded, have no test images, or lack a class.
    """
    from untrojan.attacks.distributed import DistributedBackdoor

    pairs = dict.fromkeys((str(cell.axes["data"]), str(cell.axes["attack"])) for cell in cells)
    for name, attack_name in pairs:
        config = {"name": name, **plan.data[name].model_dump(exclude={"source"})}
        splits = _load(_settings(config, sources))
        if splits.test is None or not len(splits.test):
            raise UntrojanError(f"data {name!r}: {sources[name]} has no test images, which results need")
        attack = plan.attacks[attack_name]
        if attack.clean:
            continue
        try:
            if attack.federated is not None:
                shape = splits.train.image_shape
                chosen = DistributedBackdoor.chosen(shape, attack.federated.attack)
                splits.train.class_index(chosen.target)
                continue
            if attack.method is not None:
                attack.crafted(splits.train.class_index).clean(splits)
                continue
            infection = attack.sdrm.infection() if attack.sdrm else None
            poisoning = infection.poisoning() if infection else attack.poisoning(splits.train.class_index)
            target = [] if poisoning.target is None else [poisoning.target]
            for label in [*poisoning.poisoned_classes(splits.train.num_classes), *target]:
                splits.train.class_index(label)
        except UntrojanError as error:
            raise UntrojanError(f"attacks.{attack_name} on data {name!r}: {error}") from None


class _Made:
    """A training set as a trainer receives it, and the truth beside it."""

    def __init__(self, clean: Splits, attack: PoisonedData | None) -> None:
        self.attack = attack
        self.train: ImageSet = attack.train if attack else clean.train
        test = attack.test if attack else clean.test
        assert test is not None
        self.test: ImageSet = test


def _settings(config: Mapping[str, Any], sources: Mapping[str, str]) -> tuple[Any, ...]:
    keys = ("size", "train_per_class", "test_per_class")
    return (sources.get(config["name"], config["name"]), *(config.get(key) for key in keys))


@lru_cache(maxsize=2)
def _load(settings: tuple[Any, ...]) -> Splits:
    from untrojan.data.image_set import Splits
    from untrojan.data.load import load

    source, size, train_per_class, test_per_class = settings
    found = load(source, size=size)
    test = None if found.test is None else _thinned(found.test, test_per_class)
    return Splits(_thinned(found.train, train_per_class), test)


def _thinned(images: ImageSet, per_class: int | None) -> ImageSet:
    """At most so many images of each class, always the same ones."""
    return images if per_class is None else images.select(_first_of_each(images, per_class))


def _first_of_each(images: ImageSet, count: int) -> torch.Tensor:
    """Rows of ``count`` images of each class at most, in a random order that is always the same."""
    import torch

    from untrojan.seeding import generator

    order = torch.randperm(len(images), generator=generator(0, "subset"))
    kept = [order[images.labels[order] == label][:count] for label in range(images.num_classes)]
    return torch.cat(kept).sort().values


def _fingerprint(splits: Splits) -> str:
    return splits.train.fingerprint() + (splits.test.fingerprint() if splits.test else "")


def _known_data(folder: Path, sources: Mapping[str, str]) -> Splits:
    """The data a finished data stage looked at. Raises UntrojanError where they have changed since."""
    record = _record(folder)
    splits = _load(_settings(record["config"], sources))
    if _fingerprint(splits) != record["summary"]["fingerprint"]:
        name = record["config"]["name"]
        raise UntrojanError(f"data {name!r} are not those this folder was begun with: use another --out")
    return splits


def _poisoned(place: Place) -> _Made:
    """The set that the poison stage made, or that an infected model was trained on, made again."""
    if "poisoned" in place.inputs:
        return _remade(place.inputs["poisoned"], place.inputs["data"], _sources(place))
    data_folder = place.inputs["data"]
    made, _ = _infection(place.inputs["infected"], data_folder, _sources(place))
    return _Made(_known_data(data_folder, place.sources), made)


def _sources(place: Place) -> tuple[tuple[str, str], ...]:
    """The data's paths, as caches take them."""
    return tuple(sorted(place.sources.items()))


@lru_cache(maxsize=2)
def _remade(folder: Path, data_folder: Path, sources: tuple[tuple[str, str], ...]) -> _Made:
    record = _record(folder)
    made = _make(record["config"], data_folder, dict(sources), folder)
    if made.train.fingerprint() != record["summary"]["fingerprint"]:
        raise UntrojanError(
            "the poisoned set did not come out as before: versions changed; use another --out"
        )
    return made


def _make(config: Mapping[str, Any], data_folder: Path, sources: Mapping[str, str], folder: Path) -> _Made:
    splits = _known_data(data_folder, sources)
    if config["attack"] is None:
        return _Made(_some_classes(splits, config), None)
    if "method" in config["attack"]:
        from safetensors.torch import load_file

        crafted = _attack_entry(config["attack"]).crafted(splits.train.class_index)
        return _Made(splits, crafted.poison(splits, config["seed"], load_file(folder / CRAFTED)))
    attack = _attack_entry(config["attack"]).poisoning(splits.train.class_index)
    return _Made(splits, attack(splits, config["seed"], drawn=_stored_pattern(folder)))


def _some_classes(splits: Splits, config: Mapping[str, Any]) -> Splits:
    """All, or ``only`` a pair, or all ``without`` that pair: what transfer attacks are made of."""
    from untrojan.attacks.hidden_trigger import other_classes, pair_of
    from untrojan.data.image_set import Splits

    if "only" in config:
        source, target = map(splits.train.class_index, config["only"])
        return pair_of(splits, source, target)
    if "without" in config:
        source, target = map(splits.train.class_index, config["without"])
        test = None if splits.test is None else other_classes(splits.test, (source, target))
        return Splits(other_classes(splits.train, (source, target)), test)
    return splits


def _craft(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Compute what the attack poisons with, and store it: making the set again then takes no time."""
    from safetensors.torch import save_file

    from untrojan.models.checkpoints import save_checkpoint

    splits = _known_data(place.inputs["data"], place.sources)
    attack = _attack_entry(config["attack"]).crafted(splits.train.class_index)
    model = _model(place.inputs["surrogate"]) if "surrogate" in place.inputs else None
    crafted = attack.craft(splits, config["seed"], model, place.scratch)
    tensors = {name: value.cpu().contiguous() for name, value in crafted.tensors.items()}
    save_file(tensors, place.out / CRAFTED)
    if crafted.model is not None:
        save_checkpoint(place.out / MODEL, crafted.model, splits.train.class_names)
    return dict(crafted.facts)


def _attack_entry(options: Mapping[str, Any]) -> AttackEntry:
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(given.get("sources"), tuple):
        given["sources"] = list(given["sources"])
    return AttackEntry.model_validate(given)


def _compute_pattern(options: Mapping[str, Any], place: Place) -> None:
    """Section 18: the attacker's universal pattern, on a surrogate trained on clean data."""
    import torch
    from safetensors.torch import save_file

    from untrojan.triggers.universal import universal_pattern

    train = _known_data(place.inputs["data"], place.sources).train
    attack = _attack_entry(options).poisoning(train.class_index)
    rows = torch.isin(train.labels, torch.tensor(attack.poisoned_classes(train.num_classes)))
    if attack.target is None:
        raise UntrojanError("a universal pattern needs a target class")
    surrogate = _model(place.inputs["surrogate"])
    pattern = universal_pattern(surrogate, train.images[rows], attack.target)
    save_file({"pattern": pattern.contiguous()}, place.out / PATTERN)


def _stored_pattern(folder: Path) -> Trigger | None:
    if not (folder / PATTERN).exists():
        return None
    from safetensors.torch import load_file

    from untrojan.triggers.additive import Additive

    return Additive(load_file(folder / PATTERN)["pattern"])


def _train(config: Mapping[str, Any], place: Place, images: ImageSet) -> dict[str, Any]:
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.registry import validated
    from untrojan.training.loop import train_new
    from untrojan.training.recipe import Recipe

    recipe = validated(Recipe, config["recipe"], "recipe")
    run: dict[str, Any] = {
        "seed": config["seed"], "checkpoint": place.scratch / "training.pt",
        "description": place.label or "training",
    }  # fmt: skip
    if "pretrained" in place.inputs:
        from untrojan.attacks.hidden_trigger import train_last_layer

        model, history = train_last_layer(_model(place.inputs["pretrained"]), images, recipe, **run)
    else:
        model, history = train_new(images, config["architecture"], recipe, device=_device(), **run)
    save_checkpoint(place.out / MODEL, model, images.class_names)
    last = history.epochs[-1]
    return {"unchanged": False, "images": len(images), "loss": last.loss, "fit": last.accuracy}


def _model(folder: Path) -> Classifier:
    from untrojan.models.checkpoints import load_checkpoint

    # The plan's architecture has been checked; naming it is what lets a user's own factory be imported.
    folder = _model_folder(folder)
    record = _record(folder)
    # A defence may have altered the net, which it then says.
    architecture = record["summary"].get("architecture", record["config"]["architecture"])
    return load_checkpoint(folder / MODEL, architecture)[0].to(_device())


def _model_folder(folder: Path) -> Path:
    """Where the model of a train or retrain stage lies."""
    link = folder / "same-as"
    # Only the last parts are taken: the store may have been moved since.
    if link.exists():
        kind, key = Path(link.read_text()).parts[-2:]
        return folder.parent.parent / kind / key
    return folder


def _flags(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / FLAGS)["flagged"]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    return found


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = _record(folder)["summary"]
    return found
