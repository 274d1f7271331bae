"""Linearity as a cleanser: what NONE would drop, for a set and a model whose backdoor channel is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from known_backdoor import CLASSES, TARGET, backdoored, blocks
from untrojan.defenses.cleansing.linearity import Linearity
from untrojan.defenses.cleansing.registry import CLEANSERS
from untrojan.defenses.training.none import NONE
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier


def test_the_poisoned_images_are_flagged_and_their_class_named() -> None:
    data, model = blocks(poisoned=40), backdoored(layers=2)
    report = Linearity()(data, model)
    assert (report.verdict, report.targets) == ("poisoned", (TARGET,))
    assert torch.equal(report.flagged, torch.arange(400) < 40)
    assert bool((report.scores[:40] > report.scores[40:].max()).all())
    assert "2 layers have class 'b' in two groups of images, up to" in report.reason
    assert torch.equal(report.flagged, NONE().dropped(NONE().analyse(model, data)))
    strict = Linearity(excess=1e12)(data, model)
    assert (strict.verdict, bool(strict.flagged.any())) == ("clean", False)
    assert "no class do layers agree" in strict.reason


def test_a_clean_set_is_clean_and_too_few_images_leave_it_undecided() -> None:
    data, model = blocks(), backdoored(layers=2)
    report = Linearity()(data, model)
    assert (report.verdict, report.targets, bool(report.flagged.any())) == ("clean", (), False)
    few = data.select(torch.arange(400) < 100)
    undecided = Linearity()(few, model)
    assert undecided.verdict == "undecided"
    assert "fewer than 40 images for 'a'" in undecided.reason
    assert undecided.evidence["classes_unjudged"] == list(range(CLASSES))
    # A model that is sure of nothing has no channel that speaks for a class.
    with torch.no_grad():
        model.network[-1].weight.mul_(1e-3)  # type: ignore[index, union-attr, operator]
    assert Linearity()(data, model).verdict == "undecided"


def test_a_model_of_one_layer_is_refused_and_the_defaults_are_nones() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES))
    with pytest.raises(UntrojanError, match="layers before the last"):
        Linearity()(blocks(), Classifier(flat, CLASSES, torch.zeros(3), torch.ones(3)))
    built = CLEANSERS.build("linearity", {"excess": 2.0})
    assert built == replace(Linearity(), excess=2.0)
    assert (Linearity().layers, Linearity().layer_separation) == (NONE().layers, NONE().layer_separation)
