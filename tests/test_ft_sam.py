"""FT-SAM: the step to the worst weights, and what it comes to without one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from untrojan.cost import measure
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.repair.ft_sam import FTSAM, sharpest_direction, sharpness_aware
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.training.gradients import carrying
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe

QUICK = Recipe(epochs=2, batch_size=16, optimizer="sgd", learning_rate=0.05, weight_decay=1e-3, flip=True)


def small_net(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(8, 3),
    )  # fmt: skip
    return Classifier(network, 3, torch.full((3,), 0.5), torch.full((3,), 0.25))


def coloured(count: int = 60) -> ImageSet:
    labels = torch.arange(count) % 3
    images = torch.randint(0, 128, (count, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    images[torch.arange(count), labels] += 100
    return ImageSet(images.to(torch.uint8), labels, ("red", "green", "blue"), numbered(count))


def cross_entropy(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(images)
    return F.cross_entropy(logits, labels), logits


@pytest.mark.parametrize("adaptive", [True, False])
def test_without_a_radius_it_is_plain_training_bit_for_bit(adaptive: bool) -> None:
    plain, sharp, data = small_net(), small_net(), coloured()
    first = train(plain, data, QUICK, seed=3)
    second = train(sharp, data, QUICK, seed=3, loss=sharpness_aware(cross_entropy, 0.0, adaptive))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, sharp.state_dict()[name]), name
    assert [epoch.loss for epoch in first.epochs] == [epoch.loss for epoch in second.epochs]
    moved = small_net()
    train(moved, data, QUICK, seed=3, loss=sharpness_aware(cross_entropy, 0.5, adaptive))
    assert not torch.equal(moved.network[6].weight, plain.network[6].weight)  # type: ignore[index]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 5), st.booleans())
def test_no_step_within_the_radius_climbs_further(seed: int, rho: float, adaptive: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (4,)]
    weights = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    gradients = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]

    def measured(steps: list[Tensor]) -> float:
        relative = [s / w.abs() if adaptive else s for s, w in zip(steps, weights, strict=True)]
        return float(torch.cat([each.flatten() for each in relative]).norm())

    def climbed(steps: list[Tensor]) -> float:
        return float(sum((s * g).sum() for s, g in zip(steps, gradients, strict=True)))

    best = sharpest_direction(weights, gradients, rho, adaptive)
    assert measured(best) == pytest.approx(rho)
    for _ in range(10):
        other = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
        shorter = rho / measured(other)
        assert climbed([shorter * each for each in other]) <= climbed(best) + 1e-9


def test_the_gradient_is_that_at_the_worst_weights() -> None:
    model, data = small_net().eval(), coloured(16)
    images, rows = data.images.float() / 255, torch.arange(16)
    weights = list(model.parameters())
    value, _ = sharpness_aware(cross_entropy, 0.3, False)(model, images, data.labels, rows)
    before = [weight.detach().clone() for weight in weights]
    value.backward()  # type: ignore[no-untyped-call]
    moved = copy.deepcopy(model)
    there = list(moved.parameters())
    loss, _ = cross_entropy(moved, images, data.labels, rows)
    assert float(value.detach()) == float(loss.detach())
    slopes = torch.autograd.grad(loss, there)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    with torch.no_grad():
        for weight, slope in zip(there, slopes, strict=True):
            weight.add_(0.3 * slope / length)
    expected = torch.autograd.grad(cross_entropy(moved, images, data.labels, rows)[0], there)
    for weight, old, gradient in zip(weights, before, expected, strict=True):
        assert torch.equal(weight, old)
        assert weight.grad is not None
        assert torch.allclose(weight.grad, gradient, rtol=1e-4, atol=1e-7)


def test_a_carried_gradient_is_exact_and_the_value_stays() -> None:
    weight, gradient = nn.Parameter(torch.randn(5)), torch.randn(5)
    value = carrying(torch.tensor(0.7), [(weight, gradient)])
    value.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(value.detach(), torch.tensor(0.7))
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient)


def test_statistics_move_once_a_step() -> None:
    model, data = small_net(), coloured()
    train(model, data, QUICK, loss=sharpness_aware(cross_entropy, 0.5, True))
    norm = model.network[1]  # type: ignore[index]
    assert int(norm.num_batches_tracked) == 2 * 4
    assert norm.track_running_stats


def test_fine_tuning_leaves_the_given_model_alone_and_resumes(tmp_path: Path) -> None:
    model, data = small_net().eval(), coloured()
    train(model, data, replace(QUICK, epochs=10))
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    method = FTSAM(epochs=3, batch_size=16, rho=0.5)
    with measure() as cost:
        report = method(model, data, checkpoint=tmp_path / "tuned.pt")
    assert (cost.forwards, cost.backwards) == (24, 24)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(report.history["epochs"]) == 3
    rates = [epoch["learning_rate"] for epoch in report.history["epochs"]]
    assert rates[0] > rates[1] > rates[2]
    again = method(model, data, checkpoint=tmp_path / "tuned.pt")
    for name, value in report.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    with pytest.raises(UntrojanError, match="another run"):
        method(small_net(7), data, checkpoint=tmp_path / "tuned.pt")
