"""CLP and ANP: their mathematics, and a net whose backdoor sits in channels that we know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.signs import make_signs
from untrojan.defenses.repair.anp import ANP, masked_weights, neurons
from untrojan.defenses.repair.clean_data import epochs_for, held_out
from untrojan.defenses.repair.clp import CLP, channel_norms, outlying
from untrojan.defenses.repair.registry import REPAIRS
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, logits_of, pixel_statistics, predictions_of
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe

CLASSES, TARGET, SIDE = 3, 1, 16


def network(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for number, width in enumerate(widths):
        stride = 1 if number == 0 else 2
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def stamped(images: Tensor) -> Tensor:
    """A magenta square in the bottom right corner."""
    images = images.clone()
    images[:, :, 13:, 13:] = torch.tensor([255, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    return images


def success(model: Classifier, test: ImageSet) -> float:
    others = test.images[test.labels != TARGET]
    return float((predictions_of(model, stamped(others)) == TARGET).double().mean())


def accuracy(model: Classifier, test: ImageSet) -> float:
    return float((predictions_of(model, test.images) == test.labels).double().mean())


@pytest.fixture(scope="module")
def case() -> tuple[Classifier, ImageSet, ImageSet]:
    """A net trained on clean signs, and then given a backdoor by hand: the last channel of each layer."""
    data = make_signs(CLASSES, SIDE, train_per_class=100, test_per_class=50)
    assert data.test is not None
    torch.manual_seed(0)
    model = Classifier(
        network((15, 23, 23)), CLASSES, *pixel_statistics(data.train), image_shape=(3, SIDE, SIDE)
    )
    recipe = Recipe(
        epochs=8, batch_size=32, optimizer="sgd", learning_rate=0.05, weight_decay=5e-4, schedule="one_cycle"
    )
    train(model, data.train, recipe)
    infected = Classifier(network((16, 24, 24)), CLASSES, model.mean.flatten(), model.std.flatten())
    infected.eval().requires_grad_(False)
    for ours, theirs in zip(infected.network.modules(), model.network.modules(), strict=True):
        for name, value in theirs.state_dict().items() if not list(theirs.children()) else ():
            place = ours.state_dict()[name]
            place.zero_() if place.ndim else None
            place[tuple(slice(n) for n in value.shape)] = value
    plant(infected, data.train)
    infected.requires_grad_(True)
    return infected, data.train, data.test


def plant(model: Classifier, clean: ImageSet) -> None:
    first, norm1, _, second, norm2, _, third, norm3, _, _, _, last = model.network.children()
    first.weight[-1] = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)  # type: ignore[index, operator]
    second.weight[-1, -1, 1, 1] = 3  # type: ignore[index, operator]
    third.weight[-1, -1] = 3  # type: ignore[index, operator]
    for norm in (norm1, norm2, norm3):
        norm.running_var[-1], norm.weight[-1] = 1, 1  # type: ignore[index, operator]

    def strongest(images: Tensor) -> Tensor:
        return first((images / 255 - model.mean) / model.std)[:, -1].flatten(1).amax(1)  # type: ignore[no-any-return]

    highest, lowest = strongest(clean.images).max(), strongest(stamped(clean.images)).min()
    assert 1.2 * highest < lowest
    # Clean images come near: weights perturbed a little carry them over.
    threshold = 1.05 * highest
    norm1.bias[-1] = -threshold  # type: ignore[index, operator]
    # Of 16 places that are averaged, one answers.
    last.weight[TARGET, -1] = 16 * 60 / (9 * (lowest - threshold))  # type: ignore[index, operator]


def state(model: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_clp_ends_a_planted_backdoor_and_touches_little_else(
    case: tuple[Classifier, ImageSet, ImageSet],
) -> None:
    model, clean, test = case
    before, benign = state(model), accuracy(model, test)
    assert benign > 0.9
    assert success(model, test) == 1.0
    report = CLP()(model, clean.select(torch.arange(1)))
    assert success(report.model, test) < 0.1
    assert accuracy(report.model, test) > benign - 0.03
    assert 15 in report.history["pruned"]["network.0"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_anp_ends_a_planted_backdoor_with_clean_images_alone(
    case: tuple[Classifier, ImageSet, ImageSet], tmp_path: Path
) -> None:
    model, clean, test = case
    before, benign = state(model), accuracy(model, test)
    method = ANP(
        steps=60, batch_size=32, batch_statistics=False, epsilon=0.3, trade_off=0.5, learning_rate=0.1
    )
    some = clean.select(torch.arange(0, len(clean), 2))
    report = method(model, some, checkpoint=tmp_path / "masks.pt")
    assert success(report.model, test) < 0.2
    assert accuracy(report.model, test) > benign - 0.08
    assert [masks[-1] for masks in report.history["masks"].values()] == [0, 0, 0]
    looks = report.history["looks"]
    chosen = [look for look in looks if look["threshold"] == report.history["threshold"]]
    assert chosen[0]["benign_accuracy"] >= looks[0]["benign_accuracy"] - method.tolerance
    assert all(0 <= m <= 1 for masks in report.history["masks"].values() for m in masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Masks that are learned are not learned again, and those of another model are refused.
    again = method(model, some, checkpoint=tmp_path / "masks.pt")
    assert again.history == report.history
    other = Classifier(network((16, 24, 24)), CLASSES, model.mean.flatten(), model.std.flatten())
    with pytest.raises(UntrojanError, match="another run"):
        method(other, some, checkpoint=tmp_path / "masks.pt")


def explicit(filters: Tensor, side: int, padding: str) -> Tensor:
    """The matrix of one output channel's convolution on images of ``side``; filters (C_in, 3, 3)."""
    basis = torch.eye(filters.shape[0] * side * side, dtype=torch.float64).view(
        -1, filters.shape[0], side, side
    )
    padded = F.pad(basis, (1, 1, 1, 1), mode=padding)
    return F.conv2d(padded, filters[None]).flatten(1).T


def test_channel_norm_is_that_of_the_explicit_operator() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, 3, 3, generator=random, dtype=torch.float64)
    norms = channel_norms(weight, bound="operator", side=6)
    for filters, norm in zip(weight, norms, strict=True):
        circular = torch.linalg.svdvals(explicit(filters, 6, "circular"))[0]
        assert float(norm) == pytest.approx(float(circular), rel=1e-10)
    finer = channel_norms(weight, bound="operator", side=96)
    for filters, norm in zip(weight, finer, strict=True):
        # Zeros about the image only take away from a periodic one of any size.
        zeros = torch.linalg.svdvals(explicit(filters, 6, "constant"))[0]
        assert float(zeros) < float(norm) * 1.001
    kernel = channel_norms(weight)
    for filters, norm in zip(weight, kernel, strict=True):
        assert float(norm) == pytest.approx(float(torch.linalg.svdvals(filters.flatten(1))[0]), rel=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_kernel_norm_bounds_the_operator(inputs: int, height: int, width: int, seed: int) -> None:
    weight = torch.randn(3, inputs, height, width, generator=torch.Generator().manual_seed(seed))
    kernel, operator = channel_norms(weight), channel_norms(weight, bound="operator")
    assert bool((kernel <= operator * (1 + 1e-9)).all())
    assert bool((operator <= kernel * (height * width) ** 0.5 * (1 + 1e-9)).all())


def test_folded_norm_is_that_of_the_fused_convolution() -> None:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.normal_()
        norm.running_var.uniform_(0.1, 3)  # type: ignore[union-attr]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    fused = fuse_conv_bn_eval(convolution.eval(), norm.eval())
    expected = channel_norms(fused.weight)
    assert torch.allclose(channel_norms(convolution.weight, scale), expected, rtol=1e-5)


def test_outliers_are_above_the_mean_alone() -> None:
    norms = torch.tensor([1.0] * 20 + [9.0])
    assert outlying(norms, 3).nonzero().flatten().tolist() == [20]
    assert not bool(outlying(-norms, 3).any())
    assert not bool(outlying(torch.tensor([5.0]), 3).any())


def plain_set(count: int = 60) -> ImageSet:
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    return ImageSet(images.to(torch.uint8), torch.arange(count) % CLASSES, ("a", "b", "c"), numbered(count))


def test_without_batch_norm_the_convolution_itself_is_pruned() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, CLASSES)
    )
    model = Classifier(net, CLASSES, torch.zeros(3), torch.ones(3))
    with torch.no_grad():
        net[0].weight[7] *= 50  # type: ignore[operator]
    report = CLP()(model, plain_set())
    assert report.history["pruned"] == {"network.0": [7]}
    silenced = report.model.network[0]  # type: ignore[index]
    assert not bool(silenced.weight[7].any() | silenced.bias[7].any())
    assert list(neurons(model, plain_set())) == ["network.0"]
    masked = ANP(steps=4, batch_size=16)(model, plain_set())
    assert [len(each) for each in masked.history["masks"].values()] == [20]


def test_a_classifying_convolution_is_left_alone() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = Classifier(net, CLASSES, torch.zeros(3), torch.ones(3))
    assert list(neurons(model, plain_set())) == ["network.0"]
    linear = Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)), CLASSES, torch.zeros(3), torch.ones(3)
    )
    with pytest.raises(UntrojanError, match="none"):
        CLP()(linear, plain_set())
    with pytest.raises(UntrojanError, match="none"):
        ANP()(linear, plain_set())


def test_full_masks_without_perturbation_are_the_model_itself() -> None:
    torch.manual_seed(0)
    model = Classifier(network((4, 4, 4)), CLASSES, torch.zeros(3), torch.ones(3)).eval()
    data = plain_set()
    layers = neurons(model, data)
    ones = [torch.ones(4) for _ in layers]
    zeros = [torch.zeros(4) for _ in layers]
    same = masked_weights(layers, ones, zeros, zeros)
    images = data.images.float() / 255
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, same, (images,)), model(images))
        # A mask of zero leaves the bias, as pruning does.
        off = masked_weights(layers, [torch.zeros(4), *ones[1:]], zeros, zeros)
        first = dict(model.named_modules())["network.1"]
        first.weight.zero_()  # type: ignore[operator, union-attr]
        assert torch.equal(torch.func.functional_call(model, off, (images,)), model(images))


def test_a_mask_without_gradient_stays_one() -> None:
    torch.manual_seed(0)
    model = Classifier(network((4, 4, 6)), CLASSES, torch.zeros(3), torch.ones(3))
    with torch.no_grad():
        model.network[11].weight[:, 2:] = 0  # type: ignore[index, operator, union-attr]
    report = ANP(epsilon=0, trade_off=1, steps=20, batch_size=16)(model, plain_set())
    assert report.history["masks"]["network.7"][2:] == [1.0] * 4
    with torch.no_grad():
        model.network[11].weight.zero_()  # type: ignore[index, operator, union-attr]
    still = ANP(epsilon=0, trade_off=1, steps=20, batch_size=16)(model, plain_set())
    assert all(mask == 1 for masks in still.history["masks"].values() for mask in masks)
    assert still.history["pruned"] == {}
    assert torch.equal(logits_of(still.model, plain_set().images), logits_of(model, plain_set().images))


def test_perturbations_raise_the_loss_and_stay_in_twice_their_bound() -> None:
    torch.manual_seed(0)
    model = (
        Classifier(network((4, 4, 4)), CLASSES, torch.zeros(3), torch.ones(3)).eval().requires_grad_(False)
    )
    data = plain_set()
    images, layers = data.images.float() / 255, neurons(model, data)
    masks = [torch.ones(4) for _ in layers]
    method = ANP(epsilon=0.2)
    torch.manual_seed(1)
    worst = method._worst(model, layers, masks, images, data.labels)
    torch.manual_seed(1)
    start = [(2 * torch.rand(4) - 1) * 0.2 for _ in range(2 * len(masks))]

    def loss(noise: list[Tensor]) -> float:
        weights = masked_weights(layers, masks, noise[: len(masks)], noise[len(masks) :])
        return float(F.cross_entropy(torch.func.functional_call(model, weights, (images,)), data.labels))

    moved = [*worst[0], *worst[1]]
    assert loss(moved) > loss(start)
    assert max(float(noise.abs().max()) for noise in moved) <= 0.4 + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 80), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_held_out_images_are_a_share_of_each_class(count: int, share: float, seed: int) -> None:
    data = plain_set(count)
    try:
        working, held = held_out(data, share, seed, "anp")
    except UntrojanError:
        assert count * min(share, 1 - share) < 3
        return
    assert sorted([*working.ids.tolist(), *held.ids.tolist()]) == sorted(data.ids.tolist())
    assert float((held.class_counts - share * data.class_counts).abs().max()) <= 2


def test_too_few_images_are_a_clear_error() -> None:
    model = Classifier(network((4, 4, 4)), CLASSES, torch.zeros(3), torch.ones(3))
    with pytest.raises(UntrojanError, match="anp needs 4 clean images or more, not 3"):
        ANP()(model, plain_set(3))
    with pytest.raises(UntrojanError, match="none was given"):
        CLP()(model, plain_set().select(torch.arange(0)))


@pytest.mark.parametrize(("images", "batch"), [(33, 16), (32, 16), (5, 16), (100, 7)])
def test_epochs_hold_the_steps_that_are_asked_for(images: int, batch: int) -> None:
    steps_an_epoch = len([n for n in range(0, images, batch) if min(batch, images - n) > 1])
    epochs = epochs_for(50, images, batch)
    assert (epochs - 1) * steps_an_epoch < 50 <= epochs * steps_an_epoch


def test_repairs_are_built_by_name() -> None:
    for name in ("anp", "clp", "ft-sam", "i-bau"):
        assert REPAIRS.name_of(REPAIRS.build(name)) == name
