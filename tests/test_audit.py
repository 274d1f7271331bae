"""The audit: probe, canaries, RE's algorithm and the doubts that turn `clean` into `undecided`."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from untrojan.attacks.poisoning import PoisonedData, Poisoning, PoisonRecord
from untrojan.audit import AuditOptions, audit, doubted, metrics_of
from untrojan.data.image_set import ImageSet, Splits, numbered
from untrojan.defenses.cleansing.by_class import ClassCleanser
from untrojan.defenses.cleansing.pattern_removal import remove, threshold_between
from untrojan.defenses.cleansing.probe import (
    ProbeCheck,
    canary_potency,
    draw_canaries,
    plant,
)
from untrojan.defenses.cleansing.registry import CLEANSERS, method_names
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.defenses.cleansing.reverse_engineering import ReverseEngineering
from untrojan.errors import UntrojanError
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import FAST, PAPER, invert
from untrojan.metrics.cleansing import cleansing_rates
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.training.recipe import Recipe

QUICK = Recipe(epochs=8, batch_size=32, optimizer="sgd", learning_rate=0.05, schedule="one_cycle")


def blobs(num_classes: int = 6, count: int = 900, seed: int = 0) -> Splits:
    """Classes told apart by where a bright blob lies; grey noise elsewhere."""
    random = torch.Generator().manual_seed(seed)

    def split(size: int) -> ImageSet:
        labels = torch.arange(size) % num_classes
        images = torch.randint(60, 110, (size, 3, 16, 16), generator=random)
        rows, columns = labels // 3 * 7 + 2, labels % 3 * 5 + 1
        for row in range(4):
            for column in range(4):
                images[torch.arange(size), :, rows + row, columns + column] += 60
        names = tuple(f"blob {i}" for i in range(num_classes))
        return ImageSet(images.to(torch.uint8), labels, names, numbered(size))

    return Splits(split(count), split(300))


@pytest.fixture(scope="module")
def poisoned() -> PoisonedData:
    return Poisoning("chessboard", {"amplitude": 6.0}, target=2, sources=(0, 4), count=40)(blobs(), 0)


@pytest.fixture(scope="module")
def found(poisoned: PoisonedData):  # type: ignore[no-untyped-def]
    return audit(poisoned.train, AuditOptions(net="patch-cnn@0.25", recipe=QUICK))


def test_a_poisoned_set_is_found_out(poisoned: PoisonedData, found) -> None:  # type: ignore[no-untyped-def]
    report = found.report
    assert report.verdict == "poisoned"
    assert report.targets == (2,)
    assert set(report.sources[0]) & {0, 4}
    rates = cleansing_rates(report.flagged, poisoned.train.labels, poisoned.record)
    assert rates.true_positive_rate > 0.85
    # Only the target's images can be flagged.
    assert set(poisoned.train.labels[report.flagged].tolist()) == {2}
    pattern = report.evidence["patterns"][2]
    true_pattern = poisoned.record.tensors["pattern"]
    assert float(torch.cosine_similarity(pattern.flatten(), true_pattern.flatten(), dim=0)) > 0.3


def test_further_methods_are_asked_and_decide_nothing(poisoned: PoisonedData, found) -> None:  # type: ignore[no-untyped-def]
    options = AuditOptions(methods=("activation-clustering", "reverse-engineering"), calibrate=True)
    both = audit(poisoned.train, options, model=found.model, trusted=blobs(seed=3).test)
    assert list(both.costs) == ["probe net", "features", "activation-clustering", "reverse-engineering"]
    # One pass over the training set and one over the trusted images serve every method by features.
    assert both.costs["features"].images == len(poisoned.train) + 300
    assert both.costs["activation-clustering"].images == 0
    other = both.opinions["reverse-engineering"]
    assert other.targets == (2,)
    assert torch.equal(other.flagged, found.report.flagged)
    metrics = metrics_of(both, poisoned.train)
    assert metrics["verdict"] == both.report.verdict
    told = metrics["opinions"]["reverse-engineering"]
    assert (told["verdict"], told["target_names"]) == ("poisoned", ["blob 2"])
    assert told["flagged_by_both"] == int((other.flagged & both.report.flagged).sum())


def test_what_removes_from_every_class_is_asked_for_p_values() -> None:
    """As published such a method would call every clean set poisoned."""
    found = AuditOptions(methods=("spectral-signatures", "spectre", "strip", "cluster-impurity")).cleansers()
    limits = {name: each.limit for name, each in found.items() if isinstance(each, ClassCleanser)}
    assert limits == {
        "spectral-signatures": None, "spectre": None, "strip": None, "cluster-impurity": 0.5,
    }  # fmt: skip
    model = audit(blobs().train, AuditOptions(net="patch-cnn@0.25", recipe=QUICK)).model
    asked = AuditOptions(methods=("spectral-signatures",))
    assert audit(blobs().train, asked, model=model).report.verdict == "clean"


def test_no_method_and_unknown_settings_are_refused() -> None:
    with pytest.raises(UntrojanError, match="an audit needs a method"):
        AuditOptions(methods=()).cleansers()
    with pytest.raises(UntrojanError, match="unknown cleanser 'divination'"):
        AuditOptions(methods=("divination",)).cleansers()
    with pytest.raises(UntrojanError, match=r"choose of re, ac.*or all"):
        method_names("re,xx")
    with pytest.raises(UntrojanError, match="no method named"):
        method_names(" , ")
    assert method_names("ac, re,ac") == ("activation-clustering", "reverse-engineering")
    assert method_names("all") == CLEANSERS.names()
    assert method_names("ac,all")[0] == "activation-clustering"
    assert sorted(method_names("ac,all")) == sorted(CLEANSERS.names())
    assert "subspace-reconstruction" not in method_names("all", trusted=False)


def test_metrics_name_classes_and_count_flags(poisoned: PoisonedData, found) -> None:  # type: ignore[no-untyped-def]
    metrics = metrics_of(found, poisoned.train)
    assert (metrics["detected"], metrics["target"], metrics["target_name"]) == (True, 2, "blob 2")
    assert metrics["flagged"] == int(found.report.flagged.sum())
    norms = metrics["norms"]
    assert len(norms) == 6
    assert math.isnan(norms[3][3])
    assert norms[0][2] < norms[0][1]


def test_a_clean_set_raises_no_alarm() -> None:
    result = audit(blobs().train, AuditOptions(net="patch-cnn@0.25", recipe=QUICK, seed=1))
    assert result.report.verdict != "poisoned"
    assert not bool(result.report.flagged.any())


def test_clean_is_doubted_where_the_probe_has_not_learned() -> None:
    clean = CleansingReport("clean", torch.zeros(3, dtype=torch.bool), torch.zeros(3))
    blind = ProbeCheck(0.99, {"stripes": 0.2, "dots": 0.97})
    assert doubted(clean, blind).verdict == "undecided"
    assert "20%" in doubted(clean, blind).reason
    assert doubted(clean, replace(blind, canaries={"stripes": 0.9, "dots": 0.97})).verdict == "clean"
    # A given model has no canaries: it must at least fit the set.
    assert doubted(clean, ProbeCheck(0.3, {})).verdict == "undecided"
    assert doubted(clean, ProbeCheck(0.95, {})).verdict == "clean"
    # A detection stands whatever else the probe has not learned, if it has learned the classes.
    alarm = replace(clean, verdict="poisoned", flagged=torch.ones(3, dtype=torch.bool), targets=(1,))
    assert doubted(alarm, blind).verdict == "poisoned"
    untrained = doubted(alarm, replace(blind, training_accuracy=0.2))
    assert (untrained.verdict, untrained.targets, bool(untrained.flagged.any())) == ("undecided", (), False)


def test_an_untrained_probe_is_undecided_not_clean() -> None:
    data = blobs().train
    hasty = Recipe(epochs=1, batch_size=450, optimizer="sgd", learning_rate=1e-6)
    result = audit(data, AuditOptions(net="patch-cnn@0.25", recipe=hasty))
    assert result.report.verdict == "undecided"
    assert result.check.canaries == {}


def test_no_cleanser_can_be_handed_the_truth() -> None:
    truths = (PoisonRecord, PoisonedData)
    for name in CLEANSERS.names():
        signature = inspect.signature(CLEANSERS.get(name).__call__, eval_str=True)
        for parameter in signature.parameters.values():
            assert parameter.annotation not in truths, f"{name} takes {parameter}"
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
    assert not any("poison" in field for field in ImageSet.__dataclass_fields__)
    for function in (audit, canary_potency):
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            assert parameter.annotation not in truths


def test_canaries_are_faint_orthogonal_and_secret() -> None:
    weave, dots = draw_canaries((3, 32, 32), 0)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    attack = 1.0 - 2 * ((rows + columns) % 2)
    projections = torch.nn.functional.avg_pool2d(weave.pattern * attack, 4)
    assert float(projections.abs().max()) < 1e-6
    assert float(weave.pattern.abs().max()) == pytest.approx(4 / 255)
    assert float(weave.pattern.mean()) == pytest.approx(2 / 255)
    assert int((dots.pattern[0] != 0).sum()) == 4
    drawn = {draw_canaries((3, 32, 32), seed)[1].pattern.numpy().tobytes() for seed in range(10)}
    assert len(drawn) == 10


def test_planting_leaves_the_set_alone_and_uses_a_class_of_its_own() -> None:
    data = blobs().train
    before = data.fingerprint()
    canaries = draw_canaries(data.image_shape, 0)
    planted, fresh = plant(data, canaries, 0.01, 0)
    assert data.fingerprint() == before
    assert planted.num_classes == 7
    changed = (planted.labels == 6).nonzero().flatten()
    assert len(changed) == 2 * 27
    assert not set(changed.tolist()) & set(fresh.tolist())
    same = planted.labels != 6
    assert torch.equal(planted.images[same], data.images[same])


def test_paper_schedule_finds_the_pair_the_fast_one_finds(found) -> None:  # type: ignore[no-untyped-def]
    data = blobs(count=240).train
    pairs = torch.tensor([[0, 2], [0, 1]])
    norms = []
    for schedule in (PAPER, FAST):
        inversion = invert(found.model, data, pairs, AdditivePattern(), replace(schedule, flip_fraction=0.8))
        assert bool(inversion.solved.all())
        norms.append(inversion.parameters.flatten(1).norm(dim=1))
    for backdoor, ordinary in norms:
        assert float(backdoor) < 0.75 * float(ordinary)


class Sum(nn.Module):
    """Class 1 where the mean pixel exceeds a half, else class 0."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_removal_moves_a_linear_model_by_the_closed_form() -> None:
    model = Classifier(Sum(), 2, torch.zeros(3), torch.ones(3))
    greys = torch.tensor([130, 140, 250, 3, 100], dtype=torch.uint8)
    images = greys[:, None, None, None].expand(5, 3, 4, 4).clone()
    labels = torch.tensor([1, 1, 1, 1, 0])
    data = ImageSet(images, labels, ("dark", "light"), numbered(5))
    removal = remove(model, data, 0, 1, torch.full((3, 4, 4), 5 / 255))
    assert removal.rows.tolist() == [0, 1, 2, 3]
    # The margin is 2 mean - 1. Of a grey of 3 only 3 can be taken away.
    torch.testing.assert_close(removal.drops, torch.tensor([10.0, 10, 10, 6]) / 255, atol=1e-6, rtol=0)
    torch.testing.assert_close(removal.gains, torch.tensor([10.0]) / 255, atol=1e-6, rtol=0)
    assert removal.readings.tolist() == [0, 1, 1, 0]


def normal(count: int, mean: float, deviation: float) -> torch.Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    return mean + deviation * (values - values.mean()) / values.std()


@pytest.mark.parametrize("poisoned", [2, 60, 900, 4000])
def test_the_threshold_lies_equally_many_deviations_from_either_kind(poisoned: int) -> None:
    clean, carriers, gains = normal(2000, 0.5, 0.2), normal(poisoned, 6.5, 1.2), normal(500, 7.0, 1.0)
    threshold = threshold_between(torch.cat([clean, carriers]), gains)
    # (x - .5) / .2 = (7 - x) / 1, however many of the class are poisoned.
    assert threshold.at == pytest.approx((0.5 * 1.0 + 7.0 * 0.2) / 1.2, abs=0.15)
    assert threshold.spread == pytest.approx(0.2 / 1.2, abs=0.05)
    assert threshold.separation == pytest.approx(6.5 / 1.2, rel=0.1)


def test_the_threshold_of_kinds_without_spread_is_midway() -> None:
    drops = torch.tensor([0.0, 0, 0, 0, 4, 4])
    assert threshold_between(drops, torch.full((5,), 4.0)).at == pytest.approx(2.0)
    assert threshold_between(torch.full((4,), 4.0), torch.full((5,), 4.0)).at == pytest.approx(2.0)
    assert threshold_between(torch.zeros(0), torch.full((5,), 4.0)).at == pytest.approx(2.0)


def test_the_papers_rule_flags_what_one_pattern_unflips(poisoned: PoisonedData, found) -> None:  # type: ignore[no-untyped-def]
    """Equation 12 against ours: the same attack found, and at least as good a cleansing by either rate."""
    from untrojan.metrics.cleansing import cleansing_rates

    paper = ReverseEngineering(cleansing="paper")(poisoned.train, found.model)
    ours = ReverseEngineering()(poisoned.train, found.model)
    assert paper.targets == ours.targets
    theirs = cleansing_rates(paper.flagged, poisoned.train.labels, poisoned.record)
    rates = cleansing_rates(ours.flagged, poisoned.train.labels, poisoned.record)
    assert rates.true_positive_rate >= theirs.true_positive_rate
    assert rates.false_positive_rate <= theirs.false_positive_rate
    true = poisoned.record.tensors["pattern"]

    def likeness(report: CleansingReport) -> float:
        return float(torch.cosine_similarity(report.evidence["patterns"][2].flatten(), true.flatten(), 0))

    # Estimated anew on what it flagged, the pattern comes no less near to the attacker's.
    assert likeness(ours) > likeness(paper) - 0.02
    removed = poisoned.train.images[paper.flagged].float() / 255 - paper.evidence["patterns"][2]
    assert not bool((found.model(removed.clamp(0, 1)).argmax(1) == 2).any())


class Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None] * 0 + torch.tensor([5.0, 0, 0, 0, 0, 0])


def test_a_model_that_resists_inversion_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    from untrojan.defenses.cleansing import reverse_engineering

    short = replace(reverse_engineering.FAST, most_steps=3)
    monkeypatch.setattr(reverse_engineering, "FAST", short)
    model = Classifier(Constant(), 6, torch.zeros(3), torch.ones(3))
    report = ReverseEngineering()(blobs(count=60).train, model)
    assert report.verdict == "undecided"
    assert "constraint" in report.reason
    assert len(report.evidence["unsolved_pairs"]) == 25


def test_a_twin_that_learns_nothing_carries_no_canary() -> None:
    """Not even one that takes every image for a canary."""
    hasty = Recipe(epochs=1, batch_size=450, optimizer="sgd", learning_rate=1e-6)
    potency = canary_potency(blobs().train, "patch-cnn@0.25", hasty)
    assert max(potency.values()) < 0.2


def test_a_model_of_other_classes_is_refused() -> None:
    model = Classifier(Constant(), 6, torch.zeros(3), torch.ones(3))
    with pytest.raises(UntrojanError, match="6 outputs and the data have 5 classes"):
        audit(blobs(5).train, AuditOptions(), model=model)


def test_readings_are_real_classes_only(poisoned: PoisonedData, found) -> None:  # type: ignore[no-untyped-def]
    readings = found.report.evidence["readings"]
    assert int(readings.max()) < 6
    flagged = found.report.flagged
    assert float((readings[flagged] != poisoned.train.labels[flagged]).float().mean()) > 0.8
    assert torch.equal(readings[~flagged], poisoned.train.labels[~flagged])
    assert found.model.num_classes == 6
    assert not found.model.training
    assert (
        float((predictions_of(found.model, poisoned.train.images) == poisoned.train.labels).float().mean())
        > 0.9
    )
