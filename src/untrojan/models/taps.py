"""Features at named levels of any network, found by watching one image go through it.

The levels are

``penultimate``
    the input of the classification layer, which is the last linear or convolutional layer that runs. Where
    that is a convolution, as in NiN, its input's mean over places. (N, D).
``s1``, ``s2``, ``s3``
    the output of the last activation at each of the last three resolutions before the classification layer,
    ``s3`` the deepest. (N, C, H, W). On VGG-11 these are ReLU 4, 6 and 8; on VGG-16 7, 10 and 13; on
    ResNet-18 the final ReLU of stages 2, 3 and 4; on PreActResNet-18 the activated outputs of the same
    stages: the levels of Xia et al., "Enhancing Backdoor Attacks with Multi-Level MMD Regularization"
    (2022), section 3.2. A network with fewer resolutions has only the deeper ones. A network without
    activation modules gives the last output of any module there.
a module path
    the output of that module, such as ``network.layer3.1``; where it runs more than once, of its last run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating, to_float

SDRM_LEVELS = ("s1", "s2", "s3")
NAMED_LEVELS = ("penultimate", *SDRM_LEVELS)

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOT_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin)
_NEW_STAGE = 0.65
"""A side this much shorter than the one before starts a stage; an unpadded 3x3 convolution does not."""

_looking: ContextVar[bool] = ContextVar("looking", default=False)
"""True while a network is being watched for its levels: taps of an outer block must not record that pass."""


@dataclass(frozen=True)
class Place:
    """One tensor of the forward pass: the input or output of a module's ``run``-th run (None: the last)."""

    path: str
    side: Literal["input", "output"] = "output"
    run: int | None = None
    average_places: bool = False


class Taps(Mapping[str, Tensor]):
    """What the latest forward left at each level: float32, with its gradient."""

    def __init__(self, levels: Sequence[str]) -> None:
        self._levels = tuple(levels)
        self._tensors: dict[str, Tensor] = {}

    def __getitem__(self, level: str) -> Tensor:
        if level in self._levels and level not in self._tensors:
            raise UntrojanError(f"nothing has come through {level!r}: no forward, or one that goes round it")
        return self._tensors[level]

    def __iter__(self) -> Iterator[str]:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)


def features_of(
    model: Classifier, images: Tensor, level: str = "penultimate", batch_size: int = 512
) -> Tensor:
    """Features (N, D...) at one level, float32 on the CPU, of uint8 images (N, C, H, W).

    In evaluation mode; the mode is restored. Raises UntrojanError for a level the network does not have.
    """
    if not len(images):
        empty = features_of(model, images.new_zeros(1, *images.shape[1:]), level)
        return empty[:0]
    with torch.no_grad(), evaluating(model), tapped(model, [level]) as taps:
        batches = []
        for batch in images.split(batch_size):
            model(to_float(batch, model.device))
            batches.append(taps[level].cpu())
    return torch.cat(batches)


@contextmanager
def tapped(model: nn.Module, levels: Sequence[str]) -> Iterator[Taps]:
    """Record several levels in every forward inside the block.

    ``with tapped(model, ["s2", "s3"]) as taps: logits = model(images); taps["s2"]`` gives the features of
    that forward, part of its graph. Named levels are found at the first forward, by one more of its first
    image. Hooks are gone after the block, whatever happens in it.

    Raises UntrojanError for an unknown level, here or at the first forward.
    """
    modules = dict(model.named_modules())
    for level in levels:
        if level not in NAMED_LEVELS and (not level or level not in modules):
            raise UntrojanError(_unknown_level(model, level))
    taps = Taps(levels)
    handles: list[RemovableHandle] = []
    started = False

    def before_forward(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal started
        taps._tensors.clear()
        counts.clear()
        if started:
            return
        found = levels_of(model, arguments[0][:1]) if set(levels) & set(NAMED_LEVELS) else {}
        for level in levels:
            if level in NAMED_LEVELS and level not in found:
                raise UntrojanError(_missing_level(level, found))
            place = found.get(level) or Place(level)
            handles.append(_record(modules[place.path], place, level, taps._tensors, counts))
        started = True

    counts: defaultdict[str, int] = defaultdict(int)
    handles.append(model.register_forward_pre_hook(before_forward))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _record(
    module: nn.Module, place: Place, level: str, tensors: dict[str, Tensor], counts: defaultdict[str, int]
) -> RemovableHandle:
    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if _looking.get():
            return
        run = counts[level]
        counts[level] += 1
        if place.run is not None and run != place.run:
            return
        value = arguments[0] if place.side == "input" else output
        if not isinstance(value, Tensor):
            raise UntrojanError(f"level {level!r} is a {type(value).__name__}, not a tensor: tap inside it")
        value = value.float()
        tensors[level] = value.flatten(2).mean(2) if place.average_places else value

    return module.register_forward_hook(hook)


@contextmanager
def edited(model: nn.Module, place: Place, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put ``edit(tensor)`` in place of one tensor of every forward inside the block.

    A place without a run is edited in each of its runs. Hooks are gone after the block.
    """
    module, run = dict(model.named_modules())[place.path], 0

    def begin(*_: object) -> None:
        nonlocal run
        run = 0

    def due() -> bool:
        nonlocal run
        run += not _looking.get()
        return not _looking.get() and place.run in (None, run - 1)

    def on_input(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (edit(arguments[0]), *arguments[1:]) if due() else None

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return edit(output) if due() else None

    handles = [
        model.register_forward_pre_hook(begin),
        module.register_forward_pre_hook(on_input)
        if place.side == "input"
        else module.register_forward_hook(on_output),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def place_of(model: nn.Module, image: Tensor, level: str) -> Place:
    """Where a level lies; ``image`` as for :func:`levels_of`. Raises UntrojanError for an unknown level."""
    if level not in NAMED_LEVELS:
        if not level or level not in dict(model.named_modules()):
            raise UntrojanError(_unknown_level(model, level))
        return Place(level)
    found = levels_of(model, image)
    if level not in found:
        raise UntrojanError(_missing_level(level, found))
    return found[level]


def levels_of(model: nn.Module, image: Tensor) -> dict[str, Place]:
    """The named levels this network has, by one forward of ``image``, float (1, C, H, W) in [0, 1].

    Nothing of the model changes: mode, statistics and random state are as before.
    """
    calls = _trace(model, image)
    classification = max(
        (number for number, call in enumerate(calls) if isinstance(call.module, _WEIGHTED)), default=None
    )
    if classification is None:
        return {}
    last = calls[classification]
    convolutional = not isinstance(last.module, nn.Linear)
    levels = {"penultimate": Place(last.path, "input", last.run, average_places=convolutional)}
    maps = [call for call in calls[:classification] if len(call.shape) == 4]
    stages = _stages([call for call in maps if _is_activation(call.module)] or maps)
    for name, call in zip(reversed(SDRM_LEVELS), reversed(stages), strict=False):
        levels[name] = Place(call.path, "output", call.run)
    return levels


@dataclass(frozen=True)
class _Call:
    path: str
    run: int
    module: nn.Module
    shape: tuple[int, ...]


def _trace(model: nn.Module, image: Tensor) -> list[_Call]:
    """Every module's runs in the order in which they end."""
    calls: list[_Call] = []
    counts: defaultdict[str, int] = defaultdict(int)
    # The network alone, so that the pass is neither counted as work nor seen by hooks on the wrapper.
    prefix, network = ("network.", model.network) if isinstance(model, Classifier) else ("", model)

    def watch(path: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                calls.append(_Call(path, counts[path], module, tuple(output.shape)))
            counts[path] += 1

        return module.register_forward_hook(hook)

    named = [(prefix + path, module) for path, module in network.named_modules() if module is not model]
    handles = [watch(path.rstrip("."), module) for path, module in named]
    token = _looking.set(True)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(network, True):
            # A bare network is entered below its own hooks, which are what called this.
            forward = network if network is not model else network.forward
            forward(image)
    finally:
        _looking.reset(token)
        for handle in handles:
            handle.remove()
    return calls


def _stages(calls: Sequence[_Call]) -> list[_Call]:
    """The last call at each resolution, shallow to deep."""
    stages: list[_Call] = []
    side = 0
    # From the end: a map smaller than a later one is a side branch, such as squeeze-and-excitation.
    for call in reversed(calls):
        this_side = min(call.shape[2:])
        if this_side >= side and (not stages or side < _NEW_STAGE * this_side):
            stages.append(call)
        side = max(side, this_side)
    return stages[::-1]


def _is_activation(module: nn.Module) -> bool:
    from torch.nn.modules import activation

    return type(module).__module__ == activation.__name__ and not isinstance(module, _NOT_ACTIVATIONS)


def _unknown_level(model: nn.Module, level: str) -> str:
    paths = [path for path, module in model.named_modules() if path and not list(module.children())]
    shown = ", ".join(paths[:8] + (["...", *paths[-4:]] if len(paths) > 12 else paths[8:]))
    return f"no level {level!r}: choose penultimate, s1, s2, s3 or a module path ({shown})"


def _missing_level(level: str, found: Mapping[str, Place]) -> str:
    has = ", ".join(f"{name} ({place.side} of {place.path})" for name, place in sorted(found.items()))
    return f"this network has no level {level!r}: it has {has or 'none by name'}, or name a module path"
