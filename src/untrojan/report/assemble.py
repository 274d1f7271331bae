"""From what an audit has in hand (the set, the cleanser's report) to what its page shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.report.audit_page import (
    MOST_EXAMPLES,
    MOST_THUMBNAILS,
    AuditPage,
    BeforeAfter,
    FlaggedImages,
    Opinion,
    PairStatistics,
    ProbeCheck,
    RunFacts,
    TargetFinding,
)
from untrojan.triggers.base import to_bytes


@dataclass(frozen=True, eq=False)
class Truth:
    """What only a demo or an evaluation knows."""

    poisoned: Tensor | None = None
    """bool (N,)."""
    patterns: Mapping[int, Tensor] | None = None
    """By target class, float (C, H, W) in [-1, 1]."""


def assemble(
    train: ImageSet,
    report: CleansingReport,
    *,
    subject: str,
    predicted: Tensor | None = None,
    truth: Truth | None = None,
    comparison: BeforeAfter | None = None,
    probe: ProbeCheck | None = None,
    run: RunFacts | None = None,
    opinions: tuple[Opinion, ...] = (),
    listing: str = "",
    notes: tuple[str, ...] = (),
) -> AuditPage:
    """The page of one audit.

    ``predicted`` is int64 (N,): the class read of each image once the pattern of its label is removed; only
    the flagged rows are used. Examples and thumbnails are the flagged images of highest score, each detected
    target getting its share.
    """
    evidence = report.evidence
    truth = truth or Truth()
    findings = tuple(
        _finding(train, report, rank, predicted, (truth.patterns or {}).get(target))
        for rank, target in enumerate(report.targets)
    )
    total = int(report.flagged.sum())
    return AuditPage(
        verdict=report.verdict,
        subject=subject,
        class_names=train.class_names,
        images=len(train),
        image_shape=train.image_shape,
        reason=report.reason,
        p_value=evidence.get("p_value"),
        log10_p_value=evidence.get("log10_p_value"),
        threshold=float(evidence.get("threshold", 0.05)),
        flagged_total=total,
        targets=findings,
        pairs=_pairs(evidence, train.num_classes),
        flagged=_thumbnails(train, report, predicted, truth.poisoned, listing) if total else None,
        comparison=comparison,
        probe=probe,
        run=run,
        opinions=opinions,
        notes=notes,
    )


def _pairs(evidence: Mapping[str, Any], classes: int) -> PairStatistics | None:
    if evidence.get("norms") is None:
        return None
    norms = torch.as_tensor(evidence["norms"], dtype=torch.float64)
    null = evidence.get("null")
    density = (float(null["shape"]), float(null["location"]), float(null["scale"])) if null else None
    return PairStatistics(norms.view(classes, classes), density)


def _finding(
    train: ImageSet, report: CleansingReport, rank: int, predicted: Tensor | None, true_pattern: Tensor | None
) -> TargetFinding:
    target = report.targets[rank]
    rows = _most_suspicious(report, (train.labels == target) & report.flagged)
    pattern = report.evidence.get("patterns", {}).get(target)
    examples = rows[:MOST_EXAMPLES]
    before = train.images[examples]
    reads = (
        torch.bincount(predicted[rows], minlength=train.num_classes).tolist() if predicted is not None else []
    )
    return TargetFinding(
        target=target,
        sources=report.sources[rank] if rank < len(report.sources) else (),
        # The set's own p-value is that of its most certain target; it says nothing of the others.
        p_value=report.evidence.get("p_value") if rank == 0 else None,
        log10_p_value=report.evidence.get("log10_p_value") if rank == 0 else None,
        pattern=pattern,
        true_pattern=true_pattern,
        flagged=len(rows),
        class_size=int((train.labels == target).sum()),
        reads_as={index: count for index, count in enumerate(reads) if count},
        before=before if pattern is not None else None,
        after=to_bytes(before.float() / 255 - pattern.cpu()) if pattern is not None else None,
        example_ids=tuple(map(str, train.ids[examples.numpy()])),
        read_after=tuple(predicted[examples].tolist()) if predicted is not None else (),
    )


def _most_suspicious(report: CleansingReport, among: Tensor) -> Tensor:
    """Rows of a mask (N,), highest score first, ties in their order."""
    rows = among.nonzero().flatten()
    return rows[report.scores[rows].argsort(descending=True, stable=True)]


def _thumbnails(
    train: ImageSet,
    report: CleansingReport,
    predicted: Tensor | None,
    poisoned: Tensor | None,
    listing: str,
) -> FlaggedImages:
    share = max(1, MOST_THUMBNAILS // max(1, len(report.targets)))
    by_target = [
        _most_suspicious(report, (train.labels == target) & report.flagged)[:share]
        for target in report.targets
    ]
    rows = torch.cat(by_target) if by_target else _most_suspicious(report, report.flagged)
    rows = rows[:MOST_THUMBNAILS]
    return FlaggedImages(
        images=train.images[rows],
        ids=tuple(map(str, train.ids[rows.numpy()])),
        labels=tuple(train.labels[rows].tolist()),
        predicted=tuple(predicted[rows].tolist()) if predicted is not None else (),
        truly_poisoned=tuple(poisoned[rows].tolist()) if poisoned is not None else (),
        total=int(report.flagged.sum()),
        listing=listing,
    )
