"""Images for a page: PNG bytes and data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.triggers.base import to_bytes


def png(image: Tensor) -> bytes:
    """uint8 (C, H, W), C 1, 3 or 4, as a PNG file."""
    from PIL import Image

    pixels = image.cpu().movedim(0, -1).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
        buffer, "PNG", optimize=True
    )
    return buffer.getvalue()


def data_uri(image: Tensor) -> str:
    """uint8 (C, H, W) as a ``data:`` URI that holds a PNG."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


def affordable_side(shape: tuple[int, ...], count: int, budget: int) -> int:
    """The longest side at which ``count`` images of ``shape`` (C, H, W) stay within ``budget`` bytes.

    Reckoned as incompressible pixels in base64, so that the bound holds for noise too. At least 8 pixels.
    """
    channels, height, width = shape
    longest = max(height, width)
    bytes_each = budget / max(1, count) * 3 / 4 - 200
    fits = math.sqrt(max(1.0, bytes_each) / (channels * (height * width) / longest**2))
    return max(8, min(longest, math.floor(fits)))


def reduced(image: Tensor, side: int) -> Tensor:
    """uint8 (C, H, W) with its longest side at most ``side``, by area averaging."""
    height, width = image.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return to_bytes(F.interpolate(image[None].float() / 255, size=size, mode="area")[0])


def reduced_pattern(pattern: Tensor, side: int) -> Tensor:
    """Signed (C, H, W) with its longest side at most ``side``: of each block, the value largest in size.

    Averaging would do to a chessboard what it was drawn to survive: nothing would be left to see.
    """
    block = math.ceil(max(pattern.shape[-2:]) / side)
    if block <= 1:
        return pattern
    _, where = F.max_pool2d(pattern[None].abs(), block, ceil_mode=True, return_indices=True)
    return pattern[None].flatten(2).gather(2, where.flatten(2)).view(where.shape)[0]


def amplification_for(pattern: Tensor) -> int:
    """A round whole factor (one digit and zeros) that brings the largest value near, not past, half scale."""
    peak = float(pattern.abs().max()) if pattern.numel() else 0.0
    if not math.isfinite(peak) or peak <= 0:
        return 1
    room = max(1.0, min(0.5 / peak, 1000.0) + 1e-6)
    decade = int(10 ** math.floor(math.log10(room)))
    return next(step * decade for step in range(9, 0, -1) if step * decade <= room)


def pattern_image(pattern: Tensor, amplification: float | None = None) -> Tensor:
    """A signed pattern (C, H, W) in [-1, 1] as a uint8 image: mid grey is zero, brighter is added light.

    ``amplification`` multiplies the pattern first; :func:`amplification_for` gives the default.
    """
    if amplification is None:
        amplification = amplification_for(pattern)
    finite = torch.nan_to_num(pattern.detach().float().cpu())
    return to_bytes(finite * amplification + 0.5)


def pattern_png(pattern: Tensor, amplification: float | None = None, least_side: int = 256) -> bytes:
    """The file ``pattern.png``: :func:`pattern_image`, every pixel enlarged to a whole square."""
    image = pattern_image(pattern, amplification)
    times = max(1, math.ceil(least_side / max(image.shape[-2:])))
    return png(image.repeat_interleave(times, 1).repeat_interleave(times, 2))
