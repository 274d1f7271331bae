"""What every repair answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from untrojan.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class RepairReport:
    """A repair's answer. The model it was given is as it was."""

    model: Classifier
    """The repaired one."""
    history: dict[str, Any] = field(default_factory=dict)
    """How it came about, as JSON types. Lists of objects are tables: ``epochs`` (a row an epoch, named by its
    ``stage``), ``looks`` (a row a pruning step), ``curve`` (a row a place). ``scan`` is what a scanner found
    that the repair went by."""
