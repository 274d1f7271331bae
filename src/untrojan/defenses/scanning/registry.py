"""Scanners by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from untrojan.data.image_set import ImageSet
from untrojan.defenses.scanning.report import ScanReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.registry import Registry


class Scanner(Protocol):
    """Inspects a model with clean images; never sees a triggered one."""

    def __call__(
        self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None
    ) -> ScanReport: ...


SCANNERS: Registry[Scanner] = Registry(
    "scanner",
    {
        "neural-cleanse": "untrojan.defenses.scanning.neural_cleanse:NeuralCleanse",
        "additive": "untrojan.defenses.scanning.additive:AdditiveTest",
        "abs": "untrojan.defenses.scanning.abs:ABS",
        "natural": "untrojan.defenses.scanning.natural:NaturalTrojans",
        "class-distance": "untrojan.defenses.scanning.class_distance:ClassDistance",
    },
)


def method_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Registered names out of ``["abs,natural", "neural-cleanse"]`` or ``["all"]``, each once, in that order.

    Raises UntrojanError for an unknown name and for none.
    """
    given = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    for part in given:
        if part not in (*SCANNERS.names(), "all"):
            raise UntrojanError(f"no method {part!r}: choose of {', '.join(SCANNERS.names())}, or all")
    if not given:
        raise UntrojanError("no method named: give one or more, such as neural-cleanse,abs, or all")
    return SCANNERS.names() if "all" in given else tuple(dict.fromkeys(given))
