"""The runner's own logic, with stages that do nothing but leave traces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from untrojan.bench.graph import Cell, Place, Stage
from untrojan.bench.runner import Job, read_result, run_cells, select, status_of
from untrojan.bench.store import Store
from untrojan.errors import UntrojanError


def trace(place: Place, text: str) -> None:
    with Path(place.sources["trace"]).open("a") as file:
        file.write(text + "\n")


def make(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Adds up its inputs' values and its own."""
    trace(place, f"{config['name']} {os.getpid()}")
    if config.get("sleep"):
        time.sleep(config["sleep"])
    if config.get("wrong"):
        raise ValueError(f"{config['name']} went wrong")
    if config.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    inputs = [json.loads((each / "value.json").read_text()) for each in place.inputs.values()]
    value = config.get("value", 0) + sum(inputs)
    (place.out / "value.json").write_text(json.dumps(value))
    return {"value": value}


def steps(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Takes its steps one by one and notes each, as training does with its checkpoint."""
    checkpoint = place.scratch / "step"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(done, config["steps"]):
        trace(place, f"step {step}")
        (place.out / "half-written").write_text(str(step))
        # Whole or not at all, as the project's checkpoints are.
        written = place.scratch / "written"
        written.write_text(str(step + 1))
        written.replace(checkpoint)
        time.sleep(config["pause"] if step < config["fast_from"] else 0)
    return {"value": config["steps"], "resumed_at": done}


FUNCTIONS = {"make": make, "steps": steps}


def stage(name: str, *inputs: Stage, **config: Any) -> Stage:
    return Stage(
        "make", {"name": name, **config}, {str(i): each for i, each in enumerate(inputs)}, label=name
    )


def cell(name: str, end: Stage) -> Cell:
    return Cell({"attack": name, "seed": 0}, {"end": end})


def job(folder: Path, cells: list[Cell], deadline: float | None = None) -> Job:
    return Job(
        cells, FUNCTIONS, folder / "store", folder / "cells", {"trace": str(folder / "trace")}, deadline, 1
    )


def runs(folder: Path) -> Counter[str]:
    path = folder / "trace"
    return Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()


def test_shared_stages_run_once_and_results_hold_what_cells_ask_for(tmp_path: Path) -> None:
    shared = stage("shared", value=5)
    cells = [cell(str(i), stage(f"end{i}", shared, value=i)) for i in range(3)]
    summary = run_cells(job(tmp_path, cells))
    assert (summary.done, summary.failed, summary.left) == (3, (), 0)
    assert runs(tmp_path) == {"shared": 1, "end0": 1, "end1": 1, "end2": 1}
    for i, each in enumerate(cells):
        content = read_result(each, tmp_path / "cells")
        assert content is not None
        assert content["result"] == {"end": {"value": 5 + i}}
        assert content["cell"] == {"attack": str(i), "seed": 0}
        assert {part["stage"] for part in content["cost"]} == {"shared", f"end{i}"}
        assert content["hardware"]["cores"] >= 1
    run_cells(job(tmp_path, cells))
    assert sum(runs(tmp_path).values()) == 4


def test_only_what_depends_on_a_change_runs_again(tmp_path: Path) -> None:
    def cells(option: int) -> list[Cell]:
        data = stage("data")
        poisoned = stage("poisoned", data)
        return [
            cell("a", stage("audit", poisoned, option=option)),
            cell("b", stage("other", poisoned)),
        ]

    run_cells(job(tmp_path, cells(1)))
    assert status_of(cells(2)[0], tmp_path / "cells") == "stale"
    assert status_of(cells(2)[1], tmp_path / "cells") == "done"
    run_cells(job(tmp_path, cells(2)))
    assert runs(tmp_path) == {"data": 1, "poisoned": 1, "audit": 2, "other": 1}
    # Going back costs nothing: the first outcome is still in the store.
    run_cells(job(tmp_path, cells(1)))
    assert runs(tmp_path)["audit"] == 2


def test_results_stand_without_the_store(tmp_path: Path) -> None:
    cells = [cell("a", stage("a"))]
    run_cells(job(tmp_path, cells))
    (tmp_path / "store").rename(tmp_path / "gone")
    assert run_cells(job(tmp_path, cells)).done == 1
    assert runs(tmp_path) == {"a": 1}


def test_version_and_label_of_a_stage() -> None:
    plain = Stage("make", {"name": "x"})
    assert Stage("make", {"name": "x"}, label="other", profile="other").key == plain.key
    assert Stage("make", {"name": "x"}, version=2).key != plain.key
    assert Stage("make", {"name": "y"}, {"input": plain}).key != Stage("make", {"name": "y"}).key


def test_a_failing_cell_is_recorded_and_the_rest_go_on(tmp_path: Path) -> None:
    bad = stage("bad", wrong=True)
    cells = [cell("a", stage("after", stage("between", bad))), cell("b", stage("fine"))]
    summary = run_cells(job(tmp_path, cells))
    assert (summary.done, summary.left) == (1, 0)
    assert summary.failed == ("a/0: bad: ValueError: bad went wrong",)
    assert runs(tmp_path) == {"bad": 1, "fine": 1}
    content = read_result(cells[0], tmp_path / "cells")
    assert content is not None
    assert content["error"] == {"stage": "bad", "message": "ValueError: bad went wrong"}
    run_cells(job(tmp_path, cells))
    assert runs(tmp_path)["bad"] == 1
    again = run_cells(job(tmp_path, cells), retry_failed=True)
    assert runs(tmp_path) == {"bad": 2, "fine": 1}
    assert len(again.failed) == 1


def test_a_stage_whose_summary_is_no_json_leaves_no_folder(tmp_path: Path) -> None:
    def broken(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
        (place.out / "file").write_text("x")
        return {"value": {1: 2}, "deep": _nested(3000)}

    only = Stage("broken", {})
    one = job(tmp_path, [cell("a", only)])
    done = run_cells(Job(**{**vars(one), "functions": {"broken": broken}}))
    assert len(done.failed) == 1
    assert not Store(tmp_path / "store").is_done(only)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_kill_9_loses_no_more_than_the_step_under_way(tmp_path: Path) -> None:
    config = {"steps": 40, "pause": 0.05, "fast_from": 30}
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_bench_runner as t
t.run_cells(t.job(Path(sys.argv[2]), [t.long_cell({config!r})]))
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)])
    deadline = time.monotonic() + 60
    while runs(tmp_path)["step"] < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    killed_after = runs(tmp_path)["step"]
    assert 5 <= killed_after < 40
    one = long_cell(config)
    assert not Store(tmp_path / "store").is_done(one.stages["end"])
    assert not (tmp_path / "cells" / one.file_name).exists()
    summary = run_cells(job(tmp_path, [one]))
    assert summary.done == 1
    content = read_result(one, tmp_path / "cells")
    assert content is not None
    assert content["result"]["end"]["resumed_at"] >= killed_after - 1
    assert 40 <= runs(tmp_path)["step"] <= 41
    assert not list((tmp_path / "store" / "partial").iterdir())


def test_workers_of_a_run_that_is_killed_end_too(tmp_path: Path) -> None:
    config = {"steps": 400, "pause": 0.05, "fast_from": 400}
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_bench_runner as t
if __name__ == "__main__":
    t.run_cells(t.job(Path(sys.argv[2]), [t.long_cell({config!r})]), workers=2)
"""
    script = tmp_path / "runs.py"
    script.write_text(program)
    process = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)])
    deadline = time.monotonic() + 60
    while runs(tmp_path)["step"] < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.5)
    stopped_at = runs(tmp_path)["step"]
    time.sleep(0.5)
    assert runs(tmp_path)["step"] == stopped_at < 400


def long_cell(config: Mapping[str, Any]) -> Cell:
    return cell("long", Stage("steps", config, label="long"))


def test_two_workers_share_the_work_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    shared = stage("shared", value=1, sleep=0.2)
    cells = [cell(str(i), stage(f"end{i}", shared, sleep=0.3)) for i in range(6)]
    cells.insert(2, cell("deadly", stage("deadly", shared, dies=True)))
    summary = run_cells(job(tmp_path, cells), workers=2)
    assert summary.done == 6
    assert len(summary.failed) == 1
    assert "SIGKILL" in summary.failed[0]
    assert set(runs(tmp_path).values()) == {1}
    processes = {line.split()[1] for line in (tmp_path / "trace").read_text().splitlines()}
    assert len(processes) >= 2
    assert str(os.getpid()) not in processes


def test_a_stage_that_another_runner_holds_is_left_to_it(tmp_path: Path) -> None:
    held, free = stage("held"), stage("free")
    cells = [cell("held", held), cell("free", free)]
    store = Store(tmp_path / "store")
    with store.locked(held) as ours:
        assert ours
        # The other runner never finishes within the budget: this one must do the rest and go home.
        summary = run_cells(job(tmp_path, cells, deadline=time.time() + 2.0))
    assert runs(tmp_path) == {"free": 1}
    assert (summary.done, summary.left) == (1, 1)


def test_budget_refuses_what_cannot_end_in_time(tmp_path: Path) -> None:
    slow = Stage("make", {"name": "slow"}, label="slow", profile="slow")
    cells = [cell("slow", slow), cell("quick", Stage("make", {"name": "quick"}, profile="quick"))]
    Store(tmp_path / "store")
    history = [{"profile": "slow", "kind": "make", "seconds": s} for s in (900.0, 1000.0, 4000.0)]
    lines = "".join(json.dumps(entry) + "\n" for entry in history) + '{"profile": "slow", "sec'
    (tmp_path / "store" / "history.jsonl").write_text(lines)
    short = run_cells(job(tmp_path, cells, deadline=time.time() + 900))
    assert runs(tmp_path) == {"quick": 1}
    assert (short.done, short.left, short.out_of_budget) == (1, 1, True)
    long = run_cells(job(tmp_path, cells, deadline=time.time() + 1100))
    assert (long.done, long.left, long.out_of_budget) == (2, 0, False)


def test_a_spent_budget_starts_nothing(tmp_path: Path) -> None:
    summary = run_cells(job(tmp_path, [cell("a", stage("a"))], deadline=time.time() - 1))
    assert (summary.done, summary.left, summary.out_of_budget) == (0, 1, True)
    assert not runs(tmp_path)


def test_an_executor_of_ones_own(tmp_path: Path) -> None:
    calls = []

    def cluster(worker: Any, job: Job, count: int) -> None:
        calls.append(count)
        worker(job)

    summary = run_cells(job(tmp_path, [cell("a", stage("a"))]), workers=7, executor=cluster)
    assert (calls, summary.done) == ([7], 1)


def test_only() -> None:
    cells = [cell(name, stage(name)) for name in ("A-1SC", "A-3SC", "B-1SC")]
    assert [each.name for each in select(cells, ["A-*/0"])] == ["A-1SC/0", "A-3SC/0"]
    assert [each.name for each in select(cells, ["B-*", "A-1*"])] == ["A-1SC/0", "B-1SC/0"]
    assert select(cells, []) == cells
    with pytest.raises(UntrojanError, match="matches none of 3 cells, such as 'A-1SC/0'"):
        select(cells, ["A-*", "Z*"])
