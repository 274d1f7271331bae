"""How a network is trained, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

Share = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the one training loop. The defaults are RE's (section 10.2) without augmentation.

    Augmentation is off unless asked for: a defender's probe must learn the true pattern and not its
    shifted or mirrored copies (RE, section 5.2.1), while a victim is trained with all three.
    """

    epochs: Annotated[int, Gt(0)] = 100
    batch_size: Annotated[int, Gt(1)] = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """The peak, where the schedule is ``one_cycle``."""
    momentum: Share = 0.9
    """Nesterov momentum; used by ``sgd`` alone."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    schedule: Literal["constant", "one_cycle", "steps"] = "constant"
    warm_up: Share = 0.25
    """Share of all steps in which ``one_cycle`` climbs to its peak."""
    milestones: tuple[Annotated[int, Gt(0)], ...] = ()
    """Epochs after which ``steps`` multiplies the learning rate by ``decay``."""
    decay: Annotated[float, Interval(gt=0, le=1)] = 0.1
    label_smoothing: Share = 0.0
    crop_padding: Annotated[int, Ge(0)] = 0
    """Random crops after zero padding of this many pixels a side."""
    flip: bool = False
    """Mirror left to right with probability one half."""
    rotation: Annotated[float, Interval(ge=0, le=180)] = 0.0
    """Random rotation of up to this many degrees either way."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` runs all but the input and the first layer in mixed precision where the hardware has it,
    and in float32 elsewhere: :mod:`untrojan.models.precision`."""
