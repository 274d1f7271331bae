"""The data owner's whole job: is this training set poisoned, by which pattern, which images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from untrojan.cost import Cost, measure
from untrojan.data.image_set import ImageSet, Splits
from untrojan.defenses.cleansing.by_class import REMOVES_ALWAYS, ClassCleanser
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.probe import (
    POTENT,
    ProbeCheck,
    canary_potency,
    training_accuracy,
)
from untrojan.defenses.cleansing.registry import Cleanser, build_with
from untrojan.defenses.cleansing.report import CleansingReport, Verdict
from untrojan.defenses.cleansing.several_probes import best_potency, clearest, sharing_significance
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.training.loop import train_new
from untrojan.training.presets import preset, probe_recipe
from untrojan.training.recipe import Recipe

if TYPE_CHECKING:
    from untrojan.report.assemble import Truth
    from untrojan.report.audit_page import BeforeAfter
    from untrojan.runs import RunFolder

PROBES = ("the probe", "the second probe")
FITTED = 0.5
"""Below this share of training images predicted as labelled, a probe has not learned the set."""


@dataclass(frozen=True)
class AuditOptions:
    """How an audit is carried out."""

    methods: tuple[str, ...] = ("reverse-engineering",)
    """Names of ``untrojan.defenses.cleansing.registry.CLEANSERS``. The first gives the verdict and says which
    images to remove; the others are asked for their opinion of the same probe net."""
    level: str | None = None
    """Where methods that judge by features take them; None: where each does by default."""
    calibrate: bool = False
    """Judge by p-values in place of published thresholds, in methods that have any."""
    schedule: Literal["fast", "paper"] = "fast"
    significance: float = 0.05
    """The p-value under which an attack is declared: the share of clean sets that may raise a false alarm."""
    net: str = "patch-cnn"
    """The architecture of the probe net."""
    recipe: str | Recipe = "auto"
    """How the probe net is trained: ``auto`` (``desk-probe`` with epochs to suit the set's size), a preset's
    name, or a recipe. It should not augment: the probe must learn
    the true pattern and not shifted copies of it (RE, section 5.2.1)."""
    second_recipe: str | Recipe | None = None
    """How a second probe is trained, which is asked as well; see
    :mod:`untrojan.defenses.cleansing.several_probes`."""
    seed: int = 0

    def cleansers(self) -> dict[str, Cleanser]:
        """The methods by name. Raises UntrojanError for an unknown one, for none, or for a level that none of
        them would look at.

        Those that, as published, remove a share of every class would call every set poisoned: an audit asks
        them for p-values.
        """
        if not self.methods:
            raise UntrojanError("an audit needs a method")
        settings: dict[str, Any] = {
            "schedule": self.schedule, "significance": self.significance, "seed": self.seed
        }  # fmt: skip
        if self.level is not None:
            settings["level"] = self.level
        if self.calibrate:
            settings["threshold"] = "calibrated"
        found = {name: build_with(name, settings) for name in self.methods}
        for name, cleanser in found.items():
            if isinstance(cleanser, ClassCleanser) and cleanser.limit == REMOVES_ALWAYS:
                found[name] = build_with(name, settings | {"threshold": "calibrated"})
        if self.level is not None and not any(isinstance(each, ClassCleanser) for each in found.values()):
            raise UntrojanError(
                f"level {self.level!r} is for methods that judge by features, and none was named: "
                "add one, as in --method re,ac"
            )
        return found

    def training(self, images: int) -> tuple[ProbeTraining, ...]:
        """How the probes are trained on a set of so many images. Raises UntrojanError for an unknown
        preset."""
        given = [self.recipe] if self.second_recipe is None else [self.recipe, self.second_recipe]
        return tuple(
            ProbeTraining(
                self.net,
                probe_recipe(images) if each == "auto" else preset(each) if isinstance(each, str) else each,
                self.seed,
            )
            for each in given
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Audit:
    """The answer, the model it was found with, and what that model could see."""

    report: CleansingReport
    model: Classifier
    check: ProbeCheck
    costs: dict[str, Cost]
    """What each stage cost."""
    probe_name: str
    """The probe's architecture, or that the model was given."""
    opinions: dict[str, CleansingReport] = field(default_factory=dict)
    """What further methods found, by name. None of it changes the report."""


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What a command prints."""

    verdict: Verdict
    reason: str
    metrics: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def audit(
    train: ImageSet,
    options: AuditOptions,
    *,
    model: Classifier | None = None,
    trusted: ImageSet | None = None,
    work: Path | None = None,
) -> Audit:
    """Train probe nets (or take ``model``, trained on ``train``), run the methods, doubt the result.

    ``trusted`` are images that are known to be clean, for methods that can use some. ``work`` holds
    checkpoints, from which a killed audit resumes. A verdict of ``clean`` stands only where a twin of the
    probe has shown that its recipe learns faint backdoors; else it becomes ``undecided``.

    Raises UntrojanError where the model's outputs do not match the classes, or a method needs trusted images
    and there are none.
    """
    cleansers, training = options.cleansers(), options.training(len(train))
    costs: dict[str, Cost] = {}
    with measure() as costs["probe net" if model is not None or len(training) == 1 else "probe nets"]:
        if model is None:
            probes = [
                how.train(train, checkpoint=_under(work, f"probe{i or ''}.pt"), name=PROBES[i])
                for i, how in enumerate(training)
            ]
        else:
            probes, training = [_fitting(model, train)], ()
    found = judge(train, probes, cleansers, training, trusted=trusted, work=work, costs=costs)
    name = options.net if model is None else "the given model"
    opinions = {method: found.reports[method] for method in options.methods[1:]}
    return Audit(found.report, probes[found.probe], found.check, costs, name, opinions)


@dataclass(frozen=True)
class ProbeTraining:
    """How a probe is trained, and its twin."""

    net: str
    """An architecture's name."""
    recipe: Recipe
    seed: int = 0

    def train(
        self, data: ImageSet, *, checkpoint: Path | None = None, device: str = "cpu", name: str = "the probe"
    ) -> Classifier:
        """A probe of this kind, resumed from ``checkpoint`` where that exists."""
        return train_new(
            data, self.net, self.recipe, seed=self.seed, checkpoint=checkpoint, device=device,
            description=f"training {name}",
        )[0]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Judgement:
    """What cleansers say of a set through some probes."""

    reports: dict[str, CleansingReport]
    """By name; the first one, whose verdict counts, in view of what the probes have learned."""
    probe: int
    """The place of the probe that the first one's answer comes from."""
    check: ProbeCheck

    @property
    def report(self) -> CleansingReport:
        return next(iter(self.reports.values()))


def judge(
    train: ImageSet,
    probes: Sequence[Classifier],
    cleansers: Mapping[str, Cleanser],
    twins: Sequence[ProbeTraining] = (),
    *,
    trusted: ImageSet | None = None,
    work: Path | None = None,
    costs: dict[str, Cost] | None = None,
    device: str = "cpu",
) -> Judgement:
    """Ask every cleanser through every probe, take each one's clearest answer, and doubt the first one's.

    ``twins`` are the probes' trainings, for the check that a clean verdict has to pass; without any it is
    not made. ``work`` is a folder for checkpoints; ``costs`` gets what each stage cost.
    """
    costs = {} if costs is None else costs
    cleansers = {name: sharing_significance(each, len(probes)) for name, each in cleansers.items()}
    answers = [
        _opinions(Features(probe, train, trusted), cleansers, costs, work, i)
        for i, probe in enumerate(probes)
    ]
    best = {name: clearest([answer[name] for answer in answers]) for name in cleansers}
    reports = {name: report for name, (report, _) in best.items()}
    first, (report, place) = next(iter(best.items()))
    canaries: dict[str, float] = {}
    if report.verdict == "clean" and twins:
        with measure() as costs["canary check"]:
            canaries = _canaries(train, twins, work, device)
    check = ProbeCheck(training_accuracy(probes[place], train), canaries)
    return Judgement(reports | {first: doubted(report, check)}, place, check)


def _fitting(model: Classifier, train: ImageSet) -> Classifier:
    if model.num_classes != train.num_classes:
        raise UntrojanError(
            f"the model has {model.num_classes} outputs and the data have {train.num_classes} classes: "
            "audit a set with the model trained on it, or let the audit train its own"
        )
    return model


def _under(work: Path | None, name: str) -> Path | None:
    return None if work is None else work / name


def _canaries(
    train: ImageSet, twins: Sequence[ProbeTraining], work: Path | None, device: str
) -> dict[str, float]:
    return best_potency([
        canary_potency(
            train, twin.net, twin.recipe, seed=twin.seed, checkpoint=_under(work, f"twin{i or ''}.pt"),
            device=device,
        )
        for i, twin in enumerate(twins)
    ])  # fmt: skip


def _opinions(
    features: Features,
    cleansers: Mapping[str, Cleanser],
    costs: dict[str, Cost],
    work: Path | None,
    probe: int,
) -> dict[str, CleansingReport]:
    """What each method says of one probe; those that judge by features share one pass over the set."""
    suffix = f" (probe {probe + 1})" if probe else ""
    by_class = [cleanser for cleanser in cleansers.values() if isinstance(cleanser, ClassCleanser)]
    if by_class:
        with measure() as costs["features" + suffix]:
            features.extract([cleanser.level for cleanser in by_class])
    reports: dict[str, CleansingReport] = {}
    for name, cleanser in cleansers.items():
        with measure() as costs[name + suffix]:
            if isinstance(cleanser, ClassCleanser):
                reports[name] = cleanser.judge(features)
            else:
                path = _under(work, f"{name}{probe or ''}.safetensors")
                reports[name] = cleanser(features.data, features.model, checkpoint=path)
    return reports


def doubted(report: CleansingReport, check: ProbeCheck) -> CleansingReport:
    """What of a verdict stands in view of what the probe has learned.

    A probe that has not even learned the classes says nothing, and a ``clean`` of one that has not learned
    faint patterns is no ``clean``.
    """
    reason = ""
    if check.training_accuracy < FITTED:
        reason = (
            f"the probe net predicts only {check.training_accuracy:.0%} of the training labels: it has "
            "hardly learned this set and shows nothing about it; train it longer or choose another net"
        )
    elif report.verdict == "clean" and check.canaries and not check.sees_faint_patterns:
        shown = ", ".join(f"{name}: {share:.0%}" for name, share in check.canaries.items())
        reason = (
            f"the probe net did not learn the auditor's own faint patterns ({shown}; {POTENT:.0%} wanted) "
            "and would have missed a backdoor as faint: train it longer or choose another net"
        )
    if not reason:
        return report
    nothing = torch.zeros_like(report.flagged)
    return replace(report, verdict="undecided", flagged=nothing, targets=(), sources=(), reason=reason)


def metrics_of(found: Audit, train: ImageSet) -> dict[str, Any]:
    """``metrics.json``: numbers for machines, classes as index and name."""
    report = found.report
    evidence = report.evidence
    return {
        "opinions": {
            name: {
                "verdict": other.verdict,
                "reason": other.reason,
                "targets": list(other.targets),
                "target_names": [train.class_names[target] for target in other.targets],
                "p_value": other.evidence.get("p_value"),
                "flagged": int(other.flagged.sum()),
                "flagged_by_both": int((other.flagged & report.flagged).sum()),
                "class_statistics": other.evidence.get("class_statistics"),
            }
            for name, other in found.opinions.items()
        },
        "detected": report.verdict == "poisoned",
        "verdict": report.verdict,
        "reason": report.reason,
        "target": report.targets[0] if report.targets else None,
        "target_name": train.class_names[report.targets[0]] if report.targets else None,
        "targets": list(report.targets),
        "sources": list(report.sources[0]) if report.sources else [],
        "source_names": [train.class_names[s] for s in report.sources[0]] if report.sources else [],
        "sources_by_target": {str(t): list(s) for t, s in zip(report.targets, report.sources, strict=True)},
        "p_value": evidence.get("p_value"),
        "log10_p_value": evidence.get("log10_p_value"),
        "flagged": int(report.flagged.sum()),
        "images": len(train),
        "probe": asdict(found.check),
        "class_names": list(train.class_names),
        "statistics": {
            key: value for key, value in evidence.items() if key not in ("patterns", "readings", "norms")
        },
        "norms": evidence.get("norms"),
    }


def run_audit(
    data: Splits,
    options: AuditOptions,
    folder: RunFolder,
    *,
    subject: str = "the training set",
    model: Classifier | None = None,
    truth: Truth | None = None,
    comparison: BeforeAfter | None = None,
    found: Audit | None = None,
) -> AuditResult:
    """Audit ``data.train`` and write the run folder's files: report, metrics, flagged list and pattern.

    ``truth`` and ``comparison`` are what only a demo or an evaluation knows; they reach the page and
    nothing else. ``found`` is an audit that was already carried out.
    """
    train = data.train
    folder.use_data("train", train)
    found = found or audit(train, options, model=model, work=folder.work)
    metrics = metrics_of(found, train)
    files = [folder.write_json("metrics.json", metrics), _write_flagged(folder, train, found)]
    files += _write_patterns(folder, found.report)
    files.append(_write_page(folder, train, found, options, subject, truth, comparison))
    return AuditResult(found.report.verdict, found.report.reason, metrics, tuple(files))


def _write_flagged(folder: RunFolder, train: ImageSet, found: Audit) -> Path:
    """The images to remove, the most suspicious first, and which other methods flag them too."""
    report = found.report
    flagged = report.flagged.nonzero().flatten()
    rows = flagged[report.scores[flagged].argsort(descending=True)].tolist()
    readings = report.evidence.get("readings")
    names = train.class_names

    def line(row: int) -> tuple[str, ...]:
        read = "" if readings is None else names[int(readings[row])]
        others = " ".join(name for name, other in found.opinions.items() if bool(other.flagged[row]))
        return str(train.ids[row]), names[int(train.labels[row])], read, others

    header = ("id", "label", "predicted after removal", "also flagged by")
    return folder.write_csv("flagged.csv", header, map(line, rows))


def _write_patterns(folder: RunFolder, report: CleansingReport) -> list[Path]:
    from untrojan.report.images import pattern_png

    patterns = report.evidence.get("patterns") or {}
    if not patterns:
        return []
    tensors = {f"target_{target}": pattern.contiguous() for target, pattern in patterns.items()}
    first = patterns[report.targets[0]]
    return [
        folder.write_tensors("pattern.safetensors", tensors),
        folder.write_bytes("pattern.png", pattern_png(first)),
    ]


def _write_page(
    folder: RunFolder,
    train: ImageSet,
    found: Audit,
    options: AuditOptions,
    subject: str,
    truth: Truth | None,
    comparison: BeforeAfter | None,
) -> Path:
    from untrojan.report.assemble import assemble
    from untrojan.report.audit_page import render_audit

    page = assemble(
        train,
        found.report,
        subject=subject,
        predicted=found.report.evidence.get("readings"),
        truth=truth,
        comparison=comparison,
        probe=_probe_section(found),
        run=_run_section(folder, train, found, options),
        opinions=_opinion_rows(found, options),
        listing="flagged.csv",
    )
    return folder.write_text("report.html", render_audit(page))


def _opinion_rows(found: Audit, options: AuditOptions) -> Any:
    """All methods side by side, the one that decides first."""
    from untrojan.report.audit_page import Opinion

    if not found.opinions:
        return ()
    reports = {options.methods[0]: found.report, **found.opinions}
    return tuple(
        Opinion(
            method=name,
            verdict=report.verdict,
            targets=report.targets,
            p_value=report.evidence.get("p_value"),
            log10_p_value=report.evidence.get("log10_p_value"),
            flagged=int(report.flagged.sum()),
            in_common=int((report.flagged & found.report.flagged).sum()),
            seconds=sum(cost.seconds for stage, cost in found.costs.items() if stage.startswith(name)),
            reason=report.reason,
        )
        for name, report in reports.items()
    )


def _probe_section(found: Audit) -> Any:
    from untrojan.report.audit_page import Check
    from untrojan.report.audit_page import ProbeCheck as Section

    accuracy = found.check.training_accuracy
    learned = "the probe has learned the classes as they are labelled"
    checks = [Check("training images predicted as labelled", f"{accuracy:.1%}", accuracy >= FITTED, learned)]
    carried = "fresh images that the auditor's own faint pattern carries over, in a twin of the probe"
    checks += [
        Check(f"canary: {name}", f"{share:.1%}", share >= POTENT, carried)
        for name, share in found.check.canaries.items()
    ]
    return Section(found.probe_name, tuple(checks))


def _run_section(folder: RunFolder, train: ImageSet, found: Audit, options: AuditOptions) -> Any:
    from untrojan.report.audit_page import RunFacts, StageCost
    from untrojan.runs import hardware, versions

    return RunFacts(
        command=f"untrojan {folder.command}",
        method=", ".join(options.methods),
        seed=options.seed,
        fingerprint=train.fingerprint(),
        settings=options.to_json(),
        versions=versions(),
        hardware={key: str(value) for key, value in hardware().items()},
        stages=tuple(StageCost(stage, **asdict(cost)) for stage, cost in found.costs.items()),
    )
