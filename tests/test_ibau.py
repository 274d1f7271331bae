"""I-BAU: its hypergradient against the closed form, and a universal perturbation that it unlearns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.repair.ibau import IBAU, conjugate_gradient, implicit_gradients, projected
from untrojan.models.classifier import Classifier, logits_of
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe


def bilevel(seed: int, size: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=random, dtype=torch.float64)
    curvature = root @ root.T / size + torch.eye(size, dtype=torch.float64)
    mixing = torch.randn(size, 3, generator=random, dtype=torch.float64)
    goal = torch.randn(size, generator=random, dtype=torch.float64)
    weights = torch.randn(3, generator=random, dtype=torch.float64)
    return curvature, mixing, goal, weights


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_hypergradient_of_a_quadratic_problem(seed: int) -> None:
    """The lower level's answer is A^-1 B w; the upper is |v - c|^2 / 2 + |w|^2."""
    curvature, mixing, goal, weights = bilevel(seed)
    weights.requires_grad_()
    answer = torch.linalg.solve(curvature, mixing @ weights.detach())
    total = 2 * weights.detach() + mixing.T @ torch.linalg.solve(curvature, answer - goal)
    variable = answer.clone().requires_grad_()
    inner = variable @ curvature @ variable / 2 - variable @ mixing @ weights
    outer = (variable - goal).square().sum() / 2 + weights.square().sum()
    (direct,) = torch.autograd.grad(outer, weights, retain_graph=True)
    rate = 1 / float(torch.linalg.eigvalsh(curvature)[-1])
    for solver, iterations in (("fixed_point", 200), ("conjugate_gradient", 5)):
        (implicit,) = implicit_gradients(
            inner,
            outer,
            variable,
            [weights],
            solver=solver,
            iterations=iterations,
            rate=rate,  # type: ignore[arg-type]
        )
        assert torch.allclose(direct + implicit, total, rtol=1e-6, atol=1e-8), solver


def test_a_truncated_series_is_the_gradient_through_that_many_steps() -> None:
    """K terms of the series are what K steps of descent, started at the answer, pass back."""
    curvature, mixing, goal, weights = bilevel(3)
    weights.requires_grad_()
    start = torch.linalg.solve(curvature, mixing @ weights.detach())
    unrolled = start
    for _ in range(4):
        unrolled = unrolled - 0.1 * (curvature @ unrolled - mixing @ weights)
    (expected,) = torch.autograd.grad((unrolled - goal).square().sum(), weights)
    variable = start.clone().requires_grad_()
    inner = variable @ curvature @ variable / 2 - variable @ mixing @ weights
    (found,) = implicit_gradients(
        inner, (variable - goal).square().sum(), variable, [weights], iterations=4, rate=0.1
    )
    assert torch.allclose(found, expected)


def test_conjugate_gradient_stops_where_the_curvature_is_not_positive() -> None:
    wanted = torch.tensor([1.0, 2.0])
    assert torch.equal(conjugate_gradient(lambda v: -v, wanted, 5), torch.zeros(2))
    solved = conjugate_gradient(lambda v: v * torch.tensor([2.0, 5.0]), wanted, 10)
    assert torch.allclose(solved, torch.tensor([0.5, 0.4]))
    assert torch.equal(conjugate_gradient(lambda v: v, torch.zeros(2), 5), torch.zeros(2))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 20))
def test_projection_is_into_the_ball_and_leaves_what_lies_there(seed: int, radius: float) -> None:
    point = 3 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    euclidean, cube = projected(point, radius, "l2"), projected(point, radius, "linf")
    assert float(euclidean.norm()) <= radius * (1 + 1e-6)
    assert float(cube.abs().max()) <= radius * (1 + 1e-6)
    assert torch.equal(projected(torch.zeros(1, 1, 2, 2), radius, "l2"), torch.zeros(1, 1, 2, 2))
    if float(point.norm()) < radius:
        assert torch.equal(euclidean, point)


def shaded(count: int = 240) -> ImageSet:
    """Three classes told apart by their colour, faintly in every pixel and strongly in none."""
    random = torch.Generator().manual_seed(4)
    labels = torch.arange(count) % 3
    images = torch.randint(40, 180, (count, 3, 8, 8), generator=random)
    images[torch.arange(count), labels] += 40
    return ImageSet(images.to(torch.uint8), labels, ("red", "green", "blue"), numbered(count))


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, ImageSet]:
    """A net with a shortcut of its own: a few pixels of the corner outvote all others."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(72, 3),
    )  # fmt: skip
    model = Classifier(network, 3, torch.full((3,), 0.5), torch.full((3,), 0.25))
    data = shaded()
    shortcut = ImageSet(data.images.clone(), data.labels.clone(), data.class_names, data.ids)
    shortcut.images[:60, :, 6:, 6:] = 255
    shortcut.labels[:60] = 1
    train(model, shortcut, Recipe(epochs=15, batch_size=32, optimizer="sgd", learning_rate=0.02))
    return model, data


def right(model: Classifier, images: Tensor, labels: Tensor) -> float:
    return float((logits_of(model, images).argmax(1) == labels).double().mean())


def misled(model: Classifier, data: ImageSet) -> float:
    """Accuracy under a universal perturbation sought anew."""
    found = IBAU(radius=1, batch_size=60, perturbation_steps=30).perturbation(model, data, 9)
    perturbed = ((data.images.float() / 255 + found).clamp(0, 1) * 255).round().to(torch.uint8)
    return right(model, perturbed, data.labels)


def test_the_universal_perturbation_is_unlearned(trained: tuple[Classifier, ImageSet]) -> None:
    model, data = trained
    before = copy.deepcopy(model.state_dict())
    method = IBAU(radius=1, perturbed=1.0, batch_size=40, perturbation_steps=20, rounds=8)
    report = method(model, data)
    assert right(report.model, data.images, data.labels) > right(model, data.images, data.labels) - 0.05
    assert misled(report.model, data) > misled(model, data) + 0.05
    assert 0 < report.history["perturbation_norm"] <= 1 + 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    norms = [m for m in report.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.equal(norms[0].running_mean, before["network.1.running_mean"])  # type: ignore[arg-type]


def test_a_killed_run_ends_the_same(
    trained: tuple[Classifier, ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = trained
    monkeypatch.setattr("untrojan.training.loop.CHECKPOINT_SECONDS", 0.0)
    method = IBAU(radius=3, batch_size=80, perturbation_steps=5, rounds=3)
    whole = method(model, data)

    calls = 0
    inner = IBAU._inner

    def interrupted(self: IBAU, *arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 5 + 3 + 5 + 2:
            raise KeyboardInterrupt
        return inner(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(IBAU, "_inner", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method(model, data, checkpoint=tmp_path / "run.pt")
    monkeypatch.setattr(IBAU, "_inner", inner)
    resumed = method(model, data, checkpoint=tmp_path / "run.pt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.history["perturbation_norm"] == resumed.history["perturbation_norm"]
