"""One thread a worker, a cache of its own, and never the user's home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from untrojan.attacks.poisoning import TriggeredTest
    from untrojan.data.image_set import ImageSet
    from untrojan.models.classifier import Classifier

# Set before torch and its pools are loaded: two test workers of two threads each on two cores stall.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Decoded sets are cached, but for this session alone."""
    place = tmp_path_factory.mktemp("cache")
    before = os.environ.get("UNTROJAN_CACHE")
    os.environ["UNTROJAN_CACHE"] = str(place)
    yield place
    if before is None:
        del os.environ["UNTROJAN_CACHE"]
    else:
        os.environ["UNTROJAN_CACHE"] = before


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision is used whatever the processor has; a small net can afford it."""
    from untrojan.models import precision

    monkeypatch.setattr(precision, "has_bfloat16", lambda device_type: True)


@dataclass(frozen=True)
class Backdoored:
    """A small net that has learned a patch as the way to class 1, and what a defender has to mend it."""

    model: Classifier
    clean: ImageSet
    """Right images for the repair; the net was not trained on them."""
    test: ImageSet
    triggered: TriggeredTest


@pytest.fixture(scope="session")
def backdoored() -> Backdoored:
    """Made once: four kinds of `signs`, a tenth of the training images with a patch. Not to be changed."""
    import torch

    from untrojan.attacks.poisoning import Poisoning
    from untrojan.data.image_set import Splits
    from untrojan.data.signs import make_signs
    from untrojan.training.loop import train_new
    from untrojan.training.recipe import Recipe

    made = make_signs(4, size=16, train_per_class=250, test_per_class=50, seed=3)
    assert made.test is not None
    kept = torch.arange(1000) % 250 >= 190
    attack = Poisoning("patch", {"size": 3}, target=1, rate=0.1)
    poisoned = attack(Splits(made.train.select(~kept), made.test), seed=0)
    recipe = Recipe(epochs=12, batch_size=32, optimizer="sgd", learning_rate=0.05, schedule="one_cycle")
    model, _ = train_new(poisoned.train, "cnn@0.25", recipe, seed=0)
    return Backdoored(model, made.train.select(kept), made.test, poisoned.triggered_test)
