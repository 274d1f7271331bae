"""The whole story on a data set made on the spot: poison, train, audit, cleanse, retrain, compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untrojan.attacks.poisoning import PoisonedData, Poisoning
from untrojan.audit import Audit, AuditOptions, audit, metrics_of, run_audit
from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.signs import make_signs
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.metrics.cleansing import CleansingRates, cleansing_rates
from untrojan.models.classifier import Classifier
from untrojan.training.loop import train_new
from untrojan.training.presets import preset

if TYPE_CHECKING:
    from untrojan.runs import RunFolder

NET = "patch-cnn"
ATTACK = Poisoning(
    trigger="chessboard", trigger_options={"amplitude": 3.0}, target=9, sources=(1, 4, 7), count=40
)
"""Three source classes as in RE's 3SC attacks, and a pattern that no eye finds in a photograph."""


@dataclass(frozen=True)
class Quality:
    """A model before or after the defence, measured on test images that only the demo has."""

    benign_accuracy: float
    attack_success_rate: float


def run_demo(folder: RunFolder, seed: int = 0) -> dict[str, Any]:
    """Run the demo in ``folder`` and return what ``metrics.json`` holds."""
    poisoned = ATTACK(make_signs(seed=seed), seed)
    folder.use_data("train", poisoned.train)
    undefended = _trained(poisoned.train, seed, folder.work / "undefended.pt", "training as delivered")
    before = _quality(undefended, poisoned)
    found = audit(poisoned.train, AuditOptions(net=NET, seed=seed), work=folder.work)
    cleansed = poisoned.train.select(~found.report.flagged)
    retrained = _trained(cleansed, seed, folder.work / "retrained.pt", "training after cleansing")
    after = _quality(retrained, poisoned)
    rates = cleansing_rates(found.report.flagged, poisoned.train.labels, poisoned.record)
    _write_report(folder, poisoned, found, before, after, rates, seed)
    metrics = {
        "undefended": asdict(before),
        "audit": metrics_of(found, poisoned.train),
        "cleansing": rates.to_json(),
        "retrained": asdict(after),
        "truth": {"target": ATTACK.target, "sources": list(poisoned.record.sources)},
    }
    folder.write_json("metrics.json", metrics)
    return metrics


def _trained(data: ImageSet, seed: int, checkpoint: Path, description: str) -> Classifier:
    recipe = preset("demo-victim")
    return train_new(data, NET, recipe, seed=seed, checkpoint=checkpoint, description=description)[0]


def _quality(model: Classifier, poisoned: PoisonedData) -> Quality:
    return Quality(benign_accuracy(model, poisoned.test), attack_success_rate(model, poisoned.triggered_test))


def _write_report(
    folder: RunFolder,
    poisoned: PoisonedData,
    found: Audit,
    before: Quality,
    after: Quality,
    rates: CleansingRates,
    seed: int,
) -> None:
    from untrojan.report.assemble import Truth
    from untrojan.report.audit_page import BeforeAfter, Score

    comparison = BeforeAfter(
        scores=(
            Score("trained as delivered", **asdict(before)),
            Score("trained after cleansing", **asdict(after)),
        ),
        true_positive_rate=rates.true_positive_rate,
        false_positive_rate=rates.false_positive_rate,
    )
    assert ATTACK.target is not None
    truth = Truth(poisoned.record.poisoned, {ATTACK.target: poisoned.record.tensors["pattern"]})
    run_audit(
        Splits(poisoned.train, poisoned.test),
        AuditOptions(net=NET, seed=seed),
        folder,
        subject="the demo's training set: street signs, poisoned on purpose",
        truth=truth,
        comparison=comparison,
        found=found,
    )
