"""Cleansing followed by NONE: what either drops is dropped, in the given rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.defenses.training.cleanse_then_none import CleanseThenNONE, in_given_rows
from untrojan.defenses.training.none import NONE
from untrojan.defenses.training.registry import TRAINING_DEFENSES
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.registry import options_of
from untrojan.training.recipe import Recipe

QUICK = Recipe(epochs=1, batch_size=32, optimizer="sgd", learning_rate=1e-2)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_both_ones_rows(marks: list[tuple[bool, bool]]) -> None:
    first = torch.tensor([a for a, _ in marks], dtype=torch.bool)
    second = torch.tensor([b for a, b in marks if not a], dtype=torch.bool)
    assert in_given_rows(first, second).tolist() == [a or b for a, b in marks]


def small() -> ImageSet:
    return make_signs(num_classes=4, size=16, train_per_class=30, test_per_class=5, seed=0).train


class Finds:
    """A cleanser with a given answer."""

    def __init__(self, flagged: torch.Tensor) -> None:
        self.flagged = flagged

    def __call__(
        self, train: ImageSet, model: Classifier, *, checkpoint: Path | None = None
    ) -> CleansingReport:
        return CleansingReport("poisoned", self.flagged, self.flagged.float(), targets=(1,), reason="told")


def test_none_sees_what_cleansing_left_and_no_class_is_lost(monkeypatch: Any) -> None:
    data = small()
    flagged = (data.labels == 2) | (torch.arange(len(data)) < 5)
    monkeypatch.setattr(CleanseThenNONE, "_cleanser", lambda _: Finds(flagged))
    monkeypatch.setattr("untrojan.audit.training_accuracy", lambda *_: 1.0)
    seen: list[ImageSet] = []
    trained = NONE.__call__

    def watched(self: NONE, data: ImageSet, *rest: Any, **more: Any) -> Any:
        seen.append(data)
        return trained(self, data, *rest, **more)

    monkeypatch.setattr(NONE, "__call__", watched)
    method = CleanseThenNONE(none_options={"epochs": 1}, probe_recipe="desk-plain")
    report = method(data, "cnn@0.25", QUICK)
    expected = flagged & (data.labels != 2)
    assert sorted(seen[0].ids) == sorted(data.select(~expected).ids)
    assert torch.equal(report.dropped & expected, expected)
    assert report.evidence["cleansing"]["classes_kept_whole"] == [2]
    assert report.evidence["cleansing"]["verdict"] == "poisoned"
    assert int(report.dropped.sum()) == int(expected.sum()) + report.evidence["dropped_by_none"]


def test_a_probe_that_learned_nothing_drops_nothing(monkeypatch: Any) -> None:
    data = small()
    monkeypatch.setattr(CleanseThenNONE, "_cleanser", lambda _: Finds(data.labels == 1))
    monkeypatch.setattr("untrojan.audit.training_accuracy", lambda *_: 0.2)
    method = CleanseThenNONE(none_options={"epochs": 1, "excess": 1e9}, probe_recipe="desk-plain")
    report = method(data, "cnn@0.25", QUICK)
    assert report.evidence["cleansing"]["verdict"] == "undecided"
    assert not bool(report.dropped.any())


def test_settings_reach_both_and_wrong_ones_are_named() -> None:
    built = TRAINING_DEFENSES.build("cleanse-none", {"seed": 7, "cleanser_options": {"flip_fraction": 0.9}})
    assert isinstance(built, CleanseThenNONE)
    assert options_of(built._cleanser()) | {"seed": 7, "flip_fraction": 0.9} == options_of(built._cleanser())
    assert built._none().seed == 7
    for wrong, said in (
        ({"cleanser": "rev"}, "unknown cleanser 'rev'"),
        ({"none_options": {"epoch": 3}}, "none_options has no option 'epoch'"),
        ({"cleanser_options": {"pi": 3}}, "no option 'pi'"),
        ({"probe_recipe": "slow"}, "unknown recipe 'slow'"),
    ):
        with pytest.raises(UntrojanError, match=said):
            TRAINING_DEFENSES.build("cleanse-none", wrong)
