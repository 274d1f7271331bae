"""What every cleanser answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Verdict = Literal["clean", "poisoned", "undecided"]
"""``undecided`` where the evidence cannot carry either word, such as a probe net that has not learned."""


@dataclass(frozen=True, eq=False)
class CleansingReport:
    """A cleanser's answer: ``(train: ImageSet, model: Classifier) -> CleansingReport``."""

    verdict: Verdict
    flagged: Tensor
    """bool (N,): images to remove from the training set. None where the verdict is not ``poisoned``."""
    scores: Tensor
    """float (N,): the higher, the more suspicious."""
    targets: tuple[int, ...] = ()
    """Classes into which poison was put, the most certain first."""
    sources: tuple[tuple[int, ...], ...] = ()
    """For each target, the classes the poison was taken from, the most certain first."""
    reason: str = ""
    """One sentence for a person: why this verdict."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """The method's own findings: statistics as JSON types, patterns as tensors."""
