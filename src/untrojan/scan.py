"""The model consumer's first question: is this model backdoored, by what, and how fragile is it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from untrojan.cost import Cost, measure
from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.report import Verdict
from untrojan.defenses.scanning.linearity import ChannelHistogram, most_linear_channels
from untrojan.defenses.scanning.registry import SCANNERS, Scanner
from untrojan.defenses.scanning.report import AddedPattern, InvertedTrigger, ScanReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier

if TYPE_CHECKING:
    from untrojan.runs import RunFolder

WITHOUT_A_VOTE = ("natural",)
"""Methods that say how fragile a model is, not whether somebody made it so: they decide only alone."""


@dataclass(frozen=True)
class ScanOptions:
    """How a scan is carried out."""

    methods: tuple[str, ...] = ("neural-cleanse",)
    """Names of ``untrojan.defenses.scanning.registry.SCANNERS``."""
    schedule: Literal["fast", "paper"] = "fast"
    linearity: bool = False
    """Show the most linear channels, too."""
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the methods; each goes to all that have it."""

    def scanners(self) -> dict[str, Scanner]:
        """The methods by name. Raises UntrojanError for an unknown one, for none, and for a wrong option."""
        if not self.methods:
            raise UntrojanError("a scan needs a method")
        known = {option: None for name in self.methods for option in SCANNERS.options(name)}
        for option in self.settings:
            if option not in known:
                methods = " or ".join(self.methods)
                raise UntrojanError(f"{methods} has no option {option!r}: choose of {', '.join(known)}")
        given = {"schedule": self.schedule, "seed": self.seed, **self.settings}
        return {name: SCANNERS.build_with(name, given) for name in self.methods}

    def to_json(self) -> dict[str, Any]:
        """For ``run.json``: one method as itself, several side by side."""
        described = [SCANNERS.describe(scanner) for scanner in self.scanners().values()]
        one = described[0] if len(described) == 1 else {"methods": described}
        return one | ({"linearity": True} if self.linearity else {})


@dataclass(frozen=True, eq=False)
class Scan:
    """All methods' answers, and the one they make together."""

    reports: dict[str, ScanReport]
    verdict: Verdict
    reason: str
    targets: tuple[int, ...]
    """Classes that a backdoor leads to, of all methods that found one."""
    linearity: tuple[ChannelHistogram, ...]
    costs: dict[str, Cost]
    """By method, and of the linearity view."""

    @property
    def voting(self) -> tuple[str, ...]:
        """The methods that the verdict is made of."""
        return _voting(self.reports)


def scan(model: Classifier, clean: ImageSet, options: ScanOptions, *, work: Path | None = None) -> Scan:
    """Ask every method about ``model``, with clean images, rightly labelled. Neither is changed.

    ``work`` holds checkpoints, from which a killed scan resumes. Raises UntrojanError as the methods do.
    """
    reports: dict[str, ScanReport] = {}
    costs: dict[str, Cost] = {}
    for name, scanner in options.scanners().items():
        place = None if work is None else work / f"{name}.safetensors"
        with measure() as costs[name]:
            reports[name] = scanner(model, clean, checkpoint=place)
    linear: tuple[ChannelHistogram, ...] = ()
    if options.linearity:
        with measure() as costs["linearity"]:
            linear = most_linear_channels(model, clean)
    return Scan(reports, *joint(reports), linear, costs)


def joint(reports: Mapping[str, ScanReport]) -> tuple[Verdict, str, tuple[int, ...]]:
    """One verdict, its reason and the target classes.

    ``poisoned`` if any method finds a backdoor; else ``undecided`` if any could not decide. Those of
    :data:`WITHOUT_A_VOTE` are heard only where nobody else is asked.
    """
    voting = {name: reports[name] for name in _voting(reports)}
    verdicts: tuple[Verdict, ...] = ("poisoned", "undecided", "clean")
    verdict = next(each for each in verdicts if any(found.verdict == each for found in voting.values()))
    agreeing = {name: found for name, found in voting.items() if found.verdict == verdict}
    targets = tuple(dict.fromkeys(target for found in agreeing.values() for target in found.targets))
    if len(reports) == 1:
        return verdict, next(iter(reports.values())).reason, targets
    return verdict, "; ".join(f"{name}: {found.reason}" for name, found in agreeing.items()), targets


def _voting(reports: Mapping[str, ScanReport]) -> tuple[str, ...]:
    return tuple(name for name in reports if name not in WITHOUT_A_VOTE) or tuple(reports)


def metrics_of(found: Scan, clean: ImageSet) -> dict[str, Any]:
    """``metrics.json``: of one method its findings, of several a joint verdict and each one's findings."""
    names = clean.class_names
    each = {name: _findings(report, clean) for name, report in found.reports.items()}
    for name, section in each.items():
        section["seconds"] = found.costs[name].seconds
    metrics: dict[str, Any] = {
        "verdict": found.verdict,
        "reason": found.reason,
        "targets": list(found.targets),
        "target_names": [names[target] for target in found.targets],
    }
    metrics |= next(iter(each.values())) if len(each) == 1 else {"methods": each}
    metrics |= {
        "class_names": list(names),
        "seconds": sum(found.costs[name].seconds for name in found.reports),
    }
    if found.linearity:
        metrics["linearity"] = [channel.to_json() for channel in found.linearity]
    return metrics


def _findings(found: ScanReport, clean: ImageSet) -> dict[str, Any]:
    return {
        "verdict": found.verdict,
        "reason": found.reason,
        "targets": list(found.targets),
        "target_names": [clean.class_names[target] for target in found.targets],
        "failed": list(found.failed),
        "classes": [
            {"class": label, "name": clean.class_names[label], **found.statistics[label]}
            for label in range(clean.num_classes)
        ],
        "evidence": found.evidence,
    }


def write_scan(
    folder: RunFolder, found: Scan, model: Classifier, clean: ImageSet, options: ScanOptions, subject: str
) -> dict[str, Any]:
    """Write metrics.json, the triggers, pictures of the suspected ones and report.html; the metrics."""
    metrics = metrics_of(found, clean)
    folder.write_json("metrics.json", metrics)
    several = len(found.reports) > 1
    tensors: dict[str, torch.Tensor] = {}
    pictures: dict[str, bytes] = {}
    for name, report in found.reports.items():
        prefix = f"{name}_" if several else ""
        for label, trigger in report.triggers.items():
            tensors[f"{prefix}mask_{label}"] = trigger.mask.contiguous()
            tensors[f"{prefix}pattern_{label}"] = trigger.pattern.contiguous()
        for label, added in report.patterns.items():
            tensors[f"{prefix}added_{label}"] = added.pattern.contiguous()
        for target in report.targets:
            if (shown := report.trigger_into(target)) is not None:
                pictures[f"{prefix}trigger_{target}.png"] = picture(shown)
    folder.write_tensors("triggers.safetensors", tensors)
    for place, content in pictures.items():
        folder.write_bytes(place, content)
    folder.write_text("report.html", _page(folder, found, model, clean, options, subject))
    return metrics


def picture(trigger: InvertedTrigger | AddedPattern) -> bytes:
    """The trigger on a grey ground as a PNG, every pixel enlarged to a whole square; what is added amplified
    until it can be seen."""
    from untrojan.report.images import pattern_png, png
    from untrojan.triggers.base import to_bytes

    if isinstance(trigger, AddedPattern):
        return pattern_png(trigger.pattern)
    image = to_bytes(trigger(torch.full_like(trigger.pattern, 0.5)[None]))[0]
    times = max(1, -(-256 // max(image.shape[-2:])))
    return png(image.repeat_interleave(times, 1).repeat_interleave(times, 2))


def _page(
    folder: RunFolder, found: Scan, model: Classifier, clean: ImageSet, options: ScanOptions, subject: str
) -> str:
    from untrojan.report.audit_page import RunFacts, StageCost
    from untrojan.report.scan_page import assemble_scan, render_scan
    from untrojan.runs import hardware, versions

    run = RunFacts(
        command=f"untrojan {folder.command}",
        method=", ".join(options.methods),
        seed=options.seed,
        fingerprint=clean.fingerprint(),
        settings=options.to_json(),
        versions=versions(),
        hardware={key: str(value) for key, value in hardware().items()},
        stages=tuple(StageCost(stage, **asdict(cost)) for stage, cost in found.costs.items()),
    )
    return render_scan(assemble_scan(found, model, clean, subject=subject, run=run))
