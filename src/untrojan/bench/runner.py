"""Run a plan: every cell once, whatever happens meanwhile.

There is no coordinator. Each worker walks the stages in order, takes the first that is neither done nor
failed, whose inputs are done and whose lock is free, and does it; so any number of workers, on any number of
machines that share the folder, divide a plan between them.
"""

from __future__ import annotations

import fnmatch
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from untrojan.bench.executor import Executor, processes
from untrojan.bench.graph import Cell, Stage, StageFunction, stages_of
from untrojan.bench.plan import read_plan
from untrojan.bench.store import History, Store
from untrojan.errors import UntrojanError
from untrojan.progress import task
from untrojan.runs import json_text, write_bytes_atomically

POLL_SECONDS = 0.5
CellStatus = Literal["done", "failed", "stale", "to do"]


@dataclass(frozen=True)
class Summary:
    """How a plan stands."""

    done: int
    """Cells with a result of the plan's present configuration."""
    failed: tuple[str, ...]
    """``cell: stage: message``, one a failed cell."""
    left: int
    """Cells neither done nor failed."""
    out_of_budget: bool
    """Whether work is left because it would not have fitted into the budget."""
    seconds: float
    results: Path
    """The folder of the result files."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs; it can be pickled."""

    cells: Sequence[Cell]
    functions: Mapping[str, StageFunction]
    store: Path
    results: Path
    """The folder of the cells' result files."""
    sources: Mapping[str, str]
    deadline: float | None
    """Seconds since the epoch, or None."""
    threads: int | None = None
    """Threads for each worker; None leaves the libraries' own choice."""


def run_plan(
    plan: Path,
    out: Path,
    *,
    results: Path | None = None,
    budget: float | None = None,
    only: Sequence[str] = (),
    workers: int = 1,
    retry_failed: bool = False,
    data: Mapping[str, str] | None = None,
    executor: Executor = processes,
) -> Summary:
    """Do what is left of a plan.

    ``out`` holds the store, and the results unless ``results`` names another folder for them; the results
    lie in a folder of the plan's name. ``budget`` is in seconds: no stage is begun that, by what its like
    have taken, would not end in time. ``only`` are patterns of which a cell's name (``data/net/attack/
    defense/seed``) must match one, where there are any. ``data`` gives paths for the plan's data names.

    Raises UntrojanError where the plan, the data or an option is wrong, before anything runs, and where
    the disk is full.
    """
    from untrojan.bench.cells import expand
    from untrojan.bench.stages import STAGES, check_data

    if workers < 1:
        raise UntrojanError(f"--workers must be at least 1, not {workers}")
    checked = read_plan(plan)
    sources = checked.resolve_sources(data or {})
    cells = select(expand(checked), only)
    check_data(checked, cells, sources)
    folder = cells_folder(out, results, checked.name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = Job(
        cells=cells,
        functions=STAGES,
        store=out / "store",
        results=folder,
        sources=sources,
        deadline=None if budget is None else time.time() + budget,
        threads=None if workers == 1 else max(1, cores // workers),
    )
    return run_cells(job, workers=workers, retry_failed=retry_failed, executor=executor)


def list_plan(
    plan: Path,
    out: Path,
    *,
    results: Path | None = None,
    only: Sequence[str] = (),
    data: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """A dry run: for each cell its name, its status and its stages, with what is done and what is shared.

    An entry is ``{"cell", "status", "stages": [{"label", "kind", "key", "status", "cells"}]}``, where
    ``cells`` counts the cells that share the stage. Nothing is created or loaded.
    """
    from untrojan.bench.cells import expand

    checked = read_plan(plan)
    checked.resolve_sources(data or {})
    cells = select(expand(checked), only)
    folder = cells_folder(out, results, checked.name)
    store = Store(out / "store") if (out / "store").is_dir() else None
    sharing: dict[str, int] = {}
    for stage in (stage for cell in cells for stage in cell.all_stages):
        sharing[stage.key] = sharing.get(stage.key, 0) + 1
    return [
        {
            "cell": cell.name,
            "status": status_of(cell, folder),
            "stages": [
                {
                    "label": stage.label,
                    "kind": stage.kind,
                    "key": stage.key,
                    "status": _stage_status(store, stage),
                    "cells": sharing[stage.key],
                }
                for stage in cell.all_stages
            ],
        }
        for cell in cells
    ]


def run_cells(
    job: Job, *, workers: int = 1, retry_failed: bool = False, executor: Executor = processes
) -> Summary:
    """Do what is left of these cells. The runner proper: it knows nothing of images or defences."""
    started = time.monotonic()
    try:
        job.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UntrojanError(f"{job.results} cannot be created: {error.strerror}") from None
    store = Store(job.store)
    if retry_failed:
        _forget_failures(job, store)
    left = [cell for cell in job.cells if status_of(cell, job.results) in ("to do", "stale")]
    if left:
        todo = Job(**{**vars(job), "cells": left})
        with _shown(todo, store, workers):
            executor(work, todo, workers)
    statuses = {cell.name: status_of(cell, job.results) for cell in job.cells}
    unfinished = sum(status in ("to do", "stale") for status in statuses.values())
    return Summary(
        done=sum(status == "done" for status in statuses.values()),
        failed=tuple(_failure_line(cell, job) for cell in job.cells if statuses[cell.name] == "failed"),
        left=unfinished,
        out_of_budget=bool(unfinished) and job.deadline is not None,
        seconds=time.monotonic() - started,
        results=job.results,
    )


def work(job: Job) -> None:
    """One worker: do stages until none is left that can be done, by this worker or by another."""
    _limit_threads(job.threads)
    worker = _Worker(job)
    worker.write_results()
    while True:
        outcome = worker.do_one()
        if outcome == "waiting":
            time.sleep(POLL_SECONDS)
        elif outcome == "nothing left":
            return


class _Worker:
    def __init__(self, job: Job) -> None:
        self.job, self.store = job, Store(job.store)
        self.stages = {stage.key: stage for stage in stages_of(job.cells)}
        self.done: set[str] = set()
        self.failed: dict[str, dict[str, Any]] = {}
        self.reported: set[str] = set()

    def do_one(self) -> Literal["did one", "waiting", "nothing left"]:
        """Do the first stage that can be done."""
        busy, history = False, self.store.history()
        for stage in self.stages.values():
            if not self._is_ready(stage):
                continue
            if not self._fits(stage, history):
                continue
            with self.store.locked(stage) as ours:
                if not ours:
                    busy = True
                    continue
                # Another worker may have done it between our look and our lock.
                if not self.store.is_done(stage) and self.store.failure(stage) is None:
                    self.store.perform(stage, self.job.functions[stage.kind], self.job.sources)
            self.write_results()
            return "did one"
        self.write_results()
        if busy and (self.job.deadline is None or time.time() < self.job.deadline):
            return "waiting"
        return "nothing left"

    def _is_ready(self, stage: Stage) -> bool:
        if self._settled(stage):
            return False
        inputs = list(stage.inputs.values())
        for each in inputs:
            self._settled(each)
        return all(each.key in self.done for each in inputs)

    def _settled(self, stage: Stage) -> bool:
        """Whether the stage is done or can never be; looks at the disk until it is."""
        if stage.key in self.done or stage.key in self.failed:
            return True
        if self.store.is_done(stage):
            self.done.add(stage.key)
            return True
        failure = self.store.failure(stage)
        for each in stage.inputs.values():
            failure = failure or (self.failed.get(each.key) if self._settled(each) else None)
        if failure is not None:
            self.failed[stage.key] = failure
        return failure is not None

    def _fits(self, stage: Stage, history: History) -> bool:
        if self.job.deadline is None:
            return True
        return time.time() + (history.expected(stage) or 0.0) < self.job.deadline

    def write_results(self) -> None:
        """Write the result of each cell whose stages are all done, or one of which has failed."""
        for cell in self.job.cells:
            if cell.name in self.reported:
                continue
            states = {role: self._settled(stage) for role, stage in cell.stages.items()}
            failures = [self.failed[s.key] for s in cell.stages.values() if s.key in self.failed]
            if all(states.values()):
                write_result(cell, self.store, self.job.results, failures[0] if failures else None)
                self.reported.add(cell.name)


def write_result(cell: Cell, store: Store, folder: Path, failure: Mapping[str, Any] | None) -> None:
    """One small JSON file: all that tables are made from."""
    records = {stage.key: store.record(stage) for stage in cell.all_stages if store.is_done(stage)}
    result: dict[str, Any] = {}
    for role, stage in cell.stages.items():
        if stage.key in records:
            summary = records[stage.key]["summary"]
            # A stage that settles several things at once names them itself.
            result |= summary.get("sections", {role: summary})
    last = next((records[s.key] for s in reversed(cell.all_stages) if s.key in records), {})
    content = {
        "cell": dict(cell.axes),
        "key": cell.key,
        "status": "done" if failure is None else "failed",
        "error": None if failure is None else {"stage": failure["label"], "message": failure["message"]},
        "result": result,
        "config": dict(cell.config),
        "cost": [
            {"stage": stage.label, "kind": stage.kind, **records[stage.key]["cost"]}
            for stage in cell.all_stages
            if stage.key in records
        ],
        "hardware": last.get("hardware"),
        "versions": last.get("versions"),
    }
    write_bytes_atomically(folder / cell.file_name, json_text(content).encode())


def read_result(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """A cell's result file, whatever configuration it is of; None where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / cell.file_name).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return None


def status_of(cell: Cell, folder: Path) -> CellStatus:
    """``stale`` where the result file is of another configuration than the plan's present one."""
    found = read_result(cell, folder)
    if found is None:
        return "to do"
    if found.get("key") != cell.key:
        return "stale"
    return "failed" if found.get("status") == "failed" else "done"


def cells_folder(out: Path, results: Path | None, plan_name: str) -> Path:
    """Where a plan's result files lie."""
    return (results or out / "results") / plan_name / "cells"


def select(cells: Iterable[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose name matches one of the patterns, or all where there are none.

    Raises UntrojanError where a pattern matches no cell.
    """
    everything = list(cells)
    for pattern in only:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in everything):
            example = everything[0].name if everything else "none"
            raise UntrojanError(
                f"--only {pattern!r} matches none of {len(everything)} cells, such as {example!r}"
            )
    return [
        cell for cell in everything
        if not only or any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in only)
    ]  # fmt: skip


def _stage_status(store: Store | None, stage: Stage) -> str:
    if store is None:
        return "to do"
    if store.is_done(stage):
        return "done"
    return "to do" if store.failure(stage) is None else "failed"


def _forget_failures(job: Job, store: Store) -> None:
    for stage in stages_of(job.cells):
        store.forget_failure(stage)
    for cell in job.cells:
        if status_of(cell, job.results) == "failed":
            (job.results / cell.file_name).unlink(missing_ok=True)


def _failure_line(cell: Cell, job: Job) -> str:
    error = (read_result(cell, job.results) or {}).get("error") or {}
    return f"{cell.name}: {error.get('stage', '?')}: {error.get('message', '?')}"


def _limit_threads(threads: int | None) -> None:
    if threads is None:
        return
    import torch

    torch.set_num_threads(threads)


@dataclass
class _Remaining:
    """How much of a job is left, seen from outside the workers."""

    job: Job
    store: Store
    workers: int
    open: dict[str, Stage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open = {stage.key: stage for stage in stages_of(self.job.cells)}
        self.update()

    def update(self) -> int:
        """How many stages have ended since the last look."""
        before = len(self.open)
        self.open = {
            key: stage
            for key, stage in self.open.items()
            if not self.store.is_done(stage) and self.store.failure(stage) is None
        }
        return before - len(self.open)

    def text(self) -> str:
        cells = sum(status_of(cell, self.job.results) in ("done", "failed") for cell in self.job.cells)
        history = self.store.history()
        guesses = [history.guess(stage) for stage in self.open.values()]
        known = [guess for guess in guesses if guess is not None]
        shown = f"{cells} of {len(self.job.cells)} cells"
        if not known:
            return shown
        # Kinds that were never run are taken to be like the rest: better than leaving them out.
        seconds = sum(known) / len(known) * len(guesses) / self.workers
        return f"{shown}, about {spell_seconds(seconds)} left"


@contextmanager
def _shown(job: Job, store: Store, workers: int) -> Iterator[None]:
    """A progress bar over the stages, and lines in ``log.txt`` beside the store."""
    remaining, ended = _Remaining(job, store, workers), threading.Event()
    total = len(stages_of(job.cells))
    with task("stages", total, "stages", done=total - len(remaining.open)) as bar:

        def look() -> None:
            finished = remaining.update()
            if finished:
                bar.advance(finished)
                bar.note(remaining.text())
                _log(store.root.parent / "log.txt", remaining, total)

        def watch() -> None:
            while not ended.wait(1.0):
                # What cannot be read now can be read a second later.
                with suppress(OSError, ValueError):
                    look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            with suppress(OSError, ValueError):
                look()


def _log(path: Path, remaining: _Remaining, total: int) -> None:
    with path.open("a", encoding="utf-8") as file:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"{now} {total - len(remaining.open)} of {total} stages, {remaining.text()}\n")


def spell_seconds(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
