"""Feature taps: the right tensors, found without knowing the network, leaving no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from untrojan.cost import measure
from untrojan.errors import UntrojanError
from untrojan.models import registry
from untrojan.models.classifier import Classifier, logits_of
from untrojan.models.taps import features_of, levels_of, tapped


def wrap(network: nn.Module, num_classes: int = 3) -> Classifier:
    return Classifier(network, num_classes, torch.tensor([0.5]), torch.tensor([0.25]))


def built(name: str, shape: tuple[int, int, int] = (3, 32, 32)) -> Classifier:
    zeros = torch.zeros(shape[0])
    return registry.build(name, num_classes=7, image_shape=shape, mean=zeros, std=zeros + 1)


def tiny() -> Classifier:
    torch.manual_seed(0)
    return wrap(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_levels_of_a_tiny_network_equal_the_same_computed_by_hand() -> None:
    model, images = tiny(), bytes_of(5, 1, 8, 8)
    weights = model.state_dict()
    x = (images.float() / 255 - 0.5) / 0.25
    s2 = functional.conv2d(x, weights["network.0.weight"], weights["network.0.bias"], padding=1).relu()
    pooled = functional.max_pool2d(s2, 2)
    s3 = functional.conv2d(pooled, weights["network.3.weight"], weights["network.3.bias"], padding=1).relu()
    expected = {"s2": s2, "s3": s3, "penultimate": s3.mean((2, 3)), "network.2": pooled}
    for level, value in expected.items():
        torch.testing.assert_close(features_of(model, images, level, batch_size=2), value)


@pytest.mark.parametrize(("name", "numbers"), [("vgg11", (14, 21, 28)), ("vgg16", (23, 33, 43))])
def test_sdrm_levels_of_vgg_are_the_papers_layer_numbers(name: str, numbers: tuple[int, ...]) -> None:
    levels = levels_of(built(f"{name}@0.1"), torch.rand(1, 3, 32, 32))
    found = [levels[level].path for level in ("s1", "s2", "s3")]
    assert found == [f"network.features.{number - 1}" for number in numbers]


@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18"])
def test_sdrm_levels_of_the_residual_networks_are_the_papers_layer_numbers(name: str) -> None:
    # The paper counts convolutions, batch norms, ReLUs and pools in the order they run, shortcuts left out.
    model, order = built(f"{name}@0.1"), []
    counted = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    handles = [
        module.register_forward_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
        if isinstance(module, counted) and "shortcut" not in path
    ]
    model.eval()(torch.rand(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    levels = levels_of(model, torch.rand(1, 3, 32, 32))
    assert [levels[level].path for level in ("s1", "s2", "s3")] == [order[n - 1] for n in (27, 39, 51)]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 48, 48)])
def test_stages_are_found_at_other_resolutions(shape: tuple[int, int, int]) -> None:
    reference = levels_of(built("resnet18-compact"), torch.rand(1, 3, 32, 32))
    model = built("resnet18-compact", shape)
    assert levels_of(model, torch.rand(1, *shape)) == reference


@pytest.mark.parametrize("name", [name for name in registry.names() if name != "nin"])
def test_the_classification_layer_turns_the_penultimate_features_into_the_logits(name: str) -> None:
    model, images = built(f"{name}@0.25"), bytes_of(3, 3, 32, 32)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        torch.testing.assert_close(last(features_of(model, images)), logits_of(model, images))


def test_penultimate_of_a_convolutional_classifier_is_its_inputs_mean_over_places() -> None:
    model, images = built("nin@0.1"), bytes_of(3, 3, 32, 32)
    before = features_of(model, images, "network.features.19")
    torch.testing.assert_close(features_of(model, images), before.mean((2, 3)))
    # The ReLU on the K logit maps comes after the classification layer and is no feature.
    torch.testing.assert_close(features_of(model, images, "s3"), before)


def test_many_levels_in_one_forward_with_gradients() -> None:
    model = tiny()
    images = torch.rand(4, 1, 8, 8, requires_grad=True)
    with measure() as cost, tapped(model, ["s2", "s3", "penultimate", "network.3"]) as taps:
        logits = model(images)
        torch.testing.assert_close(taps["network.3"].relu(), taps["s3"])
        torch.testing.assert_close(model.network[7](taps["penultimate"]), logits)
        (gradient,) = torch.autograd.grad(taps["s2"].square().sum(), images, retain_graph=True)
        x = (images - 0.5) / 0.25
        by_hand = torch.autograd.grad(model.network[1](model.network[0](x)).square().sum(), images)[0]
        torch.testing.assert_close(gradient, by_hand)
    assert (cost.forwards, cost.images) == (1, 4)
    assert set(taps) == {"s2", "s3", "penultimate", "network.3"}


def test_a_block_follows_every_forward_and_blocks_nest() -> None:
    model = tiny().eval()
    first, second = torch.rand(2, 1, 8, 8), torch.rand(3, 1, 8, 8)
    with torch.no_grad(), tapped(model, ["penultimate"]) as outer:
        model(first)
        with tapped(model, ["s3"]) as inner:
            model(second)
            assert len(outer["penultimate"]) == 3
            torch.testing.assert_close(inner["s3"].mean((2, 3)), outer["penultimate"])
        model(first)
        assert len(outer["penultimate"]) == 2
        assert len(inner["s3"]) == 3


def test_features_do_not_depend_on_the_batch_size() -> None:
    model, images = built("resnet18-compact@0.5"), bytes_of(7, 3, 32, 32)
    whole = features_of(model, images, "s2")
    for batch_size in (1, 3):
        torch.testing.assert_close(features_of(model, images, "s2", batch_size), whole)
    assert features_of(model, images[:0], "s2").shape == (0, *whole.shape[1:])


def test_nothing_of_the_model_changes() -> None:
    model = built("nin@0.1")
    model.network.features[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in built("resnet18-compact").state_dict().items()}
    batch_normed = built("resnet18-compact").train()
    random_state = torch.get_rng_state()
    features_of(model, bytes_of(3, 3, 32, 32))
    with tapped(batch_normed, ["s1"]):
        pass
    levels_of(batch_normed, torch.rand(1, 3, 32, 32, generator=torch.Generator()))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in batch_normed.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hooks_of(model) == hooks_of(batch_normed) == 0


def test_hooks_go_when_the_block_fails() -> None:
    model = tiny()
    wrong_channels = torch.rand(1, 2, 8, 8)
    with pytest.raises(RuntimeError), tapped(model, ["network.2", "network.0"]):
        model(wrong_channels)
    with pytest.raises(UntrojanError), tapped(model, ["penultimate", "s1"]):
        model(torch.rand(1, 1, 8, 8))
    assert hooks_of(model) == 0


class SharedActivation(nn.Module):
    """One ReLU for all, as torchvision's blocks have, and a squeeze-and-excitation side branch."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, 2, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.deep = x = self.relu(self.conv1(x))
        x = x * self.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        self.deepest = x = self.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


def test_one_activation_module_run_many_times_and_a_side_branch() -> None:
    model, images = wrap(SharedActivation()), bytes_of(2, 1, 8, 8)
    assert torch.equal(features_of(model, images, "s3"), model.network.deepest)
    assert torch.equal(features_of(model, images, "s2"), model.network.deep)
    assert torch.equal(features_of(model, images, "network.relu"), model.network.deepest)


class FunctionalActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(1, 4), Stage(4, 5), Stage(5, 6)])
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class Stage(nn.Module):
    def __init__(self, in_channels: int, filters: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, filters, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(x))


def test_without_activation_modules_a_stage_is_its_last_module() -> None:
    levels = levels_of(wrap(FunctionalActivation()), torch.rand(1, 1, 16, 16))
    assert [levels[s].path for s in ("s1", "s2", "s3")] == [f"network.stages.{i}" for i in range(3)]
    assert levels["penultimate"].path == "network.fc"


def test_unknown_and_missing_levels_say_what_there_is() -> None:
    model, images = tiny(), bytes_of(1, 1, 8, 8)
    with pytest.raises(UntrojanError, match=r"no level 's4': .*penultimate, s1, s2, s3.*network\.0"):
        features_of(model, images, "s4")
    with pytest.raises(UntrojanError, match=r"no level 's1': it has .*s2 \(output of network\.1\)"):
        features_of(model, images, "s1")
    with tapped(model, ["s3"]) as taps, pytest.raises(UntrojanError, match="nothing has come through 's3'"):
        taps["s3"]


@pytest.mark.usefixtures("with_bfloat16")
def test_mixed_precision_features_come_as_float32() -> None:
    model = built("cnn@0.25")
    model.precision = "bfloat16"
    assert features_of(model, bytes_of(2, 3, 32, 32), "s3").dtype == torch.float32
