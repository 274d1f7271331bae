"""The figures a cell can yield, by name: what plans put into columns and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["share", "yes", "number", "seconds"]


@dataclass(frozen=True)
class Measure:
    """One figure of a cell's result."""

    label: str
    kind: Kind
    """``share`` is 0..1 and shown in percent, ``yes`` is true or false and counted."""
    of_defense: bool = True
    """Whether it says something of the defence, so that a cell whose attack does not work is left out."""


MEASURES: Mapping[str, Measure] = {
    "undefended.attack_success": Measure("ASR", "share", of_defense=False),
    "undefended.benign_accuracy": Measure("ACC", "share", of_defense=False),
    "undefended.accuracy_drop": Measure("ACC below clean", "share", of_defense=False),
    "undefended.poison_fit": Measure("poison learned", "share", of_defense=False),
    **{
        f"undefended.{key}_{level}": Measure(f"{label} {level}", "number", of_defense=False)
        for level in ("s1", "s2", "s3")
        for key, label in (
            ("mmd", "MMD²"),
            ("mmd_unbiased", "unbiased MMD²"),
            ("intra", "intra-class"),
            ("inter", "inter-class"),
        )
    },
    **{
        f"undefended.{key}_{level}": Measure(f"{label} {level}", "share", of_defense=False)
        for level in ("s1", "s2", "s3")
        for key, label in (
            ("mmd_reduction", "MMD² cut"),
            ("mmd_unbiased_reduction", "unbiased MMD² cut"),
        )
    },
    **{
        f"undefended.above_inter_{level}": Measure(f"MMD² {level} above inter-class", "yes", of_defense=False)
        for level in ("s1", "s2", "s3")
    },
    "undefended.attack_success_cost": Measure("ASR below regular", "share", of_defense=False),
    "undefended.benign_accuracy_cost": Measure("ACC below regular", "share", of_defense=False),
    "exposure.f1": Measure("F1", "share"),
    "exposure.best_f1": Measure("best F1", "share"),
    "exposure.auc": Measure("AUC", "share"),
    "exposure.power": Measure("triggered suspected", "share"),
    "exposure.false_suspects": Measure("clean suspected", "share"),
    "exposure.detected": Measure("detected", "yes"),
    "exposure.false_alarm": Measure("false alarm", "yes"),
    "exposure.triggered": Measure("triggered images", "number"),
    "pruning.attack_success": Measure("ASR left for 5 points of ACC", "share"),
    "pruning.pruned": Measure("neurons pruned for that", "share"),
    "pruning.benign_accuracy": Measure("ACC then", "share"),
    "pruning.needed_cost": Measure("ACC lost for an ASR below 10 %", "share"),
    "clean_model.attack_success": Measure("ASR of a clean model", "share", of_defense=False),
    "probe.attack_success": Measure("probe ASR", "share"),
    "probe.benign_accuracy": Measure("probe ACC", "share"),
    "probe.poison_fit": Measure("probe: poison learned", "share"),
    "audit.log10_p_value": Measure("log10 p", "number"),
    "audit.log10_p_value_uncalibrated": Measure("log10 p, uncalibrated", "number"),
    "audit.weakest_canary": Measure("weakest canary", "share"),
    "audit.flagged": Measure("flagged", "number"),
    "audit.seconds": Measure("audit s", "seconds"),
    "audit.images": Measure("audit images", "number"),
    "detection.detected": Measure("detected", "yes"),
    "detection.right_target": Measure("right target", "yes"),
    "detection.right_source": Measure("right source", "yes"),
    "detection.false_alarm": Measure("false alarm", "yes"),
    "detection.undecided": Measure("undecided", "yes"),
    "cleansing.true_positive_rate": Measure("TPR", "share"),
    "cleansing.false_positive_rate": Measure("FPR", "share"),
    "cleansing.removed": Measure("removed", "number"),
    "cleansing.missed": Measure("missed", "number"),
    "cleansing.precision": Measure("precision", "share"),
    "dropping.true_positive_rate": Measure("recall", "share"),
    "dropping.false_positive_rate": Measure("FPR", "share"),
    "dropping.precision": Measure("precision", "share"),
    "dropping.removed": Measure("dropped", "number"),
    "dropping.falsely_removed": Measure("dropped clean", "number"),
    "defended.attackers_expelled": Measure("attackers expelled", "share"),
    "defended.others_expelled": Measure("others expelled", "number"),
    "defense.seconds": Measure("defence s", "seconds"),
    "scan.anomaly_index": Measure("largest anomaly index", "number"),
    "scan.log10_p_value": Measure("log10 p", "number"),
    "scan.smallest_mask": Measure("smallest mask", "number"),
    "scan.mean_max_reasr": Measure("mean MAX-REASR", "share"),
    "scan.images": Measure("clean images", "number"),
    "scan.seconds": Measure("scan s", "seconds"),
    "repair.images": Measure("clean images", "number"),
    "repair.seconds": Measure("repair s", "seconds"),
    "repair.forwards": Measure("forwards", "number"),
    "repair.backwards": Measure("backwards", "number"),
    "repair.passed": Measure("images passed", "number"),
    "robustness.before": Measure("robust ACC before", "share"),
    "robustness.after": Measure("robust ACC", "share"),
    "robustness.cost": Measure("robust ACC below undefended", "share"),
    "distance.before": Measure("distance before", "number"),
    "distance.after": Measure("distance", "number"),
    "distance.increase": Measure("distance increase", "share"),
    "distance.works_before": Measure("generated ASR before", "share"),
    "distance.works_after": Measure("generated ASR", "share"),
    "retrained.attack_success": Measure("retrained ASR", "share"),
    "retrained.above_clean_model": Measure("ASR above a clean model's", "share"),
    "retrained.benign_accuracy": Measure("retrained ACC", "share"),
    "retrained.accuracy_drop": Measure("retrained ACC below clean", "share"),
    # Of the model that one ends with: the training defence's, the repaired or the retrained one, else the
    # victim.
    "final.attack_success": Measure("ASR", "share"),
    "final.above_clean_model": Measure("ASR above a clean model's", "share"),
    "final.benign_accuracy": Measure("BA", "share"),
    "final.accuracy_drop": Measure("BA below clean", "share"),
    "final.accuracy_cost": Measure("BA below undefended", "share"),
}

BESIDE_REGULAR: Mapping[str, str] = {
    **{
        f"undefended.{key}_reduction_{level}": f"undefended.{key}_{level}"
        for level in ("s1", "s2", "s3")
        for key in ("mmd", "mmd_unbiased")
    },
    "undefended.attack_success_cost": "undefended.attack_success",
    "undefended.benign_accuracy_cost": "undefended.benign_accuracy",
}
"""Measures of an infected model that need its regularly trained twin, and what of both they compare: a
``_reduction`` is a share of the twin's figure, a ``_cost`` a difference."""

FINAL = ("defended", "repaired", "retrained", "undefended")
"""Sections of a cell's result that tell of a model, the one that counts in the end first."""


def value_of(result: Mapping[str, Any], name: str) -> float | None:
    """A figure out of a result file's content; None where the cell does not yield it."""
    section, _, key = name.partition(".")
    if name in ("audit.seconds", "audit.images"):
        parts = [part for part in result.get("cost", ()) if part.get("kind") == "audit"]
        return float(sum(part.get(key, 0.0) for part in parts)) if parts else None
    if name == "defense.seconds":
        parts = [part for part in result.get("cost", ()) if part.get("kind") in ("defend", "repair")]
        return float(sum(part.get(key, 0.0) for part in parts)) if parts else None
    sections = result.get("result") or {}
    if section == "final":
        return _final(sections, key)
    if name == "retrained.above_clean_model":
        return _above_clean_model(sections.get(section), sections)
    if key.startswith("above_inter_"):
        return _above_inter(sections.get(section), key.removeprefix("above_inter_"))
    found = sections.get(section)
    return _number(found, key)


def beside_regular(values: Mapping[str, float], regular: Mapping[str, float]) -> dict[str, float]:
    """The measures of :data:`BESIDE_REGULAR`, as far as both cells yield what they need."""
    found = {}
    for name, of in BESIDE_REGULAR.items():
        if of not in values or of not in regular:
            continue
        less = regular[of] - values[of]
        if name.endswith("_cost"):
            found[name] = less
        elif regular[of] > 0:
            found[name] = less / regular[of]
    return found


def _final(sections: Mapping[str, Any], key: str) -> float | None:
    model = next((sections[each] for each in FINAL if each in sections), None)
    if key == "above_clean_model":
        return _above_clean_model(model, sections)
    if key != "accuracy_cost":
        return _number(model, key)
    after = _number(model, "benign_accuracy")
    before = _number(sections.get("undefended"), "benign_accuracy")
    return None if after is None or before is None else before - after


def _above_clean_model(model: Any, sections: Mapping[str, Any]) -> float | None:
    """What is left of a backdoor: no defence goes below what a model takes for the target without any."""
    after = _number(model, "attack_success")
    without = _number(sections.get("clean_model"), "attack_success")
    return None if after is None or without is None else after - without


def _above_inter(found: Any, level: str) -> float | None:
    """Whether triggered images lie farther from the target's clean ones than the nearest other class does."""
    apart, nearest = _number(found, f"mmd_{level}"), _number(found, f"inter_{level}")
    return None if apart is None or nearest is None else float(apart > nearest)


def _number(found: Any, key: str) -> float | None:
    value = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, int | float) else None
