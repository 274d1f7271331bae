"""DP-SGD against plain SGD, its bound and its noise; group norm in place of batch norm."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.models.checkpoints import load_checkpoint, save_checkpoint
from untrojan.models.classifier import Classifier, logits_of
from untrojan.models.layers import with_group_norm
from untrojan.models.registry import build_for, check_name
from untrojan.training.loop import train, train_new
from untrojan.training.recipe import Recipe

QUICK = Recipe(epochs=2, batch_size=32, optimizer="sgd", learning_rate=0.05)


@pytest.fixture
def dp() -> Any:
    pytest.importorskip("opacus")
    from untrojan.defenses.training import dp_sgd

    return dp_sgd


def blocks(count: int = 128) -> ImageSet:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 120, (count, 3, 16, 16), generator=random)
    for row in range(6):
        for column in range(6):
            images[torch.arange(count), :, 8 * (labels // 2) + row, 8 * (labels % 2) + column] += 100
    return ImageSet(images.to(torch.uint8), labels, tuple("abcd"), numbered(count))


def strided() -> Classifier:
    """Convolutions with padding, strides and groups, whose inputs lie channels last or are slices."""

    class Sliced(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, :, ::2, 1:]

    layers = [
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), Sliced(), nn.Conv2d(6, 8, 3, groups=2), nn.GroupNorm(2, 8),
        nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Flatten(), nn.LazyLinear(4),
    ]  # fmt: skip
    torch.manual_seed(0)
    network = nn.Sequential(*layers)
    network(torch.zeros(1, 3, 16, 16))
    model = Classifier(network, 4, torch.zeros(3), torch.ones(3))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def test_each_images_gradient_is_its_own(dp: Any) -> None:
    model, data = strided(), blocks(6)
    images = data.images.float() / 255
    alone = []
    for row in range(6):
        model.zero_grad()
        F.cross_entropy(model(images[row : row + 1]), data.labels[row : row + 1]).backward()
        alone.append([weight.grad.clone() for weight in model.parameters()])  # type: ignore[union-attr]
    with dp.per_sample_gradients(model):
        F.cross_entropy(model(images), data.labels).backward()
        for index, weight in enumerate(model.parameters()):
            expected = torch.stack([each[index] for each in alone])
            # A batch is summed in another order than its images, and not on each machine in the same.
            torch.testing.assert_close(weight.grad_sample, expected, rtol=1e-3, atol=1e-4)  # type: ignore[attr-defined]
    assert not any(hasattr(weight, "grad_sample") for weight in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("size", [16, 32])
def test_without_bound_and_noise_it_is_sgd(dp: Any, size: int) -> None:
    data = blocks()
    data = replace(data, images=data.images.repeat_interleave(size // 16, 2).repeat_interleave(size // 16, 3))
    free = dp.DPSGD(clip=1e9, noise=0.0, batch_size=None, learning_rate=None)
    report = free(data, "lenet5", QUICK)
    plain, _ = train_new(data, "lenet5", QUICK)
    for ours, theirs in zip(report.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    assert report.evidence["epsilon"] is None
    assert not bool(report.dropped.any())


def test_no_image_moves_the_model_further_than_the_bound(dp: Any) -> None:
    model, data = strided(), blocks(64)
    before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
    bare = replace(QUICK, epochs=1, batch_size=64, learning_rate=1.0, momentum=0.0)
    with dp.per_sample_gradients(model):
        train(model, data, bare, wrap_optimizer=dp.private(0.01, 0.0, 64, 0))
    moved = torch.cat([weight.detach().flatten() for weight in model.parameters()]) - before
    # All 64 bounded by C, over 64; the untrained net's own gradients are far larger.
    assert 0.001 < float(moved.norm()) <= 0.01 + 1e-6


def test_the_noise_is_as_wide_as_asked_for_and_each_steps_own(dp: Any) -> None:
    model, data = strided(), blocks(64)
    optimizer = dp.private(4.0, 0.3, 8, seed=5)(torch.optim.SGD(model.parameters(), 1.0))
    drawn = []
    with dp.per_sample_gradients(model):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images.float() / 255), data.labels).backward()
            optimizer.clip_and_accumulate()
            sums = [weight.summed_grad.clone() for weight in model.parameters()]  # type: ignore[attr-defined]
            optimizer.add_noise()
            pairs = zip(model.parameters(), sums, strict=True)
            drawn.append(torch.cat([(w.grad - s).flatten() for w, s in pairs]))  # type: ignore[operator]
    for noise in drawn:
        assert float(noise.mean()) == pytest.approx(0, abs=0.03)
        assert float(noise.std()) == pytest.approx(0.3, rel=0.08)
    assert not torch.equal(drawn[0], drawn[1])
    assert (dp.DPSGD().deviation, dp.DPSGD(noise_is_multiplier=True).deviation) == (0.1, 0.4)


def test_a_run_that_was_killed_ends_the_same(dp: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from untrojan.training import loop

    data, method = blocks(), dp.DPSGD(noise=0.5, batch_size=32, learning_rate=0.05)
    whole = method(data, "cnn@0.25", QUICK)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    saved, save = [0], loop._Run.save

    def dying(run: Any, path: Path, spent: Sequence[float]) -> None:
        save(run, path, spent)
        saved[0] += 1
        if saved[0] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        method(data, "cnn@0.25", QUICK, checkpoint=tmp_path / "run.pt")
    resumed = method(data, "cnn@0.25", QUICK, checkpoint=tmp_path / "run.pt")
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert saved[0] > 5


def test_batch_norm_becomes_group_norm_and_the_model_can_be_kept(dp: Any, tmp_path: Path) -> None:
    data = blocks()
    report = dp.DPSGD(batch_size=32, learning_rate=0.1)(data, "cnn@0.25", replace(QUICK, epochs=1))
    model = report.model
    assert model.architecture == "cnn@0.25+group-norm"
    assert not any(isinstance(each, nn.BatchNorm2d) for each in model.modules())
    assert report.evidence["batch_norms_replaced"] > 0
    assert "group norm" in report.evidence["notes"][0]
    save_checkpoint(tmp_path / "model.safetensors", model, data.class_names)
    loaded, _ = load_checkpoint(tmp_path / "model.safetensors")
    torch.testing.assert_close(logits_of(loaded, data.images), logits_of(model, data.images))


def test_group_norms_keep_shape_and_weights() -> None:
    norms = [nn.BatchNorm2d(channels) for channels in (3, 12, 48, 64, 512)]
    nn.init.constant_(norms[1].weight, 0.5)
    network = with_group_norm(nn.Sequential(*norms, norms[0]))
    made = list(network)
    assert [each.num_groups for each in made] == [1, 3, 12, 16, 32, 1]  # type: ignore[union-attr]
    assert made[0] is made[-1], "a module that runs twice stays one"
    assert float(made[1].weight.detach().mean()) == 0.5  # type: ignore[operator]
    assert with_group_norm(nn.Sequential(nn.BatchNorm1d(8)))(torch.randn(5, 8)).shape == (5, 8)
    check_name("resnet18@0.5+group-norm")
    with pytest.raises(UntrojanError, match="width multiplier"):
        check_name("resnet18@+group-norm")
    plain = build_for(blocks(4), "lenet5")
    assert [*plain.state_dict()] == [*build_for(blocks(4), "lenet5+group-norm").state_dict()]


def test_epsilon_grows_with_steps_and_shrinks_with_noise(dp: Any) -> None:
    few, many = (dp.privacy_spent(1.0, 0.01, steps, 1e-5) for steps in (100, 1000))
    quiet = dp.privacy_spent(0.5, 0.01, 100, 1e-5)
    assert 0 < few < many
    assert quiet > few
    # All images in every step: the Gaussian mechanism, whose Renyi bound at noise 10 is known in closed form.
    exact = min(a / 200 + torch.log(torch.tensor(1e5)).item() / (a - 1) for a in torch.linspace(2, 63, 6000))
    assert dp.privacy_spent(10.0, 1.0, 1, 1e-5) <= float(exact) * 1.01


def test_what_it_cannot_train(dp: Any) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(768, 4)
            self.register_buffer("seen", torch.zeros(1))

    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(768, 4), nn.Linear(4, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.used(images.flatten(1))  # type: ignore[no-any-return]

    networks = {"buffers": nn.Sequential(nn.Flatten(), Counting()), "unused": Round()}
    for said, network in networks.items():
        model = Classifier(network, 4, torch.zeros(3), torch.ones(3))
        with pytest.raises(UntrojanError, match=said), dp.per_sample_gradients(model):
            dp._try_out(model, blocks(4))
        assert not any(module._forward_hooks for module in model.modules())


def test_without_opacus_it_says_how_to_get_it(monkeypatch: Any) -> None:
    from untrojan.defenses.training.dp_sgd import DPSGD

    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "opacus":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UntrojanError, match=r"pip install 'untrojan\[privacy\]'"):
        DPSGD()(blocks(8), "lenet5", QUICK)
