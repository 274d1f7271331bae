"""Several probe nets, and whose word counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from untrojan.audit import AuditOptions, audit
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.report import CleansingReport, Verdict
from untrojan.defenses.cleansing.reverse_engineering import ReverseEngineering
from untrojan.defenses.cleansing.several_probes import best_potency, clearest, sharing_significance
from untrojan.training.recipe import Recipe


def report(verdict: Verdict, log10_p: float | None = None) -> CleansingReport:
    evidence: dict[str, Any] = {}
    if log10_p is not None:
        evidence = {"log10_p_value": log10_p, "p_value": 10**log10_p}
    return CleansingReport(verdict, torch.zeros(1, dtype=torch.bool), torch.zeros(1), evidence=evidence)


@pytest.mark.parametrize(
    ("reports", "place"),
    [
        ([report("clean", -0.1), report("clean", -0.9)], 1),
        ([report("clean", -0.9), report("poisoned", -2.0)], 1),
        ([report("poisoned", -33.0), report("poisoned", -2.0)], 0),
        ([report("clean", -1.2), report("undecided")], 1),
        ([report("undecided"), report("poisoned", -1.7)], 1),
        ([report("poisoned"), report("clean")], 0),
    ],
)
def test_the_clearest_answer_counts(reports: list[CleansingReport], place: int) -> None:
    chosen, found = clearest(reports)
    assert found == place
    assert chosen.verdict == reports[place].verdict
    assert chosen.evidence["verdicts_by_probe"] == [each.verdict for each in reports]
    before = reports[place].evidence.get("log10_p_value")
    if before is not None:
        assert chosen.evidence["log10_p_value"] == pytest.approx(min(0.0, before + math.log10(2)))
        assert chosen.evidence["p_value"] == pytest.approx(min(1.0, 2 * 10**before))


def found(log10_p: float, separation: float, target: int = 7) -> CleansingReport:
    poisoned = report("poisoned", log10_p)
    evidence = poisoned.evidence | {"separations": {target: separation}}
    return replace(poisoned, targets=(target,), evidence=evidence)


def test_of_probes_that_agree_the_one_cleanses_that_tells_carriers_apart() -> None:
    """A clearer pattern through one net that moves clean images too, and a fainter one that does not."""
    adversarial, true = found(-16.7, 1.3), found(-9.1, 3.5)
    for reports, place in (([adversarial, true], 1), ([true, adversarial], 0)):
        chosen, taken = clearest(reports)
        assert taken == place
        assert chosen.evidence["separations"] == {7: 3.5}
        assert chosen.evidence["log10_p_value"] == pytest.approx(-16.7 + math.log10(2))
    assert clearest([adversarial, found(-9.1, 3.5, target=2)])[1] == 0
    assert clearest([found(-2.0, 1.0), replace(true, verdict="clean", targets=())])[1] == 0


def test_one_probe_changes_nothing() -> None:
    only = report("poisoned", -1.5)
    assert clearest([only]) == (only, 0)
    cleanser = ReverseEngineering(significance=0.05)
    assert sharing_significance(cleanser, 1) is cleanser
    assert sharing_significance(cleanser, 2) == replace(cleanser, significance=0.025)


def test_a_canary_that_one_twin_learns_is_seen() -> None:
    assert best_potency([{"weave": 0.99, "dots": 0.2}, {"weave": 0.1, "dots": 0.9}]) == {
        "weave": 0.99, "dots": 0.9,
    }  # fmt: skip
    assert best_potency([]) == {}


def test_an_audit_asks_both_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (60, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    data = ImageSet(images.to(torch.uint8), torch.arange(60) % 3, ("a", "b", "c"), numbered(60))
    asked: list[tuple[object, float]] = []

    def answer(self: ReverseEngineering, train: ImageSet, model: object, **_: Any) -> CleansingReport:
        asked.append((model, self.significance))
        verdict: Verdict = "poisoned" if len(asked) == 2 else "clean"
        return replace(report(verdict, -2.0), flagged=torch.ones(60, dtype=torch.bool))

    monkeypatch.setattr(ReverseEngineering, "__call__", answer)
    monkeypatch.setattr("untrojan.audit.training_accuracy", lambda *_: 1.0)
    quick = Recipe(epochs=1, batch_size=32, optimizer="sgd", learning_rate=0.01)
    options = AuditOptions(net="cnn@0.25", recipe=quick, second_recipe=replace(quick, flip=True))
    found = audit(data, options)
    assert found.report.verdict == "poisoned"
    assert found.model is asked[1][0]
    assert asked[0][0] is not asked[1][0]
    assert [significance for _, significance in asked] == [0.025, 0.025]
    assert found.report.evidence["p_value"] == pytest.approx(0.02)
    assert list(found.costs) == ["probe nets", "reverse-engineering", "reverse-engineering (probe 2)"]
