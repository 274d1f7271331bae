"""How workers are started: the one seam between the runner and the machines it runs on.

An executor starts ``count`` workers on a job and returns when all have ended. Workers find their work through
the store alone, so a cluster's executor has only to call ``worker(job)`` on machines that share its folder.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING

from untrojan.errors import UntrojanError
from untrojan.memory import keep_freed_memory

if TYPE_CHECKING:
    from untrojan.bench.runner import Job

Executor = Callable[[Callable[["Job"], None], "Job", int], None]


def processes(worker: Callable[[Job], None], job: Job, count: int) -> None:
    """Workers as processes of this machine; a single one runs in this very process.

    A worker that is killed, as the system does when memory runs out, is replaced, and what it was doing is
    recorded as failed: it would most likely be killed for it again.
    """
    if count == 1:
        worker(job)
        return
    with _threads_in_children(job.threads):
        running = [_start(worker, job) for _ in range(count)]
        try:
            while running:
                ended = wait([process.sentinel for process in running])
                for process in [each for each in running if each.sentinel in ended]:
                    running.remove(process)
                    process.join()
                    if process.exitcode and process.exitcode < 0:
                        if _blame(job, process):
                            running.append(_start(worker, job))
                    elif process.exitcode:
                        raise UntrojanError(
                            f"a worker ended with status {process.exitcode}: its message is above; "
                            "mend that and run the same command again"
                        )
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()


def _start(worker: Callable[[Job], None], job: Job) -> SpawnProcess:
    # Not forked: a fork after the parent has used its threads leaves the child waiting for them for ever.
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(worker, job), daemon=True)
    process.start()
    return process


def _run(worker: Callable[[Job], None], job: Job) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    keep_freed_memory()
    try:
        worker(job)
    except UntrojanError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _end_with_the_parent() -> None:
    """Where the run was killed outright, so that it could not end its workers, they end by themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _blame(job: Job, process: SpawnProcess) -> bool:
    """Record what a killed worker was doing as failed. False where it was doing nothing."""
    from untrojan.bench.graph import stages_of
    from untrojan.bench.store import Store

    store, number = Store(job.store), -(process.exitcode or 0)
    keys = set(store.keys_of_process(process.pid or -1))
    blamed = [stage for stage in stages_of(job.cells) if stage.key in keys]
    for stage in blamed:
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        store.record_failure(stage, f"the worker was killed by {name}; it may have run out of memory")
    return bool(blamed)


@contextmanager
def _threads_in_children(threads: int | None) -> Iterator[None]:
    """Native thread pools read this once, when they are loaded; too many of them stall each other."""
    before = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        elif threads is not None:
            os.environ.pop("OMP_NUM_THREADS", None)
