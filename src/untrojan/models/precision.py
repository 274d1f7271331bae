"""Mixed precision where the hardware has it.

A processor without bfloat16 arithmetic takes by way of float32 ten times as long as in float32 alone.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


@cache
def has_bfloat16(device_type: str) -> bool:
    """Whether mixed precision is a gain on a kind of device: "cpu", "cuda" or another of PyTorch's."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu":
        # AVX-512 or more on x86, the bf16 extension on ARM.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def is_mixed(precision: Precision, device: torch.device) -> bool:
    """Whether a model of that precision computes in bfloat16 there."""
    return precision == "bfloat16" and has_bfloat16(device.type)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """What a model of that precision computes in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_mixed(precision, device))
