"""Threads that get in each other's way."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any


def one_blas_thread() -> AbstractContextManager[Any]:
    """A context in which NumPy's and SciPy's linear algebra keeps to the calling thread.

    For small matrices between torch's operations: its other threads would go on spinning for tens of
    milliseconds and take torch's cores away. torch's own linear algebra is not touched.
    """
    return _controller().limit(limits=1, user_api="blas")  # type: ignore[no-any-return]


@cache
def _controller() -> Any:
    # Libraries that are loaded later are not seen, so they are loaded first.
    import numpy.linalg  # noqa: F401
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
