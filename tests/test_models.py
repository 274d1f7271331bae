"""Architectures against published sizes, and what every one of them must keep."""

from __future__ import annotations

import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.models import registry
from untrojan.models.classifier import Classifier, Float32Conv2d, keep_stem_in_float32, logits_of
from untrojan.models.frozen import frozen
from untrojan.models.taps import _trace, tapped


def small(name: str, shape: tuple[int, int, int] = (3, 32, 32), **options: object) -> Classifier:
    settings = {"num_classes": 7, "mean": torch.full((shape[0],), 0.4), "std": torch.full((shape[0],), 0.25)}
    return registry.build(f"{name}@0.25", image_shape=shape, **{**settings, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        # LeCun 1998's network with all of C3 connected.
        ("lenet5", (1, 28, 28), 10, 61_706),
        # The CIFAR forms, as commonly reported for 10 classes.
        ("vgg11", (3, 32, 32), 10, 9_231_114),
        ("vgg13", (3, 32, 32), 10, 9_416_010),
        ("vgg16", (3, 32, 32), 10, 14_728_266),
        ("vgg19", (3, 32, 32), 10, 20_040_522),
        ("resnet18", (3, 32, 32), 10, 11_173_962),
        ("resnet34", (3, 32, 32), 10, 21_282_122),
        ("resnet20", (3, 32, 32), 10, 272_282),
        ("resnet32", (3, 32, 32), 10, 466_714),
        # 11,171,146 without the final batch norm of 512 channels.
        ("preact-resnet18", (3, 32, 32), 10, 11_171_146 + 2 * 512),
        ("nin", (3, 32, 32), 10, 966_986),
        ("mobilenetv2", (3, 32, 32), 10, 2_296_922),
        # DenseNet-BC (depth 100, growth 12): 0.8M in the paper's table 2.
        ("densenet", (3, 32, 32), 10, 769_162),
        # Neural Cleanse's layers by hand: six convolutions, 512x512 and 512x43.
        ("gtsrb-cnn", (3, 32, 32), 43, 287_008 + 262_656 + 22_059),
    ],
)
def test_published_parameter_counts(
    name: str, shape: tuple[int, int, int], classes: int, parameters: int
) -> None:
    zeros = torch.zeros(shape[0])
    model = registry.build(name, num_classes=classes, image_shape=shape, mean=zeros, std=zeros + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_filters_of_the_networks_only_the_re_paper_has() -> None:
    def filters(name: str) -> list[int]:
        zeros = torch.zeros(3)
        model = registry.build(name, num_classes=10, image_shape=(3, 32, 32), mean=zeros, std=zeros + 1)
        return [
            m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
        ]

    assert filters("vgg9") == [16, 32, 64, 64, 128, 128]
    assert filters("resnet18-compact") == [16] * 5 + [32] * 4 + [64] * 8


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 48, 48), (3, 16, 40)])
@pytest.mark.parametrize("name", registry.names())
def test_every_network_takes_every_shape(name: str, shape: tuple[int, int, int]) -> None:
    model = small(name, shape).eval()
    images = torch.rand(2, *shape, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert images.grad is not None
    # Each image has gradient of its own, all over: nothing is cut off from the input.
    assert (images.grad != 0).flatten(1).float().mean(1).min() > 0.5


@pytest.mark.parametrize("name", registry.names())
def test_no_activation_is_in_place_and_each_runs_once(name: str) -> None:
    model = small(name)
    assert not [m for m in model.modules() if getattr(m, "inplace", False)]
    assert all(call.run == 0 for call in _trace(model, torch.rand(1, 3, 32, 32)))


@pytest.mark.usefixtures("with_bfloat16")
@pytest.mark.parametrize("name", registry.names())
def test_a_faint_pattern_survives_the_stem_under_mixed_precision(name: str) -> None:
    images = torch.randint(0, 254, (4, 3, 32, 32)).float() / 255
    pattern = torch.zeros(3, 32, 32)
    pattern[:, ::2, ::2] = pattern[:, 1::2, 1::2] = 2 / 255

    def stem_difference(precision: str) -> Tensor:
        model = small(name, precision=precision).eval()
        (stem,) = [path for path, m in model.named_modules() if isinstance(m, Float32Conv2d)]
        weighted = [c.path for c in _trace(model, images[:1]) if isinstance(c.module, nn.Conv2d | nn.Linear)]
        assert weighted[0] == stem
        with torch.no_grad(), tapped(model, [stem]) as taps:
            model(images)
            plain = taps[stem]
            model(images + pattern)
        return taps[stem] - plain

    exact = stem_difference("float32")
    assert exact.abs().max() > 0
    assert torch.equal(stem_difference("bfloat16"), exact)


def with_statistics(model: Classifier) -> Classifier:
    """As if trained: batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("name", registry.names())
def test_a_frozen_copy_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = with_statistics(small(name)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    copied = frozen(model)
    ours, theirs = copied(images), model(images)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    weights = torch.randn(ours.shape)
    gradient, wanted = (torch.autograd.grad((each * weights).sum(), images)[0] for each in (ours, theirs))
    # Where rounding takes a unit over its kink, gradients differ by more than rounding.
    assert float((gradient - wanted).norm()) < 0.05 * float(wanted.norm())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.ndim > 1) or (
        name == "patch-cnn"
    )


@pytest.mark.parametrize("name", ["resnet18", "densenet", "vgg11"])
def test_a_frozen_copy_has_no_batch_norm_after_a_convolution(name: str) -> None:
    def norms(model: Classifier) -> int:
        return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())

    model = small(name)
    # DenseNet's stand before the convolutions, but for the one inside each bottleneck.
    assert norms(frozen(model)) <= (norms(model) // 2 + 2 if name == "densenet" else 0)


class Branching(nn.Module):
    """Looks at its input, so that it cannot be traced; one batch norm serves two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 7)

    def forward(self, images: Tensor) -> Tensor:
        convolution = self.one if float(images.mean()) > 0 else self.two
        logits: Tensor = self.linear(self.norm(convolution(images)).mean((2, 3)))
        return logits


class Shared(Branching):
    """The same layers twice, and a sum of what stands before and after the batch norm."""

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.one(images), self.two(images)
        features = self.norm(first) + first + self.norm(second) + self.norm(self.one(images + 1))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


class Renormalised(Branching):
    """Weights that a hook computes anew at each call, and a batch norm without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.one = nn.utils.weight_norm(self.one)
        self.two = nn.utils.parametrizations.weight_norm(self.two)
        self.other, self.batch = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.three = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.one(images)) + self.other(self.two(images)) + self.batch(self.three(images))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


@pytest.mark.parametrize("network", [Branching, Shared, Renormalised])
def test_a_frozen_copy_of_a_users_network_computes_the_same(network: type[nn.Module]) -> None:
    model = Classifier(network(), 7, torch.zeros(3), torch.ones(3)).eval()
    with_statistics(model)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(frozen(model)(images), model(images))


@pytest.mark.usefixtures("with_bfloat16")
@pytest.mark.parametrize("name", ["resnet18-compact", "preact-resnet18", "densenet"])
def test_no_residual_stream_stays_in_float32_under_mixed_precision(name: str) -> None:
    model = small(name, precision="bfloat16")
    kinds: dict[str, torch.dtype] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, output, path=path: kinds.update({path: inputs[0].dtype})
            )
    model(torch.rand(2, 3, 32, 32))
    second_stage = [kind for path, kind in kinds.items() if "layer2" in path or "denseblock2" in path]
    assert second_stage
    assert set(second_stage) == {torch.bfloat16}


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = small("cnn", seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = small("cnn", seed=5).state_dict(), small("cnn", seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.linear.weight"], other["network.linear.weight"])


def test_build_for_takes_everything_from_the_data() -> None:
    images = torch.zeros(4, 1, 20, 20, dtype=torch.uint8)
    images[:2] = 255
    data = ImageSet(images, torch.tensor([0, 1, 2, 0]), ("a", "b", "c"), numbered(4))
    model = registry.build_for(data, "cnn@0.5", precision="bfloat16")
    assert (model.num_classes, model.image_shape, model.architecture) == (3, (1, 20, 20), "cnn@0.5")
    assert model.precision == "bfloat16"
    assert model.mean.item() == pytest.approx(0.5)
    assert model.std.item() == pytest.approx(0.5)
    assert model.network.features[0].weight.shape[0] == 16
    assert model.network.features[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert logits_of(model, images).shape == (4, 3)


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        ("resnet81", {}, "unknown architecture 'resnet81': choose one of lenet5, cnn"),
        ("cnn@wide", {}, "width multiplier must be a number above 0"),
        ("cnn@0", {}, "width multiplier"),
        ("cnn@nan", {}, "width multiplier"),
        ("cnn@1e9", {}, "at most 4"),
        ("vgg16", {"image_shape": (3, 15, 32)}, "vgg16 needs images of 16 px at least, not 15x32"),
        ("cnn", {"num_classes": 1}, "2 to 100,000 classes, not 1"),
        ("cnn", {"precision": "float16"}, "precision 'float16'"),
        ("no_such_module_here:net", {}, "no_such_module_here:net failed: ModuleNotFoundError"),
        ("math:net", {}, "math:net failed: AttributeError"),
        ("math:pi", {}, "math:pi is not callable"),
    ],
)
def test_wrong_requests_are_one_line(architecture: str, options: dict[str, object], says: str) -> None:
    settings = {"num_classes": 10, "image_shape": (3, 32, 32), "mean": torch.zeros(3), "std": torch.ones(3)}
    with pytest.raises(UntrojanError) as error:
        registry.build(architecture, **{**settings, **options})  # type: ignore[arg-type]
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_is_checked_without_importing_anything() -> None:
    registry.check_name("vgg16@0.25")
    registry.check_name("no_such_module_here:net@2")
    with pytest.raises(UntrojanError, match="unknown architecture 'vgg17'"):
        registry.check_name("vgg17@0.25")


USERS_MODULE = """
    import torch
    from torch import nn

    def head(channels, classes):
        return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), nn.Linear(6, classes))

    def full(num_classes, in_channels, image_size, width=1.0):
        net = head(in_channels, num_classes)
        net.seen = (num_classes, in_channels, image_size, width)
        return net

    def fewer(num_classes):
        return head(3, num_classes)

    def hidden(**options):
        assert list(options) == ["num_classes"]
        return head(3, options["num_classes"])

    class Net(nn.Module):
        def __init__(self, in_channels, num_classes=2):
            super().__init__()
            self.body = head(in_channels, num_classes)

        def forward(self, x):
            return self.body(x)

    def ten(): return head(3, 10)
    def nothing(num_classes): return "a network"
    def broken(num_classes): raise ValueError("first line\\nsecond line")
    def leaves(num_classes): raise SystemExit(3)
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "users_networks_for_a_test"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(USERS_MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name  # type: ignore[misc]
    sys.modules.pop(name, None)


def build_users(architecture: str) -> Classifier:
    return registry.build(
        architecture, num_classes=7, image_shape=(3, 12, 20), mean=torch.zeros(3), std=torch.ones(3)
    )


@pytest.mark.parametrize("factory", ["full", "full@0.5", "fewer", "hidden", "Net"])
def test_a_users_factory_gets_what_it_names(users_module: str, factory: str) -> None:
    path_before = list(sys.path)
    model = build_users(f"{users_module}:{factory}")
    assert sys.path == path_before
    assert logits_of(model, torch.zeros(2, 3, 12, 20, dtype=torch.uint8)).shape == (2, 7)
    assert not [m for m in model.modules() if getattr(m, "inplace", False)]
    assert model.training
    if factory.startswith("full"):
        assert model.network.seen == (7, 3, 12, 0.5 if "@" in factory else 1.0)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("ten", "must give logits (1, 7) for one image (3, 12, 20), not (1, 10)"),
        ("nothing", "gave a str, not a torch.nn.Module"),
        ("broken", "failed: ValueError: first line"),
        ("leaves", "failed: SystemExit: 3"),
        ("fewer@0.5", "takes no width"),
    ],
)
def test_a_users_mistake_is_one_line_that_names_it(users_module: str, factory: str, says: str) -> None:
    with pytest.raises(UntrojanError) as error:
        build_users(f"{users_module}:{factory}")
    assert str(error.value).startswith(users_module)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_wrapping_a_network_twice_changes_no_second_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    keep_stem_in_float32(keep_stem_in_float32(network))
    assert [isinstance(layer, Float32Conv2d) for layer in network] == [True, False]


def test_a_narrow_strided_projection_computes_the_same_and_has_gradients() -> None:
    """On processors without AVX-512 the plain one's backward pass is a segmentation fault."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1, stride=2))
    images = torch.rand(2, 3, 8, 8)
    wanted, weight = network(images).detach(), network[1].weight
    wrapped = Classifier(nn.Sequential(network, nn.Flatten()), 128, torch.zeros(3), torch.ones(3))
    found = wrapped(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted.flatten(1))
    found.sum().backward()
    assert network[1].weight is weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
