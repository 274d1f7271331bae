"""From what a repair has in hand to what its page shows."""

from __future__ import annotations

from dataclasses import asdict

from untrojan.defenses.repair.inverted import smallest_mask
from untrojan.defenses.repair.registry import Repair
from untrojan.defenses.scanning.report import ScanReport
from untrojan.registry import options_of
from untrojan.repair import Repaired, RepairOptions
from untrojan.report.audit_page import RunFacts, StageCost
from untrojan.report.repair_page import Look, RepairPage, Tried
from untrojan.runs import hardware, versions


def assemble_repair(done: Repaired, asked: RepairOptions, subject: str, method: Repair) -> RepairPage:
    """The page of one repair; ``method`` is the one that was kept, ``subject`` the model's file."""
    run = RunFacts(
        command="untrojan repair",
        method=done.method,
        seed=asked.seed,
        fingerprint=done.images.repair.fingerprint(),
        settings=options_of(method),
        versions=versions(),
        hardware={key: str(value) for key, value in hardware().items()},
        stages=tuple(StageCost(stage, **asdict(cost)) for stage, cost in done.costs.items()),
    )
    return RepairPage(
        subject=subject,
        method=done.method,
        class_names=done.images.repair.class_names,
        accuracy_before=done.accuracy_before,
        accuracy_after=done.accuracy_after,
        held_out=len(done.images.held_out),
        held_out_split=done.images.split,
        repair_images=len(done.images.repair),
        tolerance=asked.tolerance,
        history=done.report.history,
        before=_look(done.scan_before),
        after=_look(done.scan_after),
        tried=tuple(
            Tried(
                each.name,
                None if each.error else each.benign_accuracy,
                each.smallest_mask,
                each.cost.seconds,
                chosen=each.name == done.method,
                within_tolerance=each.within(done.accuracy_before, asked.tolerance),
                scanned=each.scanned,
                error=each.error,
            )
            for each in done.candidates
        ),
        distance=done.distance,
        run=run,
    )


def _look(scan: ScanReport | None) -> Look | None:
    if scan is None:
        return None
    smallest = smallest_mask(scan)
    if smallest is None:
        return Look(scan.verdict, scan.reason)
    trigger = scan.triggers[smallest[0]]
    return Look(scan.verdict, scan.reason, *smallest, mask=trigger.mask, pattern=trigger.pattern)
