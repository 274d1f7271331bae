"""What server and clients tell each other, checked on receipt: neither side trusts the other.

A :class:`Package` is JSON beside tensors, and a tensor travels as its type, its shape and its raw bytes:
nothing in a message can choose what code runs, or how much memory is taken beyond its own length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from annotated_types import Interval, Len
from pydantic import FiniteFloat, StringConstraints
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.models.channels import Reduction
from untrojan.models.classifier import Classifier
from untrojan.registry import options_of, validated
from untrojan.training.recipe import Recipe

T = TypeVar("T")
Specification = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names of tensors, with their types and shapes."""
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
"""A client's name for itself; it is shown, so it holds letters, digits, dots, dashes and underscores."""

LARGEST_FACTS = 2**20
"""Characters of JSON in a message."""
MOST_IMAGES = 10**8
TYPES = {
    "float32": ("<f4", torch.float32),
    "float64": ("<f8", torch.float64),
    "float16": ("<f2", torch.float16),
    "int64": ("<i8", torch.int64),
    "int32": ("<i4", torch.int32),
    "uint8": ("|u1", torch.uint8),
    "bool": ("|b1", torch.bool),
}
NORMALISATION = ("mean", "std")
"""A classifier's own entries that are not averaged: no image is normalised here."""


@dataclass(frozen=True, eq=False)
class Package:
    """One message's content."""

    facts: dict[str, Any]
    """JSON types."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What the server asks of a client."""

    task: Literal["introduce", "train", "report"]
    round: Annotated[int, Interval(ge=0, le=10**6)]
    architecture: Annotated[str, StringConstraints(max_length=200)]
    class_names: Annotated[tuple[str, ...], Len(2, 10**5)]
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    recipe: Recipe
    """How to train locally."""
    after_defense: bool = False
    """Train with batch norm's statistics frozen."""
    reduction: Reduction = "max"
    """What to report of a channel's places."""


@dataclass(frozen=True)
class Introduction:
    """A client's answer to ``introduce``."""

    name: Name
    images: Annotated[int, Interval(ge=1, le=MOST_IMAGES)]


@dataclass(frozen=True)
class Trained:
    """A client's answer to ``train``; its weights stand beside it."""

    images: Annotated[int, Interval(ge=1, le=MOST_IMAGES)]
    """Trained on."""
    loss: FiniteFloat
    """Of the last local epoch."""


@dataclass(frozen=True)
class Reported:
    """A client's answer to ``report``; ``probabilities`` and ``layer/...`` stand beside it."""

    images: Annotated[int, Interval(ge=1, le=MOST_IMAGES)]


def package(message: object, tensors: Mapping[str, Tensor] | None = None) -> Package:
    """A dataclass of this module, to be sent."""
    return Package(options_of(message), dict(tensors or {}))


def read(cls: type[T], received: Package, who: str) -> T:
    """The message of a package. Raises UntrojanError that names what is wrong with it."""
    if "refused" in received.facts:
        raise UntrojanError(f"{who}: {one_line(received.facts['refused'])}")
    return validated(cls, received.facts, who)


def refusal(why: object) -> Package:
    """A client's answer where it can't do what it was asked for."""
    return Package({"refused": one_line(why)})


def one_line(text: object) -> str:
    """Text from elsewhere: printable, one line, 200 characters at most."""
    words = " ".join(str(text)[:2000].split())
    return "".join(c for c in words if c.isprintable())[:200] or "no reason given"


def exchanged(model: Classifier) -> dict[str, Tensor]:
    """The weights that travel, copied: all but the normalisation."""
    state = model.state_dict()
    return {key: value.clone() for key, value in state.items() if key not in NORMALISATION}


def take_weights(model: Classifier, tensors: Mapping[str, Tensor], who: str) -> None:
    """Give ``model`` the weights of a message. Raises UntrojanError where they are not such a model's."""
    check(tensors, specification_of(exchanged(model)), who)
    model.load_state_dict({**model.state_dict(), **tensors})


def specification_of(tensors: Mapping[str, Tensor]) -> Specification:
    """Types and shapes."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def check(tensors: Mapping[str, Tensor], expected: Specification, who: str) -> None:
    """Raise UntrojanError unless these are the expected tensors, finite everywhere."""
    for name, (dtype, shape) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UntrojanError(f"{who}: {name} is missing")
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found, wanted = _described(tensor.dtype, tensor.shape), _described(dtype, shape)
            raise UntrojanError(f"{who}: {name} is {found}, not {wanted}")
        if not bool(tensor.isfinite().all()):
            raise UntrojanError(f"{who}: {name} holds values that are not finite")
    if surplus := tensors.keys() - expected.keys():
        raise UntrojanError(f"{who}: {one_line(min(surplus))} was not asked for")


def to_bytes(name: str, tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Type, shape and little-endian bytes. Raises UntrojanError for a type that can't travel."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in TYPES:
        raise UntrojanError(f"{name} is {kind}: only {', '.join(TYPES)} can be sent")
    array = tensor.detach().cpu().contiguous().numpy()
    return kind, tuple(tensor.shape), array.astype(TYPES[kind][0], copy=False).tobytes()


def from_bytes(name: str, kind: str, shape: Sequence[int], content: bytes) -> Tensor:
    """The tensor. Raises UntrojanError where type, shape and length do not fit together."""
    name = one_line(name)
    if kind not in TYPES:
        raise UntrojanError(f"{name}: {one_line(kind)} is none of {', '.join(TYPES)}")
    code, dtype = TYPES[kind]
    if len(shape) > 8 or any(extent < 0 for extent in shape):
        raise UntrojanError(f"{name}: {one_line(tuple(shape))} is no shape")
    if len(content) != math.prod(shape) * np.dtype(code).itemsize:
        raise UntrojanError(f"{name}: {len(content)} bytes are not {_described(dtype, shape)}")
    array = np.frombuffer(content, np.uint8 if kind == "bool" else code)
    # A byte that is neither 0 nor 1 is no truth value.
    native = array != 0 if kind == "bool" else array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(native).reshape(tuple(shape))


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
