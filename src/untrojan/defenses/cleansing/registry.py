"""Cleansers by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

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
        "spectral-signatures": "untrojan.defenses.cleansing.spectral_signatures:SpectralSignatures",
        "spectre": "untrojan.defenses.cleansing.spectre:Spectre",
        "strip": "untrojan.defenses.cleansing.strip:Strip",
        "scan": "untrojan.defenses.cleansing.scan:StatisticalContamination",
        "beatrix": "untrojan.defenses.cleansing.beatrix:Beatrix",
        "consistency": "untrojan.defenses.cleansing.consistency:Consistency",
        "cluster-impurity": "untrojan.defenses.cleansing.cluster_impurity:ClusterImpurity",
        "linearity": "untrojan.defenses.cleansing.linearity:Linearity",
        "subspace-reconstruction": (
            "untrojan.defenses.cleansing.subspace_reconstruction:SubspaceReconstruction"
        ),
    },
)

SHORT_NAMES: Mapping[str, str] = {
    "re": "reverse-engineering",
    "ac": "activation-clustering",
    "ss": "spectral-signatures",
    "ci": "cluster-impurity",
    "sr": "subspace-reconstruction",
}
"""The abbreviations that papers use."""
NEED_TRUSTED_IMAGES = ("subspace-reconstruction",)


def method_names(text: str, trusted: bool = True) -> tuple[str, ...]:
    """Registered names out of ``re,ac``, ``reverse-engineering`` or ``all``, each once, in the order given.

    ``all`` leaves out those that need ``trusted`` images where there are none. Raises UntrojanError for an
    unknown name and for none.
    """
    given = [part.strip() for part in text.split(",") if part.strip()]
    every = [name for name in CLEANSERS.names() if trusted or name not in NEED_TRUSTED_IMAGES]
    names: list[str] = []
    for part in given:
        name = SHORT_NAMES.get(part, part)
        if part != "all" and name not in CLEANSERS.names():
            short = {full: short for short, full in SHORT_NAMES.items()}
            known = ", ".join(short.get(each, each) for each in CLEANSERS.names())
            raise UntrojanError(f"no method {part!r}: choose of {known}, or all")
        names += every if part == "all" else [name]
    if not names:
        raise UntrojanError("no method named: give one or more, such as re,ac, or all")
    return tuple(dict.fromkeys(names))


def build_with(name: str, settings: Mapping[str, Any]) -> Cleanser:
    """A cleanser with those of ``settings`` that it has. Raises UntrojanError as ``Registry.build`` does."""
    return CLEANSERS.build_with(name, settings)
