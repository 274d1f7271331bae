"""A repair from end to end: which clean images, which method, what it cost, what to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from untrojan.cost import Cost, measure
from untrojan.data.image_set import ImageSet, Splits
from untrojan.defenses.repair.auto import Candidate, choose, fitting, worth_scanning
from untrojan.defenses.repair.inverted import inversion_file, smallest_mask
from untrojan.defenses.repair.registry import REPAIRS, Repair
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.repair.tuning import apart, balanced
from untrojan.defenses.scanning.class_distance import ClassDistance
from untrojan.defenses.scanning.neural_cleanse import NeuralCleanse
from untrojan.defenses.scanning.report import ScanReport
from untrojan.distance_change import DistanceChange, DistanceProbe, few_pairs
from untrojan.errors import UntrojanError
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.models.classifier import Classifier

AUTO = "auto"
NEEDED_OF_EACH = 8
"""Clean images of each class without which no repair is tried."""
USUAL_SHARE = 0.05
HARDENED_BY: Mapping[str, Literal["mask", "feature"]] = {"moth": "mask", "deck": "feature"}
"""The distance that each hardening method enlarges."""
_SCAN_SCHEDULE: Literal["fast", "paper"] = "fast"


@dataclass(frozen=True)
class RepairOptions:
    """What is done to a model, and with how many images."""

    method: str = AUTO
    """A name of ``defenses.repair.registry.REPAIRS``; ``auto`` tries several and chooses."""
    method_options: Mapping[str, Any] = field(default_factory=dict)
    tried: tuple[str, ...] | None = None
    """What ``auto`` tries. None: :func:`~untrojan.defenses.repair.auto.fitting`."""
    tolerance: Annotated[float, Interval(ge=0, le=1)] = 0.03
    """Accuracy that ``auto`` lets a repair cost."""
    share: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Of the training images, in equal numbers of each class. None: a twentieth, or all if that is little."""
    hold_out: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Of the images, kept for measuring, where there is no test split."""
    scan: bool = False
    """Look for triggers before and after, with Neural Cleanse; ``auto`` always does."""
    distance: Literal["mask", "filter", "feature", "none"] | None = None
    """Measure class distances before and after, by patches, filters or features. None: where the method is
    one that enlarges them, by what it does so with."""
    encoder: str | None = None
    """For ``deck`` and distances by features: a name of :func:`untrojan.models.encoders.load_encoder`."""
    seed: Annotated[int, Ge(0)] = 0

    def repair(self, name: str) -> Repair:
        """The method called ``name``. Raises UntrojanError for an unknown name or option."""
        known = REPAIRS.options(name)
        options: dict[str, Any] = {"seed": self.seed} if "seed" in known else {}
        if "encoder" in known and self.encoder is not None:
            options["encoder"] = self.encoder
        return REPAIRS.build(name, {**options, **self.method_options})

    def repairs(self, found: ScanReport | None = None) -> dict[str, Repair]:
        """What will be tried, by name, where a scan ``found`` this; without it, all that may be. Raises
        UntrojanError as :meth:`repair` does, and for options that ``auto`` could not know what to do with."""
        if self.method != AUTO:
            return {self.method: self.repair(self.method)}
        if self.method_options:
            raise UntrojanError("settings belong to one method: name it instead of auto, or drop them")
        tried = fitting(found) if self.tried is None else self.tried
        return {name: self.repair(name) for name in tried}

    def distances(self) -> ClassDistance | None:
        """How class distances are measured, if they are. Raises UntrojanError for an encoder that nothing
        would be asked of."""
        measure = self.distance or HARDENED_BY.get(self.method) or "none"
        encoder = self.encoder or self.method_options.get("encoder", "local")
        repairs = self.repairs()
        if self.encoder is not None and measure != "feature" and "deck" not in repairs:
            raise UntrojanError("an encoder is for --method deck, or for --distance feature")
        if self.encoder is not None and "encoder" in self.method_options:
            raise UntrojanError("the encoder is given twice: drop the method's setting")
        if measure == "none":
            return None
        # What decoding does to an image, repair or no repair, would hide what the repair does.
        return few_pairs(measure, self.seed, encoder=encoder, relative=measure == "feature")


@dataclass(frozen=True, eq=False)
class CleanImages:
    """Two disjoint sets: what a repair may learn from, and what it is measured on."""

    repair: ImageSet
    held_out: ImageSet
    split: str
    """Where the held-out images are from: ``test``, or ``train``."""


def clean_images(data: Splits, options: RepairOptions) -> CleanImages:
    """Draw the images for a repair, class by class, and those to measure it on.

    Raises UntrojanError, saying how many are needed, where any class has too few.
    """
    if data.test is not None and len(data.test):
        pool, held_out, split = data.train, data.test, "test"
        needed = NEEDED_OF_EACH
    else:
        pool, held_out = apart(data.train, options.hold_out, options.seed, "hold-out")
        split, needed = "train", math.ceil(NEEDED_OF_EACH / (1 - options.hold_out))
    classes = data.train.num_classes
    for label, count in enumerate(pool.class_counts.tolist()):
        if count < NEEDED_OF_EACH:
            given = int((data.train.labels == label).sum())
            raise UntrojanError(
                f"too few clean images: class {data.train.class_names[label]!r} has {given}, and {needed} "
                f"are needed of each class ({needed * classes} in all): add some"
            )
    share = USUAL_SHARE if options.share is None else options.share
    of_each = round(share * len(pool) / classes)
    if of_each < NEEDED_OF_EACH and options.share is not None:
        enough = math.ceil(100 * NEEDED_OF_EACH * classes / len(pool)) / 100
        raise UntrojanError(
            f"a share of {share:g} of {len(pool)} images is {of_each} of each class, and {NEEDED_OF_EACH} "
            f"are needed: pass --share {min(enough, 1.0):g} or more"
        )
    if share == 1 or of_each < NEEDED_OF_EACH:
        return CleanImages(pool, held_out, split)
    chosen = balanced(pool, of_each, options.seed, "repair images")
    return CleanImages(pool.select(chosen), held_out, split)


@dataclass(frozen=True, eq=False)
class Repaired:
    """A repair's outcome: everything that is written down of it."""

    model: Classifier
    method: str
    report: RepairReport
    images: CleanImages
    accuracy_before: float
    accuracy_after: float
    costs: dict[str, Cost]
    """By stage."""
    scan_before: ScanReport | None = None
    scan_after: ScanReport | None = None
    candidates: tuple[Candidate, ...] = ()
    """All that ``auto`` tried."""
    within_tolerance: bool = True
    """Whether the one chosen costs no more accuracy than ``auto`` was told to accept."""
    distance: DistanceChange | None = None


def run_repair(
    model: Classifier, images: CleanImages, options: RepairOptions, work: Path | None = None
) -> Repaired:
    """Repair a copy of ``model``; the model itself is left as it is, bit for bit.

    ``work`` is a folder for checkpoints: a run that was cut off goes on where it was. Raises UntrojanError
    for a model that is no better than chance, for a network that the method cannot repair, and, of ``auto``,
    where no method can.
    """
    measuring = options.distances()
    costs: dict[str, Cost] = {}
    with measure() as costs["accuracy before"]:
        before = benign_accuracy(model, images.held_out)
    check_above_chance(before, images.held_out)
    scanning = options.scan or options.method == AUTO
    scan_before, probe = None, None
    if scanning:
        place = work and inversion_file(work, _SCAN_SCHEDULE, options.seed)
        with measure() as costs["scan before"]:
            scan_before = _scan(model, images.repair, options.seed, place)
    if measuring is not None:
        place = work and work / "distances-before.safetensors"
        with measure() as costs["class distances before"]:
            probe = DistanceProbe.of(model, images.repair, images.held_out, measuring, place)
    repairs = options.repairs(scan_before)
    candidates, scans = _tried_all(model, images, options, repairs, before, work, costs)
    chosen = choose(candidates, before, options.tolerance)
    if chosen is None or chosen.report is None:
        reasons = "; ".join(f"{each.name}: {each.error}" for each in candidates)
        raise UntrojanError(f"no method could repair this model ({reasons})")
    change = None
    if probe is not None:
        place = work and work / f"distances-{chosen.name}.safetensors"
        with measure() as costs["class distances after"]:
            change = probe.compare(chosen.report.model, place)
    return Repaired(
        model=chosen.report.model,
        method=chosen.name,
        report=chosen.report,
        images=images,
        accuracy_before=before,
        accuracy_after=chosen.benign_accuracy,
        costs=costs,
        scan_before=scan_before,
        scan_after=scans.get(chosen.name),
        candidates=tuple(candidates) if options.method == AUTO else (),
        within_tolerance=chosen.within(before, options.tolerance),
        distance=change,
    )


def _tried_all(
    model: Classifier, images: CleanImages, options: RepairOptions, repairs: Mapping[str, Repair],
    before: float, work: Path | None, costs: dict[str, Cost],
) -> tuple[list[Candidate], dict[str, ScanReport]]:  # fmt: skip
    """Every method's outcome, and the scans of what may be chosen. What each cost is added to ``costs``."""
    candidates: list[Candidate] = []
    for name, repair in repairs.items():
        candidate = _tried(name, repair, model, images, work)
        costs[f"repair: {name}"] = candidate.cost
        if candidate.report is None and options.method != AUTO:
            raise UntrojanError(candidate.error)
        candidates.append(candidate)
    scans: dict[str, ScanReport] = {}
    if not options.scan and options.method != AUTO:
        return candidates, scans
    worth = worth_scanning(candidates, before, options.tolerance)
    for i, candidate in enumerate(candidates):
        if candidate.report is None or candidate not in worth:
            continue
        place = work and work / f"{candidate.name}-after.safetensors"
        with measure() as costs[f"scan after: {candidate.name}"]:
            scan = _scan(candidate.report.model, images.repair, options.seed, place)
        scans[candidate.name], smallest = scan, smallest_mask(scan)
        pixels = None if smallest is None else smallest[1]
        candidates[i] = replace(candidate, smallest_mask=pixels, scanned=True)
    return candidates, scans


def _tried(name: str, repair: Repair, model: Classifier, images: CleanImages, work: Path | None) -> Candidate:
    """One method's outcome; what it says it cannot do is an outcome too."""
    with measure() as cost:
        try:
            report = repair(model, images.repair, checkpoint=work and work / f"{name}.pt")
        except UntrojanError as error:
            return Candidate(name, cost, error=str(error))
    return Candidate(name, cost, report, benign_accuracy=benign_accuracy(report.model, images.held_out))


def _scan(model: Classifier, clean: ImageSet, seed: int, checkpoint: Path | None) -> ScanReport:
    return NeuralCleanse(schedule=_SCAN_SCHEDULE, seed=seed)(model, clean, checkpoint=checkpoint)


def check_above_chance(accuracy: float, held_out: ImageSet) -> None:
    """Raise UntrojanError for a model that guesses: it is right once in K, and three standard errors above
    that are no luck."""
    chance = 1 / held_out.num_classes
    margin = 3 * math.sqrt(chance * (1 - chance) / len(held_out))
    if accuracy <= chance + margin:
        raise UntrojanError(
            f"the model is right on {accuracy:.0%} of {len(held_out)} clean images, no better than chance "
            f"({chance:.0%}): nothing to repair; see that its classes are in the data's order and its "
            "normalisation (--mean, --std) is right"
        )


def metrics_of(done: Repaired) -> dict[str, Any]:
    """What ``metrics.json`` holds."""
    total = Cost(
        seconds=sum(cost.seconds for cost in done.costs.values()),
        forwards=sum(cost.forwards for cost in done.costs.values()),
        backwards=sum(cost.backwards for cost in done.costs.values()),
        images=sum(cost.images for cost in done.costs.values()),
        peak_memory_mb=max(cost.peak_memory_mb for cost in done.costs.values()),
    )
    return {
        "method": done.method,
        "benign_accuracy": {"before": done.accuracy_before, "after": done.accuracy_after},
        "images": {
            "repair": len(done.images.repair),
            "held_out": len(done.images.held_out),
            "held_out_from": done.images.split,
        },
        "scan": {
            name: _scan_metrics(scan)
            for name, scan in (("before", done.scan_before), ("after", done.scan_after))
            if scan is not None
        },
        "candidates": [
            {
                "method": each.name,
                "error": each.error or None,
                "benign_accuracy": None if each.error else each.benign_accuracy,
                "scanned": each.scanned,
                "smallest_mask": each.smallest_mask,
                "cost": each.cost.to_json(),
            }
            for each in done.candidates
        ],
        "within_tolerance": done.within_tolerance if done.candidates else None,
        "class_distance": None if done.distance is None else done.distance.to_json(),
        "details": {key: value for key, value in done.report.history.items() if not _is_table(value)},
        "cost": {"total": total.to_json(), **{name: cost.to_json() for name, cost in done.costs.items()}},
    }


def _scan_metrics(scan: ScanReport) -> dict[str, Any]:
    smallest = smallest_mask(scan)
    return {
        "verdict": scan.verdict,
        "reason": scan.reason,
        "targets": list(scan.targets),
        "smallest_mask": None if smallest is None else {"class": smallest[0], "pixels": smallest[1]},
        "classes": {str(label): values for label, values in scan.statistics.items()},
    }


def history_table(history: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of ``history.csv``: all the tables of a repair's history, one after another."""
    rows = [
        {"table": name, "step": number + 1, **row}
        for name, table in history.items()
        if _is_table(table)
        for number, row in enumerate(table)
    ]
    header = list(dict.fromkeys(key for row in rows for key in row)) or ["table", "step"]
    return header, [[row.get(key) for key in header] for row in rows]


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
