"""Cleansers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.registry import Registry


class Cleanser(Protocol):
    """Inspects a training set by way of a classifier trained on it; never sees what is truly poisoned."""

    def __call__(
        self, train: ImageSet, model: Classifier, *, checkpoint: Path | None = None
    ) -> CleansingReport: ...


CLEANSERS: Registry[Cleanser] = Registry(
    "cleanser",
    {
        "reverse-engineering": "untrojan.defenses.cleansing.reverse_engineering:ReverseEngineering",
        "activation-clustering": "untrojan.defenses.cleansing.activation_clustering:ActivationClustering",
    },
)

SHORT_NAMES: Mapping[str, str] = {"re": "reverse-engineering", "ac": "activation-clustering"}
"""The abbreviations that papers use."""


def method_names(text: str) -> tuple[str, ...]:
    """Registered names out of ``re,ac``, ``reverse-engineering`` or ``all``, each once, in the order given.

    Raises UntrojanError for an unknown name and for none.
    """
    given = [part.strip() for part in text.split(",") if part.strip()]
    if given == ["all"]:
        return CLEANSERS.names()
    names = [SHORT_NAMES.get(part, part) for part in given]
    for part, name in zip(given, names, strict=True):
        if name not in CLEANSERS.names():
            short = {full: short for short, full in SHORT_NAMES.items()}
            known = ", ".join(short.get(each, each) for each in CLEANSERS.names())
            raise UntrojanError(f"no method {part!r}: choose of {known}, or all")
    if not names:
        raise UntrojanError("no method named: give one or more, such as re,ac, or all")
    return tuple(dict.fromkeys(names))


def build_with(name: str, settings: Mapping[str, Any]) -> Cleanser:
    """A cleanser with those of ``settings`` that it has. Raises UntrojanError as ``Registry.build`` does."""
    known = {field.name for field in dataclasses.fields(cast("Any", CLEANSERS.get(name)))}
    return CLEANSERS.build(name, {key: value for key, value in settings.items() if key in known})
