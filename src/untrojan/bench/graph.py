"""Stages and cells: what an experiment is made of, addressed by its content.

A *stage* is one piece of work (a poisoned set, a trained model, an audit) whose key is the SHA-256 of its
configuration and of its inputs' keys. Two cells that need the same stage therefore name the same stage, and
changing one option changes the keys of exactly those stages that depend on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

SCHEMA = 1
"""Part of every key. Raised when stored stages or results can no longer be read as they were written."""


def address(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value's canonical JSON. Raises ValueError for NaN or infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Stage:
    """One piece of work, done once and shared by all the cells that need it."""

    kind: str
    """Which stage function does it."""
    config: Mapping[str, Any]
    """JSON types only: all that decides the outcome, beside the inputs."""
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    version: int = 1
    """Of the stage function: raised when its outcome for the same configuration changes."""
    label: str = ""
    """For people; no part of the key."""
    profile: str = ""
    """Stages of one profile are expected to take equally long; no part of the key."""

    @cached_property
    def key(self) -> str:
        inputs = {name: stage.key for name, stage in self.inputs.items()}
        return address([SCHEMA, self.kind, self.version, dict(self.config), inputs])

    def ancestry(self) -> Iterable[Stage]:
        """The inputs' inputs first, this stage last; one that is reached twice comes twice."""
        for stage in self.inputs.values():
            yield from stage.ancestry()
        yield self


@dataclass(frozen=True, eq=False)
class Cell:
    """One experiment: an attack, a defence, data, a net and a seed."""

    axes: Mapping[str, str | int]
    """What tells this cell from the plan's others, such as ``{"data": "cifar10", ..., "seed": 0}``."""
    stages: Mapping[str, Stage]
    """Role to stage: those whose summaries make up the result."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration, for the record."""

    @cached_property
    def name(self) -> str:
        return "/".join(str(value) for value in self.axes.values())

    @property
    def file_name(self) -> str:
        return self.name.replace("/", "__") + ".json"

    @cached_property
    def key(self) -> str:
        return address([SCHEMA, {role: stage.key for role, stage in self.stages.items()}])

    @cached_property
    def all_stages(self) -> tuple[Stage, ...]:
        """Every stage the cell rests on, once, inputs before what needs them."""
        found: dict[str, Stage] = {}
        for stage in self.stages.values():
            for each in stage.ancestry():
                found.setdefault(each.key, each)
        return tuple(found.values())


def stages_of(cells: Iterable[Cell]) -> tuple[Stage, ...]:
    """Every stage of these cells, once, in an order that finishes the first cells first."""
    found: dict[str, Stage] = {}
    for cell in cells:
        for stage in cell.all_stages:
            found.setdefault(stage.key, stage)
    return tuple(found.values())


@dataclass(frozen=True)
class Place:
    """Where a stage function works."""

    out: Path
    """An empty folder for what the stage leaves behind; it appears in the store whole or not at all."""
    scratch: Path
    """A folder for checkpoints: what is in it is still there when a killed stage is started again."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """The finished folders of the stage's inputs."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Data by name: the paths that stand in for names on this machine."""
    label: str = ""


class StageFunction(Protocol):
    """Does one kind of stage and returns its summary: small, of JSON types."""

    def __call__(self, config: Mapping[str, Any], place: Place, /) -> dict[str, Any]: ...
