"""One thread a worker, a cache of its own, and never the user's home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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
