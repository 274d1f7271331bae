"""Memory that was freed is kept for the next step instead of being given back to the system."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's ``mallopt``, see ``man mallopt``."""


def keep_freed_memory() -> bool:
    """Ask the C library to hold on to freed memory; whether it will.

    By default glibc asks the system for every large block and gives it back when freed. A training step frees
    all of its feature maps, so that the next one touches every page of them for the first time again: a tenth
    to a third of a small network's step. The price is that a process stays as large as it once was.

    It concerns the whole process, hence our own programs ask for it and ``import untrojan`` doesn't. Without
    glibc (musl, macOS, Windows) nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # Each returns 1 where it was taken. Any alone ends glibc's own adaptation, and costs time.
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)))
