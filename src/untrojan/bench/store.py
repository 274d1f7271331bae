"""Where stages' outcomes live: one folder a stage, whole or absent, locked while it is being made.

::

    store/done/<kind>/<key>/          what the stage left behind, with stage.json (summary, cost, hardware)
    store/partial/<key>/              a stage under way, or killed: scratch/ keeps its checkpoints
    store/failed/<key>.json           what went wrong
    store/locks/<key>                 held with flock while a stage runs
    store/history.jsonl               how long stages of each profile took
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from untrojan.bench.graph import Place, Stage, StageFunction
from untrojan.cost import measure
from untrojan.errors import UntrojanError
from untrojan.runs import (
    hardware,
    json_ready,
    json_text,
    raise_if_disk_full,
    versions,
    write_bytes_atomically,
)


class Store:
    """The stages done so far. Any number of processes and machines may share one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            for name in ("done", "partial", "failed", "locks"):
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UntrojanError(f"{root} cannot be used as a store: {error.strerror}") from None

    def folder(self, stage: Stage) -> Path:
        return self.root / "done" / stage.kind / stage.key

    def is_done(self, stage: Stage) -> bool:
        return (self.folder(stage) / "stage.json").exists()

    def record(self, stage: Stage) -> dict[str, Any]:
        """What ``stage.json`` says of a finished stage."""
        found: dict[str, Any] = json.loads((self.folder(stage) / "stage.json").read_text())
        return found

    def failure(self, stage: Stage) -> dict[str, Any] | None:
        """Why the stage failed, or None where it did not."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.root / "failed" / f"{stage.key}.json").read_text())
            return found
        return None

    def forget_failure(self, stage: Stage) -> None:
        (self.root / "failed" / f"{stage.key}.json").unlink(missing_ok=True)

    @contextmanager
    def locked(self, stage: Stage) -> Iterator[bool]:
        """Hold the stage's lock inside, if it is free; the system gives it back however the process ends."""
        with (self.root / "locks" / stage.key).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def perform(self, stage: Stage, function: StageFunction, sources: Mapping[str, str]) -> bool:
        """Do a locked stage whose inputs are done. False, with the failure recorded, where it raised.

        Raises UntrojanError where the disk is full, for then everything else would fail as well.
        """
        partial = self.root / "partial" / stage.key
        out, scratch = partial / "out", partial / "scratch"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        scratch.mkdir(exist_ok=True)
        (partial / "process").write_text(str(os.getpid()))
        inputs = {name: self.folder(each) for name, each in stage.inputs.items()}
        try:
            with measure() as cost:
                summary = function(stage.config, Place(out, scratch, inputs, sources, stage.label))
            # Serialised before the folder appears: a summary that is no JSON is a failure of the stage.
            text = json_text(self._finished(stage, summary, cost.to_json()))
        except Exception as error:
            raise_if_disk_full(error, self.root)
            self.record_failure(stage, f"{type(error).__name__}: {error}", traceback.format_exc())
            return False
        write_bytes_atomically(out / "stage.json", text.encode())
        target = self.folder(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        out.replace(target)
        shutil.rmtree(partial, ignore_errors=True)
        self._remember(stage, cost.seconds)
        return True

    def _finished(
        self, stage: Stage, summary: Mapping[str, Any], cost: Mapping[str, float]
    ) -> dict[str, Any]:
        return {
            "kind": stage.kind,
            "label": stage.label,
            "config": stage.config,
            "inputs": {name: each.key for name, each in stage.inputs.items()},
            "summary": json_ready(summary),
            "cost": cost,
            "hardware": hardware(),
            "versions": versions(),
        }

    def record_failure(self, stage: Stage, message: str, details: str = "") -> None:
        failure = {
            "kind": stage.kind,
            "label": stage.label,
            "message": " ".join(message.split())[:1000],
            "details": details,
        }
        write_bytes_atomically(self.root / "failed" / f"{stage.key}.json", json_text(failure).encode())

    def keys_of_process(self, process: int) -> list[str]:
        """Keys of the unfinished stages that a process, now dead, had been working on."""
        found = []
        for note in self.root.glob("partial/*/process"):
            with suppress(OSError):
                if note.read_text() == str(process):
                    found.append(note.parent.name)
        return found

    def _remember(self, stage: Stage, seconds: float) -> None:
        line = json.dumps({"profile": stage.profile or stage.kind, "kind": stage.kind, "seconds": seconds})
        with (self.root / "history.jsonl").open("a") as file:
            file.write(line + "\n")

    def history(self) -> History:
        """How long stages have taken so far."""
        return History(self.root / "history.jsonl")


class History:
    """Measured durations, read once."""

    def __init__(self, path: Path) -> None:
        self._profiles: dict[str, list[float]] = defaultdict(list)
        self._kinds: dict[str, list[float]] = defaultdict(list)
        self.read_at = time.monotonic()
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            # A line that another machine was writing at the same moment may be torn.
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._profiles[entry["profile"]].append(float(entry["seconds"]))
                self._kinds[entry["kind"]].append(float(entry["seconds"]))

    def expected(self, stage: Stage) -> float | None:
        """Median seconds of the stages of its profile; None where none was done yet."""
        known = self._profiles.get(stage.profile or stage.kind)
        return statistics.median(known) if known else None

    def guess(self, stage: Stage) -> float | None:
        """As :meth:`expected`, else the median of its kind: good enough for the time left."""
        expected = self.expected(stage)
        if expected is None and stage.kind in self._kinds:
            return statistics.median(self._kinds[stage.kind])
        return expected
