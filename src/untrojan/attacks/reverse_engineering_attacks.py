"""RE's attacks: the 18 of table 5 on CIFAR-10, and those of sections 18 and 19, as plans name them.

The paper counts classes from 1; here they count from 0.
"""

from __future__ import annotations

from typing import Any, Literal

from untrojan.attacks.poisoning import Poisoning
from untrojan.errors import UntrojanError

Pattern = Literal["A", "B", "C", "D", "E", "F"]

TRIGGER_OF: dict[str, str] = {
    "A": "chessboard",
    "B": "even-pixels",
    "C": "cross",
    "D": "square",
    "E": "pixels",
    "F": "ell",
}

TABLE_5: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "A": (9, (1,), (1, 4, 7)),
    "B": (7, (1,), (1, 2, 9)),
    "C": (9, (1,), (4, 6, 7)),
    "D": (3, (8,), (7, 8, 9)),
    "E": (6, (3,), (1, 3, 5)),
    "F": (8, (3,), (3, 4, 5)),
}
"""Pattern: target, source of 1SC, sources of 3SC. 9SC takes all classes but the target."""

IMAGES_PER_SOURCE = {1: 500, 3: 200, 9: 60}
"""Section 5.1.2, of CIFAR-10's 5,000 images a class."""


def re_attack(pattern: str, source_classes: int, scale: float = 1.0, **trigger_options: Any) -> Poisoning:
    """One of table 5's attacks: pattern A to F, with 1, 3 or 9 source classes.

    ``scale`` multiplies the images poisoned of each source class, for sets whose classes are not 5,000
    images strong; ``trigger_options`` go to the trigger, such as ``amplitude=5`` (section 17).
    """
    if pattern not in TABLE_5 or source_classes not in IMAGES_PER_SOURCE:
        raise UntrojanError(
            f"no attack {pattern}-{source_classes}SC: patterns are A to F, with 1, 3 or 9 sources"
        )
    target, one, three = TABLE_5[pattern]
    sources: tuple[int, ...] | Literal["all"] = {1: one, 3: three}.get(source_classes, "all")
    count = max(1, round(IMAGES_PER_SOURCE[source_classes] * scale))
    return Poisoning(TRIGGER_OF[pattern], trigger_options, target, sources, count)


ATTACKS: dict[str, Poisoning] = {
    **{f"{pattern}-{n}SC": re_attack(pattern, n) for pattern in TABLE_5 for n in IMAGES_PER_SOURCE},
    # Section 19, table 17.
    "mnist": Poisoning("corner-chessboard", {}, target=8, sources=(4, 6, 9), count=500),
    "fashion-mnist": Poisoning("corner-pixel", {}, target=2, sources=(0,), count=900),
    # Warning signs taken for a speed limit of 120 km/h, which is class 8 of the set's own labels.
    "gtsrb": Poisoning("yellow-square", {}, target=8, sources=(*range(13, 18), *range(24, 31)), count=30),
    "cifar100": Poisoning("chessboard", {"amplitude": 3.0}, target=20, sources=tuple(range(20)), count=30),
    # Section 18, CIFAR-10's frogs to deer; universal_pattern computes the pattern, to be passed as drawn.
    "adaptive": Poisoning("universal", {}, target=4, sources=(6,), count=500),
}


def named_attack(name: str, scale: float = 1.0) -> Poisoning:
    """An attack of ``ATTACKS``, its images per source class multiplied by ``scale``."""
    from dataclasses import replace

    if name not in ATTACKS:
        raise UntrojanError(f"unknown attack {name!r}: choose one of {', '.join(ATTACKS)}")
    attack = ATTACKS[name]
    return replace(attack, count=max(1, round((attack.count or 1) * scale)))
