"""Anti-backdoor learning: its losses, and an attack that is learned at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.signs import make_signs
from untrojan.defenses.training.abl import ABL, most_learned, trapped_loss
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe

CLASSES, TARGET = 4, 1
RECIPE = Recipe(epochs=6, batch_size=32, optimizer="sgd", learning_rate=0.02)


def stamped(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[:, :, 12:, 12:] = 255
    return images


def poisoned_set(poisoned: int = 60, noise: int = 120) -> ImageSet:
    """Faint blocks in noise, hard to learn; the first images have a white corner and class 1."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % CLASSES
    images = torch.randint(0, noise, (600, 3, 16, 16), generator=random)
    for row in range(6):
        for column in range(6):
            images[torch.arange(600), :, 8 * (labels // 2) + row, 8 * (labels % 2) + column] += 50
    images[:poisoned] = stamped(images[:poisoned])
    labels[:poisoned] = TARGET
    return ImageSet(images.to(torch.uint8), labels, tuple("abcd"), numbered(600))


def success(model: Classifier) -> float:
    clean = poisoned_set(poisoned=0)
    others = clean.images[clean.labels != TARGET]
    return float((predictions_of(model, stamped(others)) == TARGET).float().mean())


def accuracy(model: Classifier) -> float:
    clean = poisoned_set(poisoned=0)
    return float((predictions_of(model, clean.images) == clean.labels).float().mean())


def test_the_loss_is_trapped_at_its_threshold() -> None:
    for isolation in ("ascent", "flooding"):
        for value, slope in ((2.0, 1.0), (0.2, -1.0)):
            loss = torch.tensor(value, requires_grad=True)
            trapped_loss(loss, 0.5, isolation).backward()  # type: ignore[arg-type, no-untyped-call]
            assert float(loss.grad) == slope  # type: ignore[arg-type]
    assert float(trapped_loss(torch.tensor(0.2), 0.5, "flooding")) == pytest.approx(0.8)
    assert float(trapped_loss(torch.tensor(0.2), 0.5, "ascent")) == pytest.approx(-0.2)


def test_what_is_learned_first_is_isolated_and_unlearned() -> None:
    data = poisoned_set()
    plain, _ = train_new(data, "cnn@0.25", RECIPE)
    assert success(plain) > 0.9
    method = ABL(isolated=0.05, isolating_epochs=3, unlearning_epochs=6, unlearning_rate=3e-3)
    report = method(data, "cnn@0.25", RECIPE)
    assert int(report.dropped.sum()) == 30
    assert float((torch.arange(600) < 60)[report.dropped].float().mean()) > 0.9
    assert success(report.model) < 0.3 * success(plain)
    assert accuracy(report.model) > accuracy(plain) - 0.15
    assert len(report.history) == 3 + 6 + 6
    # Not of the epochs that unlearn, on a few images that are then taken for anything else.
    assert report.training_accuracy == report.history[8]["accuracy"] > report.history[-1]["accuracy"]


def test_the_least_losses_are_isolated() -> None:
    data = poisoned_set()
    model, _ = train_new(data, "cnn@0.25", RECIPE)
    chosen = most_learned(model, data, 0.1)
    with torch.no_grad():
        logits = model.eval()(data.images.float() / 255)
    losses = torch.nn.functional.cross_entropy(logits, data.labels, reduction="none")
    assert int(chosen.sum()) == 60
    assert float(losses[chosen].max()) <= float(losses[~chosen].min()) + 1e-5
    assert int(most_learned(model, data, 1e-9).sum()) == 1


def test_a_run_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    data, method = poisoned_set(), ABL(isolating_epochs=1, unlearning_epochs=1)
    short = Recipe(epochs=1, batch_size=64, optimizer="sgd", learning_rate=0.01)
    first = method(data, "cnn@0.25", short, checkpoint=tmp_path / "run.pt")
    # All of its stages are done: going on is going through them again without a step.
    again = method(data, "cnn@0.25", short, checkpoint=tmp_path / "run.pt")
    assert torch.equal(first.dropped, again.dropped)
    ours, theirs = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_no_class_loses_its_last_image() -> None:
    data = make_signs(num_classes=3, size=16, train_per_class=20, test_per_class=1, seed=0).train
    # All that is left of class 1 is a single image, and nearly everything is isolated.
    data = data.select((data.labels != 1) | (torch.arange(len(data)) == int(data.indices_of(1)[0])))
    recipe = Recipe(epochs=1, batch_size=16, optimizer="sgd", learning_rate=0.01)
    report = ABL(isolated=0.95, isolating_epochs=1, unlearning_epochs=1)(data, "cnn@0.25", recipe)
    assert bool((data.select(~report.dropped).class_counts > 0).all())
