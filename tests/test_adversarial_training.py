"""PGD and robustness against closed forms; hardening by training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from untrojan.cost import measure
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.training.registry import TRAINING_DEFENSES
from untrojan.defenses.training.universal import UniversalAdversarialTraining, ascended
from untrojan.errors import UntrojanError
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.metrics.robustness import PROTOCOLS, robust_accuracy
from untrojan.models.classifier import Classifier
from untrojan.training.adversarial import PGD, pgd
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe


def linear_model(seed: int = 0) -> tuple[Classifier, nn.Linear]:
    torch.manual_seed(seed)
    linear = nn.Linear(3 * 4 * 4, 2)
    return Classifier(nn.Sequential(nn.Flatten(), linear), 2, torch.zeros(3), torch.ones(3)), linear


def grey_images(count: int, seed: int = 0) -> Tensor:
    """uint8, far from black and white."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(90, 160, (count, 3, 4, 4), generator=random).to(torch.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.2), st.booleans())
def test_on_a_linear_model_every_pixel_goes_all_the_way(seed: int, epsilon: float, starts: bool) -> None:
    model, linear = linear_model(seed)
    images = grey_images(20, seed).float() / 255
    labels = torch.arange(20) % 2
    attack = PGD(epsilon, epsilon / 4, 10, random_start=starts)
    found = attack(model, images, labels, torch.Generator().manual_seed(seed))
    away = (linear.weight[1] - linear.weight[0]).sign().view(1, 3, 4, 4)
    expected = images + epsilon * torch.where(labels.view(-1, 1, 1, 1) == 0, away, -away)
    assert torch.allclose(found, expected, atol=1e-6)
    assert linear.weight.grad is None


def test_adversarial_images_stay_in_the_ball_and_the_range() -> None:
    model, _ = linear_model()
    images = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(1)).round()
    labels = torch.zeros(50, dtype=torch.int64)
    for random in (None, torch.Generator().manual_seed(2)):
        found = pgd(model, images, labels, epsilon=0.3, step=0.2, steps=3, random=random)
        assert float((found - images).abs().max()) <= 0.3 + 1e-6
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
    start = pgd(
        model, images, labels, epsilon=0.3, step=0.2, steps=0, random=torch.Generator().manual_seed(2)
    )
    # Half of the uniform starts lie outside the range of black and white pixels.
    assert float((start - images).abs().mean()) == pytest.approx(0.3 / 4, abs=0.01)
    assert torch.equal(pgd(model, images, labels, epsilon=0.3, step=0.2, steps=0), images)


def test_robustness_of_a_linear_model_is_exact() -> None:
    model, linear = linear_model(4)
    model.train()
    images = grey_images(300)
    with torch.no_grad():
        logits = model(images.float() / 255)
        # Half of the images on either side.
        linear.bias[0] += (logits[:, 1] - logits[:, 0]).median()
        labels = model(images.float() / 255).argmax(1)
    labels[:30] = 1 - labels[:30]
    data = ImageSet(images, labels, ("a", "b"), numbered(300))
    epsilon = 0.005
    with torch.no_grad():
        logits = model(images.float() / 255)
    margin = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
    reach = epsilon * float((linear.weight[1] - linear.weight[0]).detach().abs().sum())
    expected = float((margin > reach).double().mean())
    assert 0.05 < expected < 0.85
    attack = PGD(epsilon, epsilon / 5, 12)
    assert robust_accuracy(model, data, attack, batch_size=77) == pytest.approx(expected, abs=1e-9)
    first = float((margin[:100] > reach).double().mean())
    assert robust_accuracy(model, data, attack, most=100) == pytest.approx(first, abs=1e-9)
    assert robust_accuracy(model, data, PGD(0, 0, 1)) == pytest.approx(0.9)
    assert model.training
    assert linear.weight.requires_grad
    with pytest.raises(UntrojanError, match="empty"):
        robust_accuracy(model, data.select(torch.arange(0)))
    assert (PROTOCOLS["cifar10"].steps, PROTOCOLS["lisa"].epsilon) == (20, 0.1)


def two_cues(count: int = 256) -> ImageSet:
    """Class by one bright quarter, wrong one time in ten, and by a faint fine pattern, never wrong."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randint(100, 130, (count, 3, 16, 16), generator=random)
    seen = torch.where(torch.rand(count, generator=random) < 0.1, 1 - labels, labels)
    images[seen == 0, :, :8, :8] += 90
    images[seen == 1, :, 8:, 8:] += 90
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    fine = 8 * ((rows + columns) % 2 * 2 - 1)
    images += torch.where(labels.view(-1, 1, 1, 1) == 0, fine, -fine)
    return ImageSet(images.clamp(0, 255).to(torch.uint8), labels, ("a", "b"), numbered(count))


RECIPE = Recipe(epochs=6, batch_size=32, optimizer="sgd", learning_rate=0.05, schedule="one_cycle")


def test_hardened_nets_stand_the_attack_that_a_plain_one_falls_to() -> None:
    data, attack = two_cues(), PGD(0.06, 0.02, 8)
    plain, _ = train_new(data, "cnn@0.125", RECIPE)
    assert benign_accuracy(plain, data) > 0.95
    assert robust_accuracy(plain, data, attack) < 0.4
    hardened = TRAINING_DEFENSES.build("pgd", {"epsilon": 0.06, "step": 0.02, "steps": 4})
    report = hardened(data, "cnn@0.125", RECIPE)
    assert robust_accuracy(report.model, data, attack) > 0.7
    assert not bool(report.dropped.any())
    assert len(report.history) == 6


@pytest.mark.parametrize("simultaneous", [False, True])
def test_universal_training_stands_the_pattern_that_a_plain_net_falls_to(simultaneous: bool) -> None:
    data = two_cues()

    def under_pattern(model: Classifier) -> float:
        rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        pattern = 16 * ((rows + columns) % 2 * 2 - 1)
        worst = []
        for sign in (1, -1):
            moved = (data.images.int() + sign * pattern).clamp(0, 255).to(torch.uint8)
            worst.append(benign_accuracy(model, ImageSet(moved, data.labels, data.class_names, data.ids)))
        return min(worst)

    plain, _ = train_new(data, "cnn@0.125", RECIPE)
    options = {"epsilon": 0.06, "simultaneous": simultaneous}
    with measure() as cost:
        report = TRAINING_DEFENSES.build("uap", options)(data, "cnn@0.125", RECIPE)
    assert cost.backwards == 48 * (1 if simultaneous else 2)
    assert report.evidence["largest_perturbation"] == pytest.approx(0.06)
    assert under_pattern(plain) < 0.6
    assert under_pattern(report.model) > under_pattern(plain) + 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_ascent_is_bounded_and_uphill(seed: int, epsilon: float, step: float) -> None:
    random = torch.Generator().manual_seed(seed)
    start = (2 * torch.rand(1, 3, 4, 4, generator=random) - 1) * epsilon
    gradient = torch.randn(1, 3, 4, 4, generator=random)
    moved = ascended(start, gradient, epsilon, step)
    assert float(moved.abs().max()) <= epsilon + 1e-7
    assert bool(((moved - start) * gradient >= 0).all())


@pytest.mark.parametrize(
    ("name", "options"), [("pgd", {"steps": 2}), ("uap", {}), ("uap", {"simultaneous": True})]
)
def test_a_killed_run_ends_the_same(
    name: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("untrojan.training.loop.CHECKPOINT_SECONDS", 0.0)
    data, method = two_cues(64), TRAINING_DEFENSES.build(name, options)
    short = Recipe(epochs=3, batch_size=16, optimizer="sgd", learning_rate=0.05, crop_padding=1)
    whole = method(data, "cnn@0.125", short)
    calls, cross_entropy = 0, F.cross_entropy

    def interrupted(*arguments: Tensor, **settings: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 17:
            raise KeyboardInterrupt
        return cross_entropy(*arguments, **settings)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(F, "cross_entropy", interrupted)
        if (name, options) == ("uap", {"simultaneous": True}):
            calls = 10
        with pytest.raises(KeyboardInterrupt):
            method(data, "cnn@0.125", short, checkpoint=tmp_path / "run.pt")
    assert (tmp_path / "run.pt").exists()
    resumed = method(data, "cnn@0.125", short, checkpoint=tmp_path / "run.pt")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert whole.evidence == resumed.evidence


def test_a_capped_loss_needs_its_own_gradient() -> None:
    with pytest.raises(UntrojanError, match="simultaneous=false"):
        UniversalAdversarialTraining(simultaneous=True, loss_cap=2.0)
    model, linear = linear_model()
    with torch.no_grad():
        linear.weight[0] = 100
        linear.weight[1] = -100
    images = grey_images(4).float() / 255
    labels = torch.tensor([1, 1, 0, 0])
    zero = torch.zeros(1, 3, 4, 4)
    capped = UniversalAdversarialTraining(loss_cap=3.0)._gradient(model, images, labels, zero)
    free = UniversalAdversarialTraining()._gradient(model, images, labels, zero)
    assert float(capped.abs().sum()) == 0 < float(free.abs().sum())
