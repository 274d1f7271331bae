"""Triggers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from untrojan.registry import Registry
from untrojan.triggers.base import ImageShape, Trigger, TriggerRecipe

TRIGGERS: Registry[TriggerRecipe] = Registry(
    "trigger",
    {
        "chessboard": "untrojan.triggers.patterns:Chessboard",
        "even-pixels": "untrojan.triggers.patterns:EvenPixels",
        "cross": "untrojan.triggers.patterns:Cross",
        "square": "untrojan.triggers.patterns:Square",
        "pixels": "untrojan.triggers.patterns:Pixels",
        "ell": "untrojan.triggers.patterns:Ell",
        "corner-chessboard": "untrojan.triggers.patterns:CornerChessboard",
        "corner-pixel": "untrojan.triggers.patterns:CornerPixel",
        "yellow-square": "untrojan.triggers.patterns:YellowSquare",
        "patch": "untrojan.triggers.patch:Patch",
        "watermark": "untrojan.triggers.watermark:Watermark",
        "blend": "untrojan.triggers.blend:Blend",
        "strips": "untrojan.triggers.strips:Strips",
        "sinusoid": "untrojan.triggers.sinusoid:Sinusoid",
        "warp": "untrojan.triggers.warp:Warp",
        "gotham": "untrojan.triggers.filters:Gotham",
        "nashville": "untrojan.triggers.filters:Nashville",
        "kelvin": "untrojan.triggers.filters:Kelvin",
        "lomo": "untrojan.triggers.filters:Lomo",
        "toaster": "untrojan.triggers.filters:Toaster",
        "sunrise": "untrojan.triggers.sunrise:Sunrise",
        "invisible": "untrojan.triggers.invisible:Invisible",
        "universal": "untrojan.triggers.universal:Universal",
    },
)


def draw_trigger(name: str, options: Mapping[str, Any] | None, shape: ImageShape, seed: int) -> Trigger:
    """The trigger ``name`` for images of ``shape`` (C, H, W), drawn from ``seed``.

    Raises UntrojanError for an unknown name, a wrong option, or images too small for it.
    """
    return TRIGGERS.build(name, options).draw(shape, seed)
