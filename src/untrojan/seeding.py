"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose; streams of different purposes never overlap.

    ``generator(7, "augmentation", epoch)`` gives the same numbers whatever was drawn before it, which is
    what lets a killed run resume in the middle and still be the run it would have been.
    """
    text = "/".join([str(seed), *map(str, purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
