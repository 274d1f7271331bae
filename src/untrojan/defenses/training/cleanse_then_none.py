"""Cleansing, then NONE: the audit removes what it finds, and NONE trains on what is left.

The two look in different places. RE (Xiang, Miller & Kesidis 2020) finds patterns added to images, however
faint; NONE (Wang et al. 2022) finds neurons that a patch has made linear.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from untrojan.audit import ProbeTraining, judge
from untrojan.cost import measure
from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.registry import CLEANSERS, Cleanser
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.defenses.training.none import NONE
from untrojan.defenses.training.report import TrainingReport, keeping_every_class
from untrojan.registry import validated
from untrojan.training.presets import preset, probe_recipe
from untrojan.training.recipe import Recipe


@dataclass(frozen=True)
class CleanseThenNONE:
    """A probe trained on the set, a cleanser asked about it, NONE on what the cleanser leaves.

    Raises UntrojanError for a setting that the cleanser or NONE does not take.
    """

    cleanser: str = "reverse-engineering"
    """A name of ``untrojan.defenses.cleansing.registry.CLEANSERS``."""
    cleanser_options: dict[str, Any] = field(default_factory=dict)
    none_options: dict[str, Any] = field(default_factory=dict)
    probe_net: str | None = None
    """The probe's architecture; None: the model's own."""
    probe_recipe: str = "auto"
    """A preset's name; ``auto``: ``desk-probe`` with epochs to suit the set's size, as in an audit."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._cleanser()
        self._none()
        self._probe_recipe(1)

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport:  # fmt: skip
        """Train a new classifier on ``data``, of which some images may be poisoned.

        ``dropped`` is what either removed. A verdict that a probe cannot bear removes nothing. Raises
        UntrojanError as NONE does, and as the cleanser does for a set it cannot judge.
        """
        with measure() as cost:
            found = self._cleanse(data, architecture, checkpoint, device)
        flagged, kept_classes = keeping_every_class(found.flagged, data)
        rest = data.select(~flagged)
        place = None if checkpoint is None else checkpoint.with_name(f"none-{checkpoint.name}")
        report = self._none()(rest, architecture, recipe, checkpoint=place, device=device)
        cleansing = {
            "method": self.cleanser,
            "verdict": found.verdict,
            "reason": found.reason,
            "targets": list(found.targets),
            "p_value": found.evidence.get("p_value"),
            "dropped": int(flagged.sum()),
            "classes_kept_whole": kept_classes,
            "cost": cost.to_json(),
        }
        dropped = in_given_rows(flagged, report.dropped)
        evidence = {**report.evidence, "cleansing": cleansing, "dropped_by_none": int(report.dropped.sum())}
        return TrainingReport(report.model, dropped, report.history, evidence)

    def _cleanse(
        self, data: ImageSet, architecture: str, checkpoint: Path | None, device: str
    ) -> CleansingReport:
        name = None if checkpoint is None else checkpoint.with_name(f"probe-{checkpoint.name}")
        how = ProbeTraining(self.probe_net or architecture, self._probe_recipe(len(data)), self.seed)
        probe = how.train(data, checkpoint=name, device=device)
        work = None if checkpoint is None else checkpoint.parent
        return judge(data, [probe], {self.cleanser: self._cleanser()}, work=work).report

    def _cleanser(self) -> Cleanser:
        seed = {"seed": self.seed} if hasattr(CLEANSERS.get(self.cleanser), "seed") else {}
        return CLEANSERS.build(self.cleanser, seed | self.cleanser_options)

    def _none(self) -> NONE:
        return validated(NONE, {"seed": self.seed} | self.none_options, "none_options")

    def _probe_recipe(self, images: int) -> Recipe:
        return probe_recipe(images) if self.probe_recipe == "auto" else preset(self.probe_recipe)


def in_given_rows(first: Tensor, second: Tensor) -> Tensor:
    """bool (N,): what ``first`` (N,) or, among the rows that it leaves, ``second`` marks."""
    union = first.clone()
    union[(~first).nonzero().flatten()[second]] = True
    return union
