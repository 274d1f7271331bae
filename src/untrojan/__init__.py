"""Find, remove and prevent backdoors in image classifiers.

>>> import untrojan
>>> data = untrojan.load("signs")            # doctest: +SKIP
>>> data.train.images.shape                  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from untrojan.data.image_set import ImageSet, Splits
    from untrojan.data.load import load

__version__ = "0.1.0"
__all__ = ["ImageSet", "Splits", "__version__", "load"]

_HOMES = {
    "ImageSet": "untrojan.data.image_set",
    "Splits": "untrojan.data.image_set",
    "load": "untrojan.data.load",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `untrojan --help` must not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'untrojan' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
