"""The one harness that measures what a method costs. No method times itself.

``with measure() as cost: ...`` counts everything that passes through a
:class:`~untrojan.models.classifier.Classifier` inside the block; blocks nest.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass
class Cost:
    """What a block of work cost."""

    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    images: int = 0
    """Images pushed forward through a classifier, augmented or transformed copies counted each."""
    peak_memory_mb: float = 0.0
    """Peak resident memory of the process so far (not of the block alone), in MiB."""

    def to_json(self) -> dict[str, float]:
        return {key: round(value, 3) for key, value in asdict(self).items()}


_active: ContextVar[tuple[Cost, ...]] = ContextVar("active_costs", default=())


@contextmanager
def measure() -> Iterator[Cost]:
    """Count seconds, forwards, backwards and images until the block ends."""
    cost = Cost()
    token = _active.set((*_active.get(), cost))
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        cost.peak_memory_mb = _peak_memory_mb()
        _active.reset(token)


def count_pass(images: Tensor, logits: Tensor) -> None:
    """Called by the classifier for each forward; a backward is counted when its gradient arrives."""
    costs = _active.get()
    if not costs:
        return
    for cost in costs:
        cost.forwards += 1
        cost.images += len(images)
    if logits.requires_grad:
        logits.register_hook(lambda _: _count_backward(costs))


def _count_backward(costs: tuple[Cost, ...]) -> None:
    for cost in costs:
        cost.backwards += 1


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
