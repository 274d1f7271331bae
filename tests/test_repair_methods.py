"""Fine-tuning, fine-pruning, NAD and mode connectivity repair on a small backdoored net."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import Backdoored
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.repair.abs import ABSRepair, Filter
from untrojan.defenses.repair.fine_pruning import FinePruning, idle_order, reader_of, silenced
from untrojan.defenses.repair.finetune import Finetuning
from untrojan.defenses.repair.inverted import backdoors_of
from untrojan.defenses.repair.mcr import MCR, bezier, halvings, recompute_statistics, weights_of
from untrojan.defenses.repair.nad import NAD, attention, distillation_loss
from untrojan.defenses.repair.registry import REPAIRS
from untrojan.defenses.repair.tuning import apart, balanced, batch_size_for, cutout, cutting_out
from untrojan.defenses.repair.unlearning import Unlearning
from untrojan.defenses.scanning.abs import ABS
from untrojan.defenses.scanning.neural_cleanse import NeuralCleanse
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport
from untrojan.errors import UntrojanError
from untrojan.inversion.filters import FilterMatrix
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.models.classifier import Classifier, logits_of, to_float
from untrojan.models.registry import build, build_for
from untrojan.training.loop import train

QUICK: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 1},
    "fine-pruning": {"epochs": 1, "step": 0.1},
    "nad": {"epochs": 1, "teacher_epochs": 1},
    "mcr": {"epochs": 1, "end_epochs": 1},
    "unlearning": {},
    "neuron-pruning": {"step": 0.1},
    "abs": {"kinds": ["patch"]},
}


def state_of(model: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that takes no time: the white corner into class 1."""

    def answer(self: NeuralCleanse, model: object, clean: ImageSet, **_: object) -> ScanReport:
        return corner_scan((1,))

    monkeypatch.setattr(NeuralCleanse, "__call__", answer)


def corner_scan(targets: tuple[int, ...], sizes: tuple[float, ...] = (9.0, 6.0)) -> ScanReport:
    mask, pattern = torch.zeros(1, 16, 16), torch.zeros(3, 16, 16)
    mask[0, 13:, 13:] = 1
    pattern[:, 13:, 13:] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    return ScanReport(
        verdict="poisoned" if targets else "clean",
        targets=targets,
        statistics={label: {"mask_size": size} for label, size in enumerate(sizes)},
        triggers={label: InvertedTrigger(mask, pattern) for label in range(len(sizes))},
    )


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("training", [False, True])
def test_the_given_model_stays_as_it_was(
    name: str, training: bool, backdoored: Backdoored, scanned: None
) -> None:
    model = copy.deepcopy(backdoored.model).train(training)
    first = next(model.parameters()).requires_grad_(False)
    before, modes = state_of(model), [module.training for module in model.modules()]
    report = REPAIRS.build(name, QUICK[name])(model, backdoored.clean)
    assert same(before, state_of(model))
    assert modes == [module.training for module in model.modules()]
    assert not first.requires_grad
    assert all(parameter.requires_grad for parameter in list(model.parameters())[1:])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not same(before, state_of(report.model))
    assert torch.equal(next(report.model.parameters()), first), "a frozen weight was trained"
    assert not report.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in report.model.modules())


def test_some_repairs_end_the_backdoor(backdoored: Backdoored) -> None:
    attacked = attack_success_rate(backdoored.model, backdoored.triggered)
    accuracy = benign_accuracy(backdoored.model, backdoored.test)
    assert attacked > 0.95
    assert accuracy > 0.95
    for method in (FinePruning(), NAD()):
        mended = method(backdoored.model, backdoored.clean).model
        assert attack_success_rate(mended, backdoored.triggered) < 0.3 * attacked
        assert benign_accuracy(mended, backdoored.test) > accuracy - 0.1


def test_an_inverted_trigger_is_unlearned(backdoored: Backdoored, scanned: None) -> None:
    report = Unlearning(epochs=3)(backdoored.model, backdoored.clean)
    assert attack_success_rate(report.model, backdoored.triggered) < 0.2
    assert report.history["scan"]["undone"] == [1]
    plain = Unlearning(epochs=3, stamped=0.0)(backdoored.model, backdoored.clean)
    assert attack_success_rate(plain.model, backdoored.triggered) > 0.5


def test_abs_undoes_each_class_s_best_trigger_that_works(backdoored: Backdoored) -> None:
    report = ABSRepair(size=0.05, steps=20)(backdoored.model, backdoored.clean)
    undone, inverted = report.history["unlearned"], report.history["inverted"]
    assert {each["kind"] for each in inverted} == {"patch", "filter"}
    working = {each["label"] for each in inverted if each["reasr"] >= 0.8}
    assert working
    assert {each["label"] for each in undone} == working
    assert len(undone) == len(working)
    alone = ABSRepair(size=0.05, limit=1.0, kinds=("filter",), steps=1)(backdoored.model, backdoored.clean)
    assert len(alone.history["unlearned"]) == 1


def test_abs_says_where_it_has_nothing_to_undo(
    backdoored: Backdoored, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UntrojanError, match="kind of trigger"):
        ABSRepair(kinds=())(backdoored.model, backdoored.clean)
    monkeypatch.setattr(ABS, "candidates", lambda *_: [])
    with pytest.raises(UntrojanError, match="no inner channel raises one class"):
        ABSRepair()(backdoored.model, backdoored.clean)


def test_a_filter_is_laid_over_images() -> None:
    matrix = torch.zeros(3, 12)
    matrix[:, 9:] = torch.eye(3)
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    blurred = Filter(matrix, FilterMatrix(torch.eye(12), window=11))(images)
    torch.testing.assert_close(blurred, images.mean((2, 3), keepdim=True).expand_as(images))


def test_which_triggers_are_undone() -> None:
    assert list(backdoors_of(corner_scan((1, 0)))) == [1, 0]
    assert list(backdoors_of(corner_scan((), (4.0, 6.0)))) == [0]
    assert list(backdoors_of(corner_scan(()))) == [1]
    with pytest.raises(UntrojanError, match="no trigger could be inverted"):
        backdoors_of(replace(corner_scan(()), triggers={}))


def test_several_triggers_are_unlearned_together(
    backdoored: Backdoored, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []

    def answer(self: NeuralCleanse, model: object, clean: ImageSet, **_: object) -> ScanReport:
        one = corner_scan((0, 1))
        black = InvertedTrigger(one.triggers[0].mask.flip(1), torch.zeros(3, 16, 16))
        return replace(one, triggers={0: one.triggers[0], 1: black})

    def watched(model: Classifier, data: ImageSet, *arguments: Any, **named: Any) -> Any:
        images, _ = named["batch_transform"](data.images, data.labels, torch.Generator().manual_seed(0))
        shown.append(images)
        return train(model, data, *arguments, **named)

    monkeypatch.setattr(NeuralCleanse, "__call__", answer)
    monkeypatch.setattr("untrojan.defenses.repair.unlearning.train", watched)
    Unlearning(stamped=1.0)(backdoored.model, backdoored.clean)
    white, black = shown[0][:, :, 15, 15] == 255, (shown[0][:, :, :3, 13:] == 0).flatten(2).all(2)
    assert bool((white.all(1) | black.all(1)).all())
    assert 60 < int(white.all(1).sum()) < 180


def test_nad_without_weights_is_fine_tuning_bit_for_bit(backdoored: Backdoored) -> None:
    setting = {"epochs": 2, "milestones": (1,), "weight_decay": 1e-4, "batch_size": 16, "learning_rate": 0.05}
    nad = NAD(betas=(0, 0, 0), teacher_epochs=1, **setting)  # type: ignore[arg-type]
    tuned = Finetuning(**setting)  # type: ignore[arg-type]
    distilled = nad(backdoored.model, backdoored.clean).model
    assert same(state_of(distilled), state_of(tuned(backdoored.model, backdoored.clean).model))
    other = replace(nad, betas=(0, 0, 1.0))(backdoored.model, backdoored.clean).model
    assert not same(state_of(distilled), state_of(other))


def test_the_teacher_stays_as_it_was(backdoored: Backdoored) -> None:
    teacher, student = copy.deepcopy(backdoored.model), copy.deepcopy(backdoored.model)
    before = state_of(teacher)
    NAD(epochs=1).distil(student, teacher, backdoored.clean, {"s2": 500.0, "s3": 1000.0})
    assert same(before, state_of(teacher))
    assert not same(before, state_of(student))


def test_attention_is_the_normalised_sum_of_squares() -> None:
    features = torch.zeros(2, 3, 2, 2)
    features[0, 0, 0, 1], features[0, 2, 1, 1] = 3.0, -2.0
    found = attention(features)
    assert torch.allclose(found[0], torch.tensor([0.0, 9.0, 0.0, 4.0]) / 97**0.5)
    assert found[1].tolist() == [0, 0, 0, 0]
    again = attention(5 * features[:1], power=1.0)
    assert torch.allclose(again[0], torch.tensor([0.0, 3.0, 0.0, 2.0]) / 13**0.5)
    other = features.flip(3)
    gap = (attention(features) - attention(other)).square().sum(1).mean()
    both = {"s2": features, "s3": features}
    loss = distillation_loss(both, {"s2": features, "s3": other}, {"s2": 7.0, "s3": 3.0}, 2.0)
    assert float(loss) == pytest.approx(3 * float(gap))
    # As strong on maps of 8 pixels a side as on the same maps drawn with 2.
    fine, fine_other = (each.repeat_interleave(4, 2).repeat_interleave(4, 3) for each in (features, other))
    again = distillation_loss({"s3": fine}, {"s3": fine_other}, {"s3": 3.0}, 2.0)
    assert float(again) == pytest.approx(float(loss), rel=1e-4)


def test_on_maps_of_eight_pixels_a_side_the_loss_is_the_published_one(backdoored: Backdoored) -> None:
    weight = NAD()._weights(backdoored.model, backdoored.clean)["s3"]
    one, other = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    published = 1000 * F.mse_loss(attention(one), attention(other))
    found = distillation_loss({"s3": one}, {"s3": other}, {"s3": weight}, 2.0)
    assert float(found) == pytest.approx(float(published), rel=1e-4)


def test_a_network_without_norm_layers_is_tuned_at_a_tenth_of_the_learning_rate(
    backdoored: Backdoored,
) -> None:
    nin = build_for(backdoored.clean, "nin@0.25")
    rate = NAD().recipe(2560, nin).learning_rate
    assert rate == pytest.approx(0.01)
    with_norm = build_for(backdoored.clean, "vgg11@0.125")
    assert NAD().recipe(2560, with_norm).learning_rate == pytest.approx(10 * rate)
    assert Finetuning().recipe(2560, nin).learning_rate == pytest.approx(2e-3)
    report = NAD(epochs=2, teacher_epochs=1)(nin, backdoored.clean)
    assert all(math.isfinite(epoch["loss"]) for epoch in report.history["epochs"])


def test_what_is_pruned_stays_pruned_and_is_as_good_as_masked(backdoored: Backdoored) -> None:
    report = FinePruning(epochs=2, weight_decay=0.1, accuracy_cost=0.1)(backdoored.model, backdoored.clean)
    pruned = torch.tensor(report.history["pruned"])
    looks = report.history["looks"]
    assert 0 < len(pruned) == looks[-1]["channels"] <= 32
    assert looks[0]["benign_accuracy"] - looks[-1]["benign_accuracy"] <= 0.1
    linear = report.model.get_submodule("network.linear")
    assert isinstance(linear, nn.Linear)
    by_channel = linear.weight.view(4, 32, -1).abs().sum((0, 2))
    assert by_channel[pruned].eq(0).all()
    assert int((by_channel == 0).sum()) == len(pruned)
    given = backdoored.model.get_submodule("network.linear").weight
    assert not torch.equal(linear.weight[linear.weight != 0], given[linear.weight != 0])  # type: ignore[index]


@pytest.mark.parametrize(
    "architecture", ["cnn", "resnet18-compact", "preact-resnet18", "vgg11", "nin", "densenet", "mobilenetv2"]
)
def test_the_reader_of_the_last_block_is_found(architecture: str) -> None:
    model = build(
        f"{architecture}@0.1", num_classes=3, image_shape=(3, 32, 32), mean=torch.zeros(3), std=torch.ones(3)
    )
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = state_of(model)
    reader = reader_of(model, images)
    assert reader.weight.shape[0] == 3 or architecture == "vgg11"
    assert same(before, state_of(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Skipping(nn.Module):
    """Its last block is read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 4, 3)
        # Alive, or it would make no difference who reads them.
        nn.init.ones_(convolution.bias)  # type: ignore[arg-type]
        self.block = nn.Sequential(convolution, nn.ReLU())
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.block(images).mean((2, 3))
        result: Tensor = self.one(pooled) + self.two(pooled)
        return result


def test_networks_without_the_needed_layer_are_refused(backdoored: Backdoored) -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 4))
    flat = Classifier(dense, 4, torch.zeros(3), torch.ones(3))
    with pytest.raises(UntrojanError, match="a convolutional block"):
        FinePruning()(flat, backdoored.clean)
    with pytest.raises(UntrojanError, match="feature maps"):
        NAD()(flat, backdoored.clean)
    skipping = Classifier(Skipping(), 3, torch.zeros(3), torch.ones(3))
    before = state_of(skipping)
    with pytest.raises(UntrojanError, match="one layer alone"):
        reader_of(skipping, backdoored.clean.images[:4])
    assert same(before, state_of(skipping))
    # Batch norm or not, convolutional or not: these need nothing of the network.
    for method in (Finetuning(epochs=1), MCR(epochs=1, end_epochs=1)):
        assert method(flat, backdoored.clean).model.num_classes == 4


def test_silenced_inputs_and_idle_channels() -> None:
    weight = torch.zeros(2, 6)
    assert silenced(weight, torch.tensor([2]), 3)[0].tolist() == [False] * 4 + [True] * 2
    filters = torch.zeros(5, 3, 1, 1)
    assert silenced(filters, torch.tensor([0, 1]), 3)[4].flatten().tolist() == [True, True, False]
    maps = torch.zeros(2, 3, 2, 2)
    maps[:, 0], maps[1, 2, 0, 0] = 1, 2
    assert idle_order(maps).tolist() == [1, 2, 0]


def test_the_curve_ends_at_its_models(backdoored: Backdoored) -> None:
    model, clean = backdoored.model, backdoored.clean
    tuned = Finetuning(epochs=1)(model, clean).model
    first, last = weights_of(model), weights_of(tuned)
    bend = {name: torch.randn_like(weight) for name, weight in first.items()}
    for t, end in ((0.0, first), (1.0, last)):
        there = bezier(first, bend, last, t)
        assert same(there, end)
        assert same(weights_of(MCR().at(model, first, bend, last, t, clean)), end)
    middle = bezier(first, bend, last, 0.5)
    assert all(
        torch.allclose(middle[name], first[name] / 4 + bend[name] / 2 + last[name] / 4, atol=1e-6)
        for name in first
    )


def test_the_place_on_the_curve_is_the_best_inside(backdoored: Backdoored) -> None:
    report = MCR(epochs=2, end_epochs=1)(backdoored.model, backdoored.clean)
    places = report.history["curve"]
    assert [round(place["t"], 6) for place in places] == [i / 10 for i in range(11)]
    inside = places[1:-1]
    chosen = next(place for place in places if place["t"] == report.history["t"])
    assert chosen in inside
    assert chosen["benign_accuracy"] == max(place["benign_accuracy"] for place in inside)
    assert {row["stage"] for row in report.history["epochs"]} == {
        "fine-tuning the other end", "training the curve",
    }  # fmt: skip


def test_statistics_are_those_of_all_images() -> None:
    norm = nn.BatchNorm2d(3)
    model = Classifier(nn.Sequential(norm, nn.Flatten(), nn.Linear(48, 2)), 2, torch.zeros(3), torch.ones(3))
    images = torch.randint(0, 256, (70, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    recompute_statistics(model.train(), images, batch_size=32)
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean, to_float(images).mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1
    with torch.no_grad():
        normed = norm.eval()(to_float(images))
    assert torch.allclose(normed.mean((0, 2, 3)), torch.zeros(3), atol=1e-2)


def test_the_rate_of_the_curve_follows_the_published_schedule() -> None:
    for epochs in (100, 50):
        for epoch in range(epochs):
            done = epoch / epochs
            published = max(0.01, min(1.0, 1 - 0.99 * (done - 0.5) / 0.4))
            ours = 0.5 ** sum(epoch >= milestone for milestone in halvings(epochs))
            assert abs(ours - published) < 0.36
            assert epoch >= 0.6 * epochs or ours == 1
    assert all(milestone >= 1 for milestone in halvings(1))


def test_a_cutout_hides_a_square_and_no_more() -> None:
    images = torch.ones(4, 2, 6, 6)
    cut = cutout(images, torch.tensor([[3, 3], [0, 0], [5, 5], [2, 4]]), 2)
    assert cut[0, 0].sum() == 36 - 4
    assert cut[0, :, 2:4, 2:4].sum() == 0
    assert cut[1, 1].sum() == 36 - 1
    assert cut[2, 0].sum() == 36 - 4
    assert torch.equal(cutout(images, torch.zeros(4, 2, dtype=torch.int64), 0), images)
    hidden = cutting_out(3)(
        torch.ones(400, 1, 8, 8), torch.zeros(400), torch.arange(400), torch.Generator().manual_seed(0)
    )[0]
    # Of a 3x3 square whose middle is anywhere, a pixel inside is hidden nine times in 64.
    assert float(1 - hidden[:, :, 2:6, 2:6].mean()) == pytest.approx(9 / 64, abs=0.02)


def test_small_sets_go_in_small_batches() -> None:
    assert batch_size_for(2500, 128) == 125
    assert batch_size_for(50_000, 128) == 128
    assert batch_size_for(200, 128) == 16
    assert batch_size_for(200, 8) == 8


def test_draws_are_balanced_and_disjoint() -> None:
    labels = torch.tensor([0] * 50 + [1] * 5 + [2])
    data = ImageSet(torch.zeros(56, 1, 4, 4, dtype=torch.uint8), labels, tuple("abc"), numbered(56))
    assert data.select(balanced(data, 4, 0, "x")).class_counts.tolist() == [4, 4, 1]
    one, two = apart(data, 0.2, 0, "y")
    assert two.class_counts.tolist() == [10, 1, 0]
    assert sorted([*one.ids, *two.ids]) == sorted(data.ids)


@pytest.mark.parametrize("name", ["nad", "mcr"])
def test_a_repair_goes_on_from_its_checkpoints(name: str, backdoored: Backdoored, tmp_path: Path) -> None:
    method = REPAIRS.build(name, QUICK[name])
    whole = method(backdoored.model, backdoored.clean, checkpoint=tmp_path / f"{name}.pt")
    assert len(list(tmp_path.glob(f"{name}-*.pt"))) == 2
    again = method(backdoored.model, backdoored.clean, checkpoint=tmp_path / f"{name}.pt")
    assert same(state_of(whole.model), state_of(again.model))
    assert whole.history["epochs"] == again.history["epochs"], "an epoch was trained anew"
    afresh = method(backdoored.model, backdoored.clean)
    assert torch.equal(
        logits_of(afresh.model, backdoored.test.images[:8]),
        logits_of(whole.model, backdoored.test.images[:8]),
    )
