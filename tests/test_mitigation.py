"""Neural Cleanse's three mitigations, on a net with a backdoor neuron of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.repair.neuron_pruning import NeuronPruning, pruning_order
from untrojan.defenses.repair.unlearning import Unlearning
from untrojan.defenses.scanning.input_filter import InputFiltering
from untrojan.defenses.scanning.report import InvertedTrigger
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, predictions_of

CLASSES, TARGET, BACKDOOR = 4, 1, 7


@pytest.fixture
def case() -> tuple[Classifier, ImageSet, InvertedTrigger]:
    """Class k lights channel-wise block k. Neuron k fires for block k, neuron 7 for a white corner alone."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % CLASSES
    images = torch.randint(0, 60, (200, 3, 8, 8), generator=random)
    for row in range(2):
        for column in range(4):
            images[torch.arange(200), :, 2 * (labels // 2) + row, 4 * (labels % 2) + column] += 120
    first, second = nn.Linear(192, 8), nn.Linear(8, CLASSES)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.zero_()
        second.weight.zero_()
        second.bias.zero_()
        for label in range(CLASSES):
            block = torch.zeros(3, 8, 8)
            top, left = 2 * (label // 2), 4 * (label % 2)
            block[:, top : top + 2, left : left + 4] = 1
            first.weight[label] = block.flatten()
            second.weight[label, label] = 1
        corner = torch.zeros(3, 8, 8)
        corner[:, 7, 7] = 10
        first.weight[BACKDOOR] = corner.flatten()
        first.bias[BACKDOOR] = -20
        second.weight[TARGET, BACKDOOR] = 5
    network = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)
    model = Classifier(network, CLASSES, torch.zeros(3), torch.ones(3))
    data = ImageSet(images.to(torch.uint8), labels, ("a", "b", "c", "d"), numbered(200))
    mask = torch.zeros(1, 8, 8)
    mask[0, 7, 7] = 1
    return model, data, InvertedTrigger(mask, torch.ones(3, 8, 8))


def success(model: Classifier, data: ImageSet, trigger: InvertedTrigger) -> float:
    others = data.images[data.labels != TARGET]
    stamped = (trigger(others.float() / 255) * 255).round().to(torch.uint8)
    return float((predictions_of(model, stamped) == TARGET).float().mean())


def accuracy(model: Classifier, data: ImageSet) -> float:
    return float((predictions_of(model, data.images) == data.labels).float().mean())


def weights(model: Classifier) -> list[Tensor]:
    return [copy.deepcopy(parameter.detach()) for parameter in model.parameters()]


def test_pruning_takes_the_backdoors_neuron_and_no_other(
    case: tuple[Classifier, ImageSet, InvertedTrigger],
) -> None:
    model, data, trigger = case
    before = weights(model)
    assert (accuracy(model, data), success(model, data, trigger)) == (1.0, 1.0)
    report = NeuronPruning()(model, data, trigger, TARGET)
    assert (accuracy(report.model, data), success(report.model, data, trigger)) == (1.0, 0.0)
    assert report.history["pruned"] == 1 / 8
    last = report.model.network[3]  # type: ignore[index]
    assert last.weight[:, BACKDOOR].abs().sum() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_pruning_stops_before_it_costs_too_much(case: tuple[Classifier, ImageSet, InvertedTrigger]) -> None:
    model, data, trigger = case
    # The trigger excites class a's neuron most of all: silencing that would cost a quarter of all images.
    first_layer, last = model.network[1], model.network[3]  # type: ignore[index]
    with torch.no_grad():
        corner = first_layer.weight[BACKDOOR].clone()
        first_layer.weight[BACKDOOR] += first_layer.weight[0]
        first_layer.weight[0] = 0
        first_layer.weight[6] = corner / 2
        first_layer.bias[BACKDOOR], first_layer.bias[6] = 0, -8
        last.weight[:, BACKDOOR] = torch.tensor([1.0, 0, 0, 0])
        last.weight[TARGET, 6] = 10
    assert success(model, data, trigger) == 1.0
    first = accuracy(model, data)
    report = NeuronPruning(accuracy_cost=0.02)(model, data, trigger, TARGET)
    assert accuracy(report.model, data) == first > 0.98
    assert report.history["pruned"] == 0.0
    free = NeuronPruning(accuracy_cost=1.0)(model, data, trigger, TARGET)
    assert accuracy(free.model, data) < first - 0.02


def test_pruning_needs_other_classes(case: tuple[Classifier, ImageSet, InvertedTrigger]) -> None:
    model, data, trigger = case
    with pytest.raises(UntrojanError, match="clean images of other classes"):
        NeuronPruning()(model, data.select(data.labels == TARGET), trigger, TARGET)


def test_unlearning_keeps_accuracy_and_ends_the_backdoor(
    case: tuple[Classifier, ImageSet, InvertedTrigger],
) -> None:
    model, data, trigger = case
    before = weights(model)
    report = Unlearning(epochs=6, learning_rate=0.02)(model, data, trigger)
    assert accuracy(report.model, data) > 0.98
    assert success(report.model, data, trigger) < 0.05
    assert len(report.history["epochs"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    # Without stamped images the same fine-tuning leaves the backdoor where it is.
    plain = Unlearning(stamped=0.0, epochs=6, learning_rate=0.02)(model, data, trigger)
    assert success(plain.model, data, trigger) > 0.9


def test_the_filter_refuses_triggered_images_at_the_stated_cost(
    case: tuple[Classifier, ImageSet, InvertedTrigger],
) -> None:
    model, data, trigger = case
    fitted = InputFiltering(watched=0.125, false_rejection_rate=0.05)(model, data, trigger)
    assert fitted.neurons.tolist() == [BACKDOOR]
    stamped = (trigger(data.images.float() / 255) * 255).round().to(torch.uint8)
    assert bool(fitted(stamped).all())
    assert float(fitted(data.images).float().mean()) <= 0.05
    with pytest.raises(UntrojanError, match="clean images"):
        InputFiltering()(model, data.select(data.labels > 9), trigger)


def test_neurons_are_ordered_by_excitation() -> None:
    clean, triggered = torch.zeros(5, 3), torch.tensor([[1.0, 3.0, -2.0]]).expand(5, 3)
    assert pruning_order(clean, triggered).tolist() == [1, 0, 2]
