"""The page a scan ends with: verdict, suspected triggers at work, every class's figures, what was run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.report import Verdict
from untrojan.defenses.scanning.linearity import ChannelHistogram
from untrojan.defenses.scanning.report import AddedPattern, InvertedTrigger, ScanReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.report.activations import activation_histogram
from untrojan.report.audit_page import RunFacts
from untrojan.report.environment import environment
from untrojan.report.heat_map import heat_map
from untrojan.report.images import affordable_side, amplification_for, data_uri, pattern_image, reduced
from untrojan.triggers.base import to_bytes

if TYPE_CHECKING:
    from untrojan.scan import Scan

MOST_TRIGGERS = 6
"""Suspected triggers a method shown with pictures."""
MOST_EXAMPLES = 3
MOST_CHANNELS = 12
MOST_CLASSES = 200
_TRIGGER_BYTES, _EXAMPLE_BYTES = 500_000, 600_000

COLUMNS: Mapping[str, str] = {
    "mask_size": "Trigger size, pixels",
    "anomaly_index": "Anomaly index",
    "flip_fraction": "Images that flip",
    "reasr": "Attack success of the trigger",
    "gain": "Logit gain when stimulated",
    "median_distance": "Median distance from other classes",
    "least_distance": "Least distance",
    "pair_anomaly_index": "Anomaly index of its nearest pair",
    "smallest_norm": "Norm of the smallest added pattern",
    "log10_p_value": "log10 p",
    "pairs_measured": "Source classes measured",
}
"""What statistics are called on the page; others by their own name."""
SHARES = frozenset({"flip_fraction", "reasr"})
TITLES: Mapping[str, str] = {
    "neural-cleanse": "Neural Cleanse: the smallest trigger into every class",
    "additive": "RE's test: the smallest pattern added to carry one class into another",
    "abs": "ABS: channels that raise one class",
    "natural": "Natural backdoors: how small patches do without any attack",
    "class-distance": "Class distance: how near every class is to every other",
}


@dataclass(frozen=True, eq=False)
class TriggerAtWork:
    """A trigger that leads to a class under suspicion, and what it does to a few clean images."""

    target: int
    trigger: InvertedTrigger | AddedPattern
    before: Tensor
    """uint8 (M, C, H, W)."""
    after: Tensor
    """uint8 (M, C, H, W): the same with the trigger."""
    labels: tuple[int, ...]
    read_before: tuple[int, ...]
    """The model's answers."""
    read_after: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class MethodSection:
    """One method's findings."""

    method: str
    report: ScanReport
    triggers: tuple[TriggerAtWork, ...] = ()
    seconds: float = 0.0
    votes: bool = True
    """Whether the page's verdict rests on its own."""


@dataclass(frozen=True, eq=False)
class ScanPage:
    """Everything a page shows."""

    verdict: Verdict
    subject: str
    """The model, as its owner calls it."""
    class_names: tuple[str, ...]
    images: int
    """Clean images it was asked with."""
    reason: str = ""
    targets: tuple[int, ...] = ()
    methods: tuple[MethodSection, ...] = ()
    linearity: tuple[ChannelHistogram, ...] = ()
    run: RunFacts | None = None


def assemble_scan(
    found: Scan, model: Classifier, clean: ImageSet, *, subject: str, run: RunFacts | None = None
) -> ScanPage:
    """The page of one scan, with each suspected trigger tried on a few of the clean images."""
    sections = tuple(
        MethodSection(
            name, report, tuple(_at_work(target, report, model, clean) for target in _pictured(report)),
            found.costs[name].seconds, name in found.voting,
        )
        for name, report in found.reports.items()
    )  # fmt: skip
    return ScanPage(
        verdict=found.verdict, subject=subject, class_names=clean.class_names, images=len(clean),
        reason=found.reason, targets=found.targets, methods=sections, linearity=found.linearity, run=run,
    )  # fmt: skip


def _pictured(report: ScanReport) -> list[int]:
    return [each for each in report.targets if report.trigger_into(each) is not None][:MOST_TRIGGERS]


def _at_work(target: int, report: ScanReport, model: Classifier, clean: ImageSet) -> TriggerAtWork:
    """One image each of the trigger's source classes, and of the first other ones that have any."""
    trigger = report.trigger_into(target)
    assert trigger is not None
    sources = report.evidence.get("sources", {}).get(str(target), [])
    present = [label for label in clean.labels.unique().tolist() if label != target]
    others = sorted(present, key=lambda label: label not in sources)[:MOST_EXAMPLES]
    rows = torch.tensor([int(clean.indices_of(label)[0]) for label in others], dtype=torch.int64)
    before = clean.images[rows]
    after = to_bytes(trigger(before.float() / 255))
    read_before, read_after = (tuple(predictions_of(model, each).tolist()) for each in (before, after))
    return TriggerAtWork(target, trigger, before, after, tuple(others), read_before, read_after)


def render_scan(page: ScanPage) -> str:
    """The page as one HTML document: no script, nothing fetched, every name escaped.

    The same page gives the same text. Raises UntrojanError for an unknown verdict.
    """
    if page.verdict not in ("clean", "poisoned", "undecided"):
        raise UntrojanError(f"no verdict {page.verdict!r}: it is clean, poisoned or undecided")
    pictured = sum(len(section.triggers) for section in page.methods)
    sections = [_section(section, page, pictured) for section in page.methods]
    drawn = [
        {"channel": each, "svg": activation_histogram(each.edges, _groups(each))}
        for each in sorted(page.linearity, key=lambda each: -each.score)[:MOST_CHANNELS]
    ]
    template = environment().get_template("scan.html")
    return template.render(page=page, sections=sections, channels=drawn)


def _groups(channel: ChannelHistogram) -> list[tuple[str, Sequence[int]]]:
    return [("surely of the class", channel.strong), ("surely not", channel.weak)]


def _section(section: MethodSection, page: ScanPage, sharing: int) -> dict[str, Any]:
    report = section.report
    present = [key for values in report.statistics.values() for key in values]
    columns = [key for key in COLUMNS if key in present]
    columns += [key for key in dict.fromkeys(present) if key not in COLUMNS]
    order = sorted(report.statistics, key=lambda label: (label not in report.targets, label))
    distances = _distances(report, len(page.class_names))
    return {
        "found": section,
        "report": report,
        "title": TITLES.get(section.method, section.method),
        "columns": [(key, COLUMNS.get(key, key.replace("_", " ")), key in SHARES) for key in columns],
        "rows": [(label, report.statistics[label]) for label in order[:MOST_CLASSES]],
        "triggers": [_trigger(each, sharing) for each in section.triggers],
        "heat_map": ""
        if distances is None
        else heat_map(distances, page.class_names, _marked(report), "distance"),
        "by_size": list(
            zip(report.evidence.get("sizes", ()), report.evidence.get("max_reasr", ()), strict=False)
        ),
    }


def _distances(report: ScanReport, classes: int) -> Tensor | None:
    """The matrix of class distances, where the method has measured one."""
    rows = report.evidence.get("distances")
    if not isinstance(rows, list) or len(rows) != classes or any(len(row) != classes for row in rows):
        return None
    values = [[math.nan if value is None else float(value) for value in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def _marked(report: ScanReport) -> list[tuple[int, int]]:
    return [(int(source), int(target)) for source, target in report.evidence.get("suspicious_pairs", ())]


def _trigger(work: TriggerAtWork, sharing: int) -> dict[str, Any]:
    """A trigger's pictures, encoded within the page's budget."""
    trigger = work.trigger
    pattern = trigger.pattern.detach().float().cpu()
    shape = tuple(pattern.shape)
    side = affordable_side(shape, 2 * sharing, _TRIGGER_BYTES)
    laid, where = pattern, {}
    if isinstance(trigger, InvertedTrigger):
        mask = trigger.mask.detach().float().cpu()
        laid, where = mask * (pattern - 0.5), _where(mask, side)
    factor = amplification_for(laid)
    small = affordable_side(shape, 2 * MOST_EXAMPLES * sharing, _EXAMPLE_BYTES)
    examples = [
        {
            "before": data_uri(reduced(work.before[i], small)),
            "after": data_uri(reduced(work.after[i], small)),
            "label": work.labels[i],
            "read_before": work.read_before[i],
            "read_after": work.read_after[i],
        }
        for i in range(len(work.labels))
    ]
    return {
        "target": work.target,
        "where": where,
        "norm": float(laid.norm()),
        "pattern": data_uri(reduced(pattern_image(laid, factor), side)),
        "amplification": factor,
        "examples": examples,
    }


def _where(mask: Tensor, side: int) -> dict[str, Any]:
    """The picture of a mask, and its size."""
    strongest = float(mask.max()) if mask.numel() else 0.0
    brighten = 1 if strongest >= 0.5 else max(1, math.floor(1 / max(strongest, 1e-3)))
    return {
        "mask": data_uri(reduced(to_bytes(mask * brighten), side)),
        "brighten": brighten,
        "pixels": float(mask.sum()),
        "share": float(mask.mean()),
    }
