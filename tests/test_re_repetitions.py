"""How often RE estimates a pattern anew with what it has flagged, on estimates whose outcome is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.reverse_engineering import (
    MORE_REPETITIONS,
    REPETITIONS,
    ReverseEngineering,
)

TARGET, OF_TARGET = 2, 100


def estimates(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> list[tuple[int, bool]]:
    """Estimates that flag the first so many images of the target, one after another; what each was made
    with."""
    made: list[tuple[int, bool]] = []

    def answer(
        self: ReverseEngineering, images: ImageSet, train: ImageSet, *_: Any, both_ways: bool = False
    ) -> Any:
        made.append((int((images.labels == TARGET).sum()), both_ways))
        rows = train.indices_of(TARGET)
        count = counts[min(len(made), len(counts)) - 1]
        removal = SimpleNamespace(
            rows=rows, drops=torch.zeros(len(rows)), readings=torch.full((len(rows),), TARGET)
        )
        threshold = SimpleNamespace(at=0.0, spread=1.0, separation=2.0)
        flagged = torch.arange(len(rows)) < count
        pattern = torch.full((1, 8, 8), float(len(made)))
        return SimpleNamespace(pattern=pattern, removal=removal, threshold=threshold, flagged=flagged)

    monkeypatch.setattr(ReverseEngineering, "_carriers", answer)
    return made


@pytest.mark.parametrize(
    ("counts", "flagged", "rounds"),
    [
        # It goes on while each flags a fiftieth more, and takes none that flags no more.
        ([40, 40, 40, 50, 60, 61, 90], 60, 6),
        ([40, 40, 40, 40, 90], 90, 6),
        ([40, 40, 40, 40, 40, 90], 40, 5),
        # The one asked both ways may flag fewer, but not lose what was flagged.
        ([40, 40, 40, 39, 39], 39, 5),
        ([40, 40, 40, 20, 90], 40, 4),
        ([40, 40, 40, 50, 45, 90], 50, 5),
        # There is an end to it.
        ([10, 10, 10, 20, 30, 40, 50, 60, 70, 80, 90], 70, 1 + REPETITIONS + 1 + MORE_REPETITIONS),
        # With a handful there is nothing to go on.
        ([7, 90], 7, 1),
    ],
)
def test_estimates_are_repeated_while_they_find_more(
    counts: list[int], flagged: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.arange(3 * OF_TARGET) % 3
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    data = ImageSet(images, labels, ("a", "b", "c"), numbered(len(labels)))
    made = estimates(monkeypatch, counts)
    test = SimpleNamespace(source=0, target=TARGET)
    found = ReverseEngineering()._cleanse(data, None, None, (test,))  # type: ignore[arg-type]
    assert int(found.flagged.sum()) == flagged
    assert len(made) == rounds
    assert made[0] == (OF_TARGET, False)
    assert [both_ways for _, both_ways in made[1:]] == [number >= REPETITIONS for number in range(rounds - 1)]
    used = [count for count, _ in made[1:]]
    assert used == counts[: len(used)]
    assert bool(found.scores.isfinite().all())
