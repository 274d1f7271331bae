"""Architectures by name, and the one place where a network becomes a :class:`Classifier`."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from untrojan.data.image_set import ImageSet
    from untrojan.models.classifier import Classifier
    from untrojan.models.precision import Precision

Factory = Callable[..., "nn.Module"]

_PLACES: Mapping[str, str] = {
    "lenet5": "lenet:lenet5",
    "cnn": "cnn:cnn",
    "patch-cnn": "patch_cnn:patch_cnn",
    "vgg9": "vgg:vgg9",
    "vgg11": "vgg:vgg11",
    "vgg13": "vgg:vgg13",
    "vgg16": "vgg:vgg16",
    "vgg19": "vgg:vgg19",
    "resnet18": "resnet:resnet18",
    "resnet18-compact": "resnet:resnet18_compact",
    "resnet20": "resnet:resnet20",
    "resnet32": "resnet:resnet32",
    "resnet34": "resnet:resnet34",
    "preact-resnet18": "resnet:preact_resnet18",
    "nin": "nin:nin",
    "mobilenetv2": "mobilenet:mobilenetv2",
    "densenet": "densenet:densenet",
    "gtsrb-cnn": "gtsrb_cnn:gtsrb_cnn",
}

GROUP_NORM = "+group-norm"
"""At a name's end: group norm in place of batch norm, as in ``resnet18@0.5+group-norm``."""
SMALLEST_SIDE = 16
"""Pixels: below this the built-in networks would pool their features away."""
LARGEST_WIDTH = 4.0
MOST_CLASSES = 100_000


def names() -> tuple[str, ...]:
    """The built-in architectures. Each takes a width multiplier, as in ``vgg16@0.25``, and the ending
    :data:`GROUP_NORM`."""
    return tuple(_PLACES)


def is_user_code(architecture: str) -> bool:
    """Whether the name is a ``module:factory``, so that building it would import code."""
    return ":" in architecture


def build(
    architecture: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: Tensor,
    std: Tensor,
    precision: Precision = "float32",
    seed: int = 0,
) -> Classifier:
    """A freshly initialised classifier, in training mode, on the CPU, in channels-last memory format.

    ``architecture`` is a registry name or the user's ``module:factory``, with an optional width multiplier
    after ``@`` and an optional :data:`GROUP_NORM` after that. A factory is called with those of
    ``num_classes``, ``in_channels``, ``image_size`` (the shorter side) and ``width`` that it names, and its
    answer is tried on one image. ``image_shape`` is (C, H, W); ``mean`` and ``std`` are (C,) over pixels in
    [0, 1]. Weights depend on ``seed`` alone, and torch's global random state is left as it was.

    Raises UntrojanError for an unknown name, an impossible shape, or anything the user's code raises.
    """
    import torch

    from untrojan.models.classifier import Classifier
    from untrojan.models.layers import with_group_norm
    from untrojan.seeding import generator

    name, width, group_norm = _parse(architecture)
    _check_shape(name, num_classes, image_shape)
    channels, side = image_shape[0], min(image_shape[1:])
    settings: dict[str, Any] = {"num_classes": num_classes, "in_channels": channels, "image_size": side}
    if precision not in ("float32", "bfloat16"):
        raise UntrojanError(f"precision {precision!r} is not one of float32, bfloat16")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "initialisation").initial_seed())
        if is_user_code(name):
            network = _users_network(name, settings, width, image_shape)
        else:
            network = _built_in(name)(**settings, width=1.0 if width is None else width)
    if group_norm:
        network = with_group_norm(network)
    model = Classifier(network, num_classes, mean, std, architecture, precision, image_shape)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def build_for(
    data: ImageSet, architecture: str, *, precision: Precision = "float32", seed: int = 0
) -> Classifier:
    """A fresh classifier for ``data``: its classes, its image shape, its pixels' mean and deviation."""
    from untrojan.models.classifier import pixel_statistics

    mean, std = pixel_statistics(data)
    return build(
        architecture,
        num_classes=data.num_classes,
        image_shape=data.image_shape,
        mean=mean,
        std=std,
        precision=precision,
        seed=seed,
    )


def check_name(architecture: str) -> None:
    """Raise UntrojanError where the name cannot be built, without building or importing anything."""
    _parse(architecture)


def _parse(architecture: str) -> tuple[str, float | None, bool]:
    """Name, width multiplier where one is given, and whether batch norm becomes group norm."""
    group_norm = architecture.endswith(GROUP_NORM)
    name, at, multiplier = architecture.removesuffix(GROUP_NORM).partition("@")
    if not is_user_code(name) and name not in _PLACES:
        known = ", ".join(_PLACES)
        raise UntrojanError(f"unknown architecture {name!r}: choose one of {known}, or your module:factory")
    if not at:
        return name, None, group_norm
    try:
        width = float(multiplier)
    except ValueError:
        width = math.nan
    if not 0 < width <= LARGEST_WIDTH:
        raise UntrojanError(
            f"{architecture!r}: the width multiplier must be a number above 0, at most {LARGEST_WIDTH:g}"
        )
    return name, width, group_norm


def _check_shape(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    if not 2 <= num_classes <= MOST_CLASSES:
        raise UntrojanError(f"a classifier needs 2 to {MOST_CLASSES:,} classes, not {num_classes:,}")
    _, height, width = image_shape
    if not is_user_code(name) and min(height, width) < SMALLEST_SIDE:
        raise UntrojanError(
            f"{name} needs images of {SMALLEST_SIDE} px at least, not {height}x{width}: resize them (size=32)"
        )


def _built_in(name: str) -> Factory:
    module, function = _PLACES[name].split(":")
    factory: Factory = getattr(importlib.import_module(f"untrojan.models.{module}"), function)
    return factory


def _users_network(
    name: str, settings: dict[str, Any], width: float | None, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Call the user's factory; whatever it raises becomes one line that names it."""
    import torch
    from torch import nn

    from untrojan.models.classifier import evaluating

    try:
        factory = users_factory(name)
        accepted = _accepted(factory, {**settings, "width": width})
        if width is not None and "width" not in accepted:
            raise UntrojanError(f"{name} takes no width: leave out the multiplier after '@'")
        if width is None:
            accepted.pop("width", None)
        network = factory(**accepted)
        if not isinstance(network, nn.Module):
            raise UntrojanError(f"{name} gave a {type(network).__name__}, not a torch.nn.Module")
        for module in network.modules():
            # In-place activations would overwrite what a feature tap has recorded.
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        with torch.no_grad(), evaluating(network):
            logits = network(torch.zeros(1, *image_shape))
    except UntrojanError:
        raise
    except (Exception, SystemExit) as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        raise UntrojanError(f"{name} failed: {type(error).__name__}: {first_line}") from error
    expected = (1, settings["num_classes"])
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UntrojanError(f"{name} must give logits {expected} for one image {image_shape}, not {found}")
    return network


def users_factory(name: str) -> Factory:
    """What a ``module:factory`` names, imported. Raises UntrojanError where it cannot be called, and whatever
    the import raises."""
    module, _, attribute = name.partition(":")
    with _working_folder_importable():
        factory = getattr(importlib.import_module(module), attribute)
    if not callable(factory):
        raise UntrojanError(f"{name} is not callable: name a function or class that returns the network")
    return factory  # type: ignore[no-any-return]


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    # Last on the path, so that a file in the working folder can never stand in for an installed module.
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _accepted(factory: Factory, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the factory names. One that hides its names in ``**kwargs`` gets the class count."""
    parameters = inspect.signature(factory).parameters.values()
    positional_only = inspect.Parameter.POSITIONAL_ONLY
    named = {each.name for each in parameters if each.kind is not positional_only}
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        named.add("num_classes")
    return {key: value for key, value in settings.items() if key in named}
