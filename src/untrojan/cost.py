"""The one harness that measures what a method costs. No method times itself.

``with measure() as cost: ...`` counts everything that passes through a
:class:`~untrojan.models.classifier.Classifier` inside the block; blocks nest. Work that goes on from a
checkpoint recalls what it had cost up to there, so that an interruption makes nothing look cheap.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass
class Cost:
    """What a block of work cost."""

    seconds: float = 0.0
    """Known when the block has ended; :meth:`so_far` tells it before."""
    forwards: int = 0
    backwards: int = 0
    images: int = 0
    """Images pushed forward through a classifier, augmented or transformed copies counted each."""
    peak_memory_mb: float = 0.0
    """Peak resident memory of the process so far (not of the block alone), in MiB."""

    def __post_init__(self) -> None:
        self._began = time.perf_counter()

    def so_far(self) -> list[float]:
        """Seconds, forwards, backwards and images, of a block that has not ended: for :func:`recall`."""
        elapsed = time.perf_counter() - self._began
        return [self.seconds + elapsed, self.forwards, self.backwards, self.images]

    def to_json(self) -> dict[str, float]:
        return {key: round(value, 3) for key, value in asdict(self).items()}


NOTHING = (0.0, 0, 0, 0)
"""What a part that had not begun had cost."""
_active: ContextVar[tuple[Cost, ...]] = ContextVar("active_costs", default=())


@contextmanager
def measure() -> Iterator[Cost]:
    """Count seconds, forwards, backwards and images until the block ends."""
    cost = Cost()
    token = _active.set((*_active.get(), cost))
    try:
        yield cost
    finally:
        cost.seconds = cost.so_far()[0]
        cost.peak_memory_mb = _peak_memory_mb()
        _active.reset(token)


def recall(spent: Sequence[float]) -> None:
    """Add what an interrupted part had cost, as :meth:`Cost.so_far` told it, to all blocks around."""
    seconds, forwards, backwards, images = spent
    for cost in _active.get():
        cost.seconds += float(seconds)
        cost.forwards += int(forwards)
        cost.backwards += int(backwards)
        cost.images += int(images)


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
