"""The folder a run leaves behind: locked while it runs, whole when it is done, resumable when it is not.

Inside the folder, while a run is under way::

    .lock             held with flock; names the process that holds it
    .work/state.json  which run this is
    .work/results/    what has been written so far, unseen until the run succeeds
    .work/...         the run's own checkpoints

On success the results are moved into the folder, ``run.json`` last, and ``.work`` goes. A folder without
``run.json`` is therefore never a finished run, and a failed run leaves no result at all.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from untrojan import __version__
from untrojan.cost import Cost, measure
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from torch import Tensor

    from untrojan.data.image_set import ImageSet

_LOCK, _WORK, _RUN = ".lock", ".work", "run.json"
_LARGEST_RECORD = 16 * 2**20


class RunFolder:
    """An output folder, as a context manager.

    ``work`` is where the run keeps its checkpoints; ``resumed`` says whether an earlier, unfinished run of
    the same configuration left some there. ``record`` adds facts to ``run.json``.

    Raises UntrojanError on entering when another run holds the folder, when it holds files that are not a
    run's, or when it holds a run of another configuration and ``overwrite`` is false; and, from any writer
    or on leaving, when the disk is full. A finished run of the same configuration is done again and stays
    as it was until the new one succeeds. ``overwrite`` never deletes a file that no run wrote.
    """

    def __init__(
        self, path: str | Path, command: str, config: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        """``config`` is all that decides the run's result, seed included; JSON types and dataclasses."""
        self.path = Path(path)
        self.command = command
        self.config: dict[str, Any] = json_ready(config)
        self.overwrite = overwrite
        self.work = self.path / _WORK
        self.resumed = False
        self.cost = Cost()
        self._staging = self.work / "results"
        self._facts: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        self._replaced: set[str] = set()
        self._made: list[Path] = []
        self._lock, self._measuring = ExitStack(), ExitStack()

    def __enter__(self) -> RunFolder:
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        try:
            with _disk_full_is_an_error(self.path):
                self._made = _make_folder(self.path)
                self._lock.enter_context(_locked(self.path, self.command))
                self._prepare()
        except BaseException:
            self._leave()
            raise
        self.cost = self._measuring.enter_context(measure())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._measuring.close()
        try:
            if error is not None:
                raise_if_disk_full(error, self.path)
                return
            with _disk_full_is_an_error(self.path):
                self._publish()
        finally:
            self._leave()

    def record(self, **facts: Any) -> None:
        """Add facts to ``run.json``, such as which device ran."""
        self._facts.update(facts)

    def use_data(self, role: str, data: ImageSet) -> None:
        """Note which data the run stands on; refuse to resume a run that stood on other data."""
        known = self._state["data"].get(role)
        found = {
            "fingerprint": data.fingerprint(),
            "images": len(data),
            "shape": list(data.image_shape),
            "classes": list(data.class_names),
        }
        if known is not None and known["fingerprint"] != found["fingerprint"]:
            raise UntrojanError(
                f"{self.path} holds an unfinished run on other {role} data: pass --overwrite to start afresh"
            )
        self._state["data"][role] = json_ready(found)
        self._save_state(self._state)

    def staged(self, name: str) -> Path:
        """Where to write ``name`` with a writer of one's own; it appears in the folder on success."""
        place = self._staging / _checked_name(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a result. Returns the path at which it appears once the run has succeeded."""
        write_bytes_atomically(self.staged(name), content)
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, _encoded(text))

    def write_json(self, name: str, value: Any) -> Path:
        """Any mix of JSON types, tensors, arrays, dataclasses and paths; NaN and infinity become null."""
        return self.write_text(name, json_text(value))

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
        """A table. Text that a spreadsheet would run as a formula gets an apostrophe in front."""
        return self.write_text(name, csv_text(header, rows))

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> Path:
        """A ``.safetensors`` file."""
        from safetensors.torch import save

        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        return self.write_bytes(name, save(plain, metadata=dict(metadata or {})))

    def _prepare(self) -> None:
        identity = json_ready({"command": self.command, "config": self.config, "version": __version__})
        state, finished = _read_json(self.work / "state.json"), _read_json(self.path / _RUN)
        self._replaced = _names_in(finished, "files") | _names_in(state, "publishing")
        if state is not None and not self._replaced and not self._checkpoints():
            state = None
        if not self.overwrite:
            self._refuse_another_run(identity, state, finished)
        if state is None or _difference(state, identity):
            state = None
            shutil.rmtree(self.work, ignore_errors=True)
        self.resumed = state is not None
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        self._state = state or {**identity, "data": {}, "publishing": []}
        self._save_state(self._state)

    def _refuse_another_run(
        self,
        identity: Mapping[str, Any],
        state: Mapping[str, Any] | None,
        finished: Mapping[str, Any] | None,
    ) -> None:
        for old, what in ((state, "an unfinished run"), (finished, "the finished run")):
            if old is not None and (difference := _difference(old, identity)):
                raise UntrojanError(
                    f"{self.path} holds {what} of another configuration ({difference}): "
                    "choose another folder, or pass --overwrite"
                )
        if stranger := _stranger(self.path, self._replaced, finished is not None):
            raise UntrojanError(
                f"{self.path} already holds {_short(stranger)!r}, which no run wrote: choose another folder, "
                "or pass --overwrite to write beside it"
            )

    def _checkpoints(self) -> bool:
        """Whether there is anything in ``work`` from which to go on."""
        if not self.work.is_dir():
            return False
        names = {place.name for place in self.work.iterdir() if place.suffix not in (".partial", ".tmp")}
        return bool(names - {"state.json", "results", _RUN})

    def _save_state(self, state: Mapping[str, Any]) -> None:
        write_bytes_atomically(self.work / "state.json", _encoded(json_text(state)))

    def _publish(self) -> None:
        names = sorted(
            place.relative_to(self._staging).as_posix()
            for place in self._staging.rglob("*")
            if place.is_file()
        )
        state = {**self._state, "publishing": sorted({*names, *_names_in(self._state, "publishing")})}
        self._save_state(state)
        # Written beside the others first: from here on nothing needs new space on the disk.
        last = self.work / _RUN
        write_bytes_atomically(last, _encoded(json_text(self._run_record(names))))
        self._state = state
        (self.path / _RUN).unlink(missing_ok=True)
        for name in self._replaced - set(names):
            _remove_result(self.path, name)
        for name in names:
            place = self.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (self._staging / name).replace(place)
        _sync_folder(self.path)
        last.replace(self.path / _RUN)
        _sync_folder(self.path)
        shutil.rmtree(self.work)

    def _run_record(self, files: list[str]) -> dict[str, Any]:
        return {
            "command": self.command,
            "config": self.config,
            "version": __version__,
            "seed": self.config.get("seed"),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 1),
            "resumed": self.resumed,
            "cost": self.cost.to_json(),
            "data": self._state["data"],
            "versions": versions(),
            "hardware": hardware(),
            "files": files,
            **self._facts,
        }

    def _leave(self) -> None:
        """Give the folder back; where there is nothing to resume from, as if it had never been taken."""
        # Without a state this object never got as far as owning ``.work``: it may be another run's.
        if self._state:
            shutil.rmtree(self._staging, ignore_errors=True)
            if not self._checkpoints() and not self._state["publishing"]:
                shutil.rmtree(self.work, ignore_errors=True)
        self._lock.close()
        for made in reversed(self._made):
            with suppress(OSError):
                made.rmdir()


def write_bytes_atomically(place: Path, content: bytes) -> None:
    """The whole file or no file, whatever happens meanwhile. Raises UntrojanError on a full disk."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    with _disk_full_is_an_error(place):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def json_text(value: Any) -> str:
    """Strict JSON, whatever is in it: see :func:`json_ready`."""
    return json.dumps(json_ready(value), indent=2, allow_nan=False) + "\n"


def json_ready(value: Any) -> Any:
    """JSON types only: tensors and arrays as lists, dataclasses as objects, NaN and infinity as None."""
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [json_ready(item) for item in items]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: json_ready(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    return str(value)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """RFC 4180 with a line feed. Names in it come from untrusted data, hence the guard against formulas."""
    return "".join(",".join(map(_csv_cell, row)) + "\n" for row in (header, *rows))


def _csv_cell(value: object) -> str:
    text = "" if value is None else str(value)
    # A spreadsheet would run such text; numbers may begin with a sign.
    if isinstance(value, str) and text[:1] in ("=", "+", "-", "@", "\t", "\r"):
        text = f"'{text}"
    # Not the csv module, which leaves a lone carriage return unquoted where lines end in a line feed.
    if not text or any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"' if isinstance(value, str) else text
    return text


def versions() -> dict[str, str]:
    """What ran: Python, this package and the libraries that decide its numbers."""
    found = {"python": platform.python_version(), "untrojan": __version__}
    for name in ("torch", "numpy", "scipy", "scikit-learn", "pillow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """What it ran on: processor, cores it may use, threads, memory in GiB, the GPU where there is one, and
    whether models of mixed precision ran in it."""
    import torch

    from untrojan.models.precision import has_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bfloat16": has_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def raise_if_disk_full(error: BaseException, place: Path | None = None) -> None:
    """Turn any library's way of saying that the disk is full into the one line a user can act on."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Libraries that write for themselves raise exceptions of their own, torch without the system's reason.
    said = ("no space left on device", "pytorchstreamwriter failed", "unexpected pos", "iostream error")
    if full or (not isinstance(error, UntrojanError) and any(text in str(error).lower() for text in said)):
        where = f" on the disk that holds {place}" if place else ""
        raise UntrojanError(
            f"no space left{where}: free some space, then run the same command again"
        ) from error


@contextmanager
def _disk_full_is_an_error(place: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise_if_disk_full(error, place)
        raise


def _make_folder(path: Path) -> list[Path]:
    """Create a folder and its parents. Returns the ones that were not there, outermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()][::-1]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UntrojanError(f"{path} is not a folder: choose another place for the results") from None
    except PermissionError:
        raise UntrojanError(f"{path} cannot be created: no permission to write there") from None
    return missing


@contextmanager
def _locked(path: Path, command: str) -> Iterator[None]:
    """Hold the folder's lock; the system gives it back however the process ends."""
    place = path / _LOCK
    file = _open_lock(place)
    try:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({command})")
        file.flush()
        yield
    finally:
        place.unlink(missing_ok=True)
        file.close()


def _open_lock(place: Path) -> IO[str]:
    while True:
        try:
            file = place.open("a+", encoding="utf-8", errors="replace")
        except PermissionError:
            raise UntrojanError(f"{place.parent} cannot be written to: no permission") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            file.close()
            raise UntrojanError(
                f"{place.parent} is in use by {holder}: wait for it to end, or choose another folder"
            ) from None
        except BaseException:
            file.close()
            raise
        # The holder before us removes its lock file: make sure that ours is the one others will open.
        with suppress(FileNotFoundError):
            if os.path.samestat(place.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def _stranger(path: Path, ours: set[str], finished: bool) -> str | None:
    """A file in the folder that no run wrote, or None."""
    tops = {PurePosixPath(name).parts[0] for name in ours} | ({_RUN} if finished else set())
    others = sorted(place.name for place in path.iterdir() if place.name not in {_LOCK, _WORK, *tops})
    return others[0] if others else None


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first thing in which two runs differ, in words; empty where they are the same run."""
    pairs = [(key, old.get(key), new.get(key)) for key in ("command", "version")]
    theirs, ours = old.get("config"), new["config"]
    if isinstance(theirs, dict):
        pairs += [(key, theirs.get(key), ours.get(key)) for key in dict.fromkeys([*ours, *theirs])]
    else:
        pairs.append(("config", theirs, ours))
    for key, their, our in pairs:
        if their != our:
            return f"{key} {_short(their)} there, {_short(our)} here"
    return ""


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _names_in(record: Mapping[str, Any] | None, key: str) -> set[str]:
    """The result names a record lists. The record may have been tampered with: unsafe names are left out."""
    names = record.get(key) if record else None
    return {name for name in names if _is_safe_name(name)} if isinstance(names, list) else set()


def _is_safe_name(name: object) -> bool:
    if not isinstance(name, str):
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not parts[0].startswith(".")


def _checked_name(name: str) -> str:
    if not _is_safe_name(name) or name == _RUN:
        raise ValueError(f"{name!r} is not a name for a result")
    return name


def _remove_result(path: Path, name: str) -> None:
    place = path / name
    with suppress(OSError):
        if place.resolve().is_relative_to(path.resolve()):
            place.unlink()
            for parent in list(place.relative_to(path).parents)[:-1]:
                (path / parent).rmdir()


def _read_json(place: Path) -> dict[str, Any] | None:
    """A record this module wrote; None where there is none or it is something else."""
    try:
        if place.stat().st_size > _LARGEST_RECORD:
            return None
        value = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "config" in value else None


def _sync_folder(path: Path) -> None:
    # A rename is only certain to survive a power cut once the folder itself is on the disk.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _encoded(text: str) -> bytes:
    # File names that are not UTF-8 arrive with lone surrogates in them.
    return text.encode("utf-8", errors="backslashreplace")
