"""Which of several repairs to keep, by what clean images alone can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from untrojan.cost import Cost
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.scanning.report import ScanReport

QUICK = ("finetune", "fine-pruning", "nad", "unlearning", "neuron-pruning", "clp", "ft-sam", "i-bau")
"""The repairs that take minutes on two cores. ANP's two thousand steps, MCR's curve and the searches of MOTH
and DECK take up to ten times as long."""


def fitting(found: ScanReport | None) -> tuple[str, ...]:
    """What is tried where nothing is said: the quick ones and what hardens against what a scan found.

    Where a scan for patches found a backdoor, that is MOTH. Where it did not, there may be one all the same
    that changes the whole image, which such a scan hardly sees, and that is what DECK is for. None: before
    the scan, all that may be tried.
    """
    if found is None:
        return (*QUICK, "moth", "deck")
    return (*QUICK, "moth" if found.verdict == "poisoned" else "deck")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A repair that was tried."""

    name: str
    cost: Cost
    report: RepairReport | None = None
    """None where the method could not be used: see ``error``."""
    error: str = ""
    benign_accuracy: float = 0.0
    """Share of held-out clean images classified rightly after the repair."""
    smallest_mask: float | None = None
    """Pixels that the smallest working trigger changes after the repair, over all classes; None where no
    trigger was found to work, and where none was looked for."""
    scanned: bool = False
    """Whether triggers were looked for."""

    def within(self, accuracy_before: float, tolerance: float) -> bool:
        """Whether it was used, and cost no more accuracy than ``tolerance`` (both shares, 0 to 1)."""
        return self.report is not None and self.benign_accuracy >= accuracy_before - tolerance - 1e-9


def choose(candidates: Sequence[Candidate], accuracy_before: float, tolerance: float) -> Candidate | None:
    """Of the repairs within the tolerance, the one that leaves the largest smallest trigger; without any, the
    one that cost least accuracy; None where no method could be used.

    Only those of :func:`worth_scanning` need their triggers looked for.
    A backdoor is a shortcut, and the smallest trigger over all classes is the measure of the shortest left.
    A model for which no trigger works at all counts as the best of all. No triggered image is asked.
    """
    return max(
        worth_scanning(candidates, accuracy_before, tolerance),
        key=lambda each: (_size(each), each.benign_accuracy),
        default=None,
    )


def worth_scanning(
    candidates: Sequence[Candidate], accuracy_before: float, tolerance: float
) -> list[Candidate]:
    """Those that may be chosen: the repairs within the tolerance, without any the one that cost least."""
    usable = [each for each in candidates if each.report is not None]
    within = [each for each in usable if each.within(accuracy_before, tolerance)]
    return within or sorted(usable, key=lambda each: -each.benign_accuracy)[:1]


def _size(candidate: Candidate) -> float:
    return float("inf") if candidate.smallest_mask is None else candidate.smallest_mask
