"""One question put to several probe nets, for no single net sees every kind of backdoor best.

A net trained on shifted and mirrored images learns small local patterns rather than details of single
images, and is not drawn away by adversarial directions. To a pattern over the whole image it answers in each
of its shifts, so that at the outset no gradient leads to any of them: a net that was not augmented, the one
RE asks for, answers to the true pattern alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from untrojan.defenses.cleansing.report import CleansingReport

T = TypeVar("T")


def sharing_significance(cleanser: T, probes: int) -> T:
    """The cleanser for one of so many probes: each has its part of the false alarms that are allowed.

    A cleanser that judges by no significance is returned as it is.
    """
    significance = getattr(cleanser, "significance", None)
    if significance is None or probes == 1:
        return cleanser
    return cast("T", dataclasses.replace(cast("Any", cleanser), significance=significance / probes))


def clearest(reports: Sequence[CleansingReport]) -> tuple[CleansingReport, int]:
    """Of one cleanser's reports through several probes the one that tells most, and its place.

    A poisoned one before an undecided one before a clean one, and of equals the smallest p-value, which is
    then corrected for the number of probes. A set is clean only if all say so. Of several that find the same
    targets, the one counts that tells carriers of the pattern from other images best (``separations`` in the
    evidence): an adversarial pattern may be small, and clear evidence, but it moves clean images as well.
    """
    order = ("poisoned", "undecided", "clean")
    first = min(range(len(reports)), key=lambda i: (order.index(reports[i].verdict), _log10_p(reports[i])))
    if len(reports) == 1:
        return reports[first], first
    agreeing = [
        i
        for i, report in enumerate(reports)
        if report.verdict == "poisoned" and set(report.targets) == set(reports[first].targets)
    ]
    place = max(agreeing, key=lambda i: (_separation(reports[i]), i == first), default=first)
    chosen, strongest = reports[place], reports[first].evidence
    evidence = dict(chosen.evidence)
    if strongest.get("log10_p_value") is not None:
        evidence["log10_p_value"] = min(0.0, strongest["log10_p_value"] + math.log10(len(reports)))
    if strongest.get("p_value") is not None:
        evidence["p_value"] = min(1.0, strongest["p_value"] * len(reports))
    evidence["probe"] = place
    evidence["verdicts_by_probe"] = [report.verdict for report in reports]
    evidence["log10_p_values_by_probe"] = [report.evidence.get("log10_p_value") for report in reports]
    evidence["separations_by_probe"] = [report.evidence.get("separations") for report in reports]
    return dataclasses.replace(chosen, evidence=evidence), place


def best_potency(by_probe: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How well the best of the probes' twins learned each canary, 0..1: one that sees it is enough."""
    names = dict.fromkeys(name for each in by_probe for name in each)
    return {name: max(each.get(name, 0.0) for each in by_probe) for name in names}


def _log10_p(report: CleansingReport) -> float:
    value = report.evidence.get("log10_p_value")
    return 0.0 if value is None else float(value)


def _separation(report: CleansingReport) -> float:
    """Of the target whose carriers are told apart worst; 0 where a cleanser does not say."""
    return min(report.evidence.get("separations", {}).values(), default=0.0)
