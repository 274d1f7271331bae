"""The run folder: locked, whole or absent, resumable, and never another's."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.runs import RunFolder, csv_text, hardware, json_text, versions

CONFIG = {"seed": 3, "net": "cnn"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path; empty where there is no folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_results(folder: RunFolder) -> None:
    folder.write_json("metrics.json", {"a": 1})
    folder.write_csv("flagged.csv", ["id"], [["x/1.png"]])
    folder.write_text("truth/truth.json", "{}")
    folder.write_tensors("pattern.safetensors", {"pattern": torch.ones(3, 4, 4).permute(1, 2, 0)})


def interrupted_run(path: Path, error: BaseException, work: Callable[[RunFolder], object]) -> None:
    with RunFolder(path, "audit", CONFIG) as folder:
        work(folder)
        raise error


def write_checkpoint(folder: RunFolder) -> None:
    folder.use_data("train", images(0))
    (folder.work / "checkpoint").write_text("half way")


def images(value: int = 0) -> ImageSet:
    return ImageSet(
        torch.full((4, 1, 2, 2), value, dtype=torch.uint8),
        torch.tensor([0, 0, 1, 1]),
        ("a", "b"),
        numbered(4),
    )


def killed_run(path: Path, config: dict[str, object], work: str = "checkpoint") -> None:
    """Leave behind what kill -9 in the middle of a run leaves behind."""
    script = """
        import json, sys, time
        from untrojan.runs import RunFolder
        folder = RunFolder(sys.argv[1], "audit", json.loads(sys.argv[2]))
        folder.__enter__()
        folder.write_text("metrics.json", "half of the results")
        if sys.argv[3]:
            (folder.work / sys.argv[3]).write_text("a checkpoint")
        print("ready", flush=True)
        time.sleep(60)
    """
    arguments = [str(path), json.dumps(config), work]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def test_a_finished_run_holds_its_results_and_its_record_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with RunFolder(out, "audit", CONFIG) as folder:
        write_results(folder)
        folder.use_data("train", images())
        folder.record(device="cpu")
        assert contents(out).keys().isdisjoint({"metrics.json", "run.json"}), (
            "visible before the run succeeded"
        )
    names = {"metrics.json", "flagged.csv", "truth/truth.json", "pattern.safetensors"}
    assert contents(out).keys() == names | {"run.json"}
    record = json.loads((out / "run.json").read_text())
    assert set(record["files"]) == names
    assert record["config"] == CONFIG
    assert record["seed"] == 3
    assert record["data"]["train"]["fingerprint"] == images().fingerprint()
    assert record["device"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "memory_gib", "gpu"} <= record["hardware"].keys()
    assert record["cost"]["seconds"] >= 0


def test_a_failed_run_leaves_nothing_not_even_the_folders_it_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(UntrojanError, match="bad image"):
        interrupted_run(out, UntrojanError("bad image"), write_results)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_an_earlier_result_as_it_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "audit", CONFIG) as folder:
        write_results(folder)
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(tmp_path, KeyboardInterrupt(), lambda f: f.write_json("metrics.json", {"a": 2}))
    assert contents(tmp_path) == before


def test_the_same_run_again_replaces_its_results_and_drops_the_ones_it_no_longer_has(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "audit", CONFIG) as folder:
        write_results(folder)
    with RunFolder(tmp_path, "audit", CONFIG) as folder:
        folder.write_json("metrics.json", {"a": 2})
    assert contents(tmp_path).keys() == {"metrics.json", "run.json"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 2}
    assert not (tmp_path / "truth").exists()


def test_kill_9_then_the_same_command_resumes_and_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_run(out, CONFIG)
    assert "metrics.json" not in contents(out)
    with (
        pytest.raises(
            UntrojanError, match=r"unfinished run of another configuration \(seed 3 there, 4 here\)"
        ),
        RunFolder(out, "audit", {**CONFIG, "seed": 4}),
    ):
        pass
    assert (out / ".work" / "checkpoint").exists(), "a refused run must not touch another's checkpoint"
    with RunFolder(out, "audit", CONFIG) as folder:
        assert folder.resumed
        assert (folder.work / "checkpoint").read_text() == "a checkpoint"
        folder.write_json("metrics.json", {})
    assert contents(out).keys() == {"metrics.json", "run.json"}
    assert json.loads((out / "run.json").read_text())["resumed"] is True


def test_kill_9_before_the_first_checkpoint_leaves_a_folder_any_run_may_take(tmp_path: Path) -> None:
    killed_run(tmp_path / "out", CONFIG, work="")
    with RunFolder(tmp_path / "out", "audit", {**CONFIG, "seed": 4}) as folder:
        assert not folder.resumed


def test_overwrite_discards_another_configurations_checkpoint(tmp_path: Path) -> None:
    killed_run(tmp_path / "out", CONFIG)
    with RunFolder(tmp_path / "out", "audit", {**CONFIG, "seed": 4}, overwrite=True) as folder:
        assert not folder.resumed
        assert not (folder.work / "checkpoint").exists()


def test_an_interrupted_run_keeps_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(tmp_path, KeyboardInterrupt(), write_checkpoint)
    with RunFolder(tmp_path, "audit", CONFIG) as folder:
        assert folder.resumed
        assert (folder.work / "checkpoint").read_text() == "half way"


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(tmp_path, KeyboardInterrupt(), write_checkpoint)
    with RunFolder(tmp_path, "audit", CONFIG) as folder:
        folder.use_data("train", images(0))
        with pytest.raises(UntrojanError, match="other train data"):
            folder.use_data("train", images(1))


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "audit", CONFIG) as first:
        first.write_text("metrics.json", "{}")
        with (
            pytest.raises(UntrojanError, match=rf"in use by process {os.getpid()} on .*\(audit\)"),
            RunFolder(tmp_path, "audit", CONFIG, overwrite=True),
        ):
            pass
    assert contents(tmp_path).keys() == {"metrics.json", "run.json"}, "the second run disturbed the first"


def test_a_folder_with_other_files_is_refused_and_overwrite_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with (
        pytest.raises(UntrojanError, match=r"'thesis.txt'.*--overwrite"),
        RunFolder(tmp_path, "audit", CONFIG),
    ):
        pass
    assert contents(tmp_path).keys() == {"thesis.txt"}
    with RunFolder(tmp_path, "audit", CONFIG, overwrite=True) as folder:
        folder.write_json("metrics.json", {})
    assert contents(tmp_path).keys() == {"thesis.txt", "metrics.json", "run.json"}


def test_a_forged_record_cannot_have_files_outside_the_folder_deleted(tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.write_text("keep")
    with RunFolder(out, "audit", CONFIG) as folder:
        folder.write_json("metrics.json", {})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("keep")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    record = json.loads((out / "run.json").read_text())
    record["files"] += ["../precious", str(precious), "link/file", "link"]
    (out / "run.json").write_text(json.dumps(record))
    with RunFolder(out, "audit", CONFIG, overwrite=True) as folder:
        folder.write_json("metrics.json", {})
    assert precious.read_text() == "keep"
    assert (tmp_path / "elsewhere" / "file").read_text() == "keep"


@pytest.mark.parametrize("name", ["../x", "/x", "", ".work/x", "run.json", "a/../../x"])
def test_results_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"), RunFolder(tmp_path, "audit", CONFIG) as folder:
        folder.write_text(name, "")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for place in (tmp_path / "out", tmp_path / "out" / "inner"):
        with pytest.raises(UntrojanError, match="is not a folder"), RunFolder(place, "audit", CONFIG):
            pass


def test_a_disk_that_fills_up_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the run gets, there is either a whole result or no trace, and one line says why."""
    real, finished = os.fsync, []
    for room in range(12):
        left = room

        def fsync(handle: int) -> None:
            nonlocal left
            left -= 1
            # Folders are synced only once nothing needs new space.
            if left < 0 and not stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        out = tmp_path / str(room)
        monkeypatch.setattr(os, "fsync", fsync)
        said = ""
        try:
            with RunFolder(out, "audit", CONFIG) as folder:
                write_results(folder)
            finished.append(room)
        except UntrojanError as error:
            said = str(error)
        finally:
            monkeypatch.setattr(os, "fsync", real)
        assert ("run.json" in contents(out)) == (room in finished)
        if room not in finished:
            assert said.startswith("no space left")
            assert "\n" not in said
            assert not out.exists()
    # One state, four results, the state again, run.json.
    assert finished == list(range(7, 12))


@pytest.mark.parametrize("size", [10, 10_000, 1_000_000])
def test_libraries_own_words_for_a_full_disk(size: int, tmp_path: Path) -> None:
    """/dev/full is a disk without space: what the libraries that write for themselves raise is theirs."""
    content = {"weight": torch.zeros(size)}
    for write in (
        lambda: torch.save(content, "/dev/full"),
        lambda: torch.save(content, Path("/dev/full"), _use_new_zipfile_serialization=False),
        lambda: Path("/dev/full").write_bytes(b"x" * size),
    ):
        with pytest.raises(UntrojanError, match="no space left"), RunFolder(tmp_path / "o", "train", CONFIG):
            write()


def test_killed_while_the_results_are_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between any two renames leaves a folder that isn't taken for finished and can be used again."""
    real = Path.replace
    for survived in range(5):
        out = tmp_path / str(survived)
        folder = RunFolder(out, "audit", CONFIG)
        folder.__enter__()
        write_results(folder)
        done = 0

        def replace(self: Path, target: Path, out: Path = out, survived: int = survived) -> Path:
            nonlocal done
            if Path(target).is_relative_to(out / ".work"):
                return real(self, target)
            if done == survived:
                raise SystemExit("killed")
            done += 1
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        with pytest.raises(SystemExit):
            folder._publish()
        monkeypatch.setattr(Path, "replace", real)
        folder._lock.close()
        assert not (out / "run.json").exists()
        with RunFolder(out, "audit", CONFIG) as again:
            again.write_json("metrics.json", {"a": 2})
        assert contents(out).keys() == {"metrics.json", "run.json"}


def test_json_never_holds_what_json_does_not_know() -> None:
    value = {
        "nan": float("nan"),
        "tensor": torch.tensor([1.0, float("inf")]),
        "array": np.array([[1, 2]]),
        "half": np.float32(0.5),
        "path": Path("a/b"),
        "undecodable": "caf\udce9",
        3: (True, None),
    }
    text = json_text(value)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "tensor": [1.0, None],
        "array": [[1, 2]],
        "half": 0.5,
        "path": "a/b",
        "undecodable": "caf\udce9",
        "3": [True, None],
    }


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0"))), max_size=5))
def test_csv_cells_survive_and_never_start_a_formula(rows: list[tuple[str]]) -> None:
    text = csv_text(["id"], rows)
    read = list(csv.reader(io.StringIO(text, newline="")))[1:]
    read = [row or [""] for row in read]
    assert [row[0].removeprefix("'") for row in read] == [row[0].removeprefix("'") for row in rows]
    assert not any(row[0].startswith(("=", "+", "-", "@", "\t", "\r")) for row in read)


def test_csv_numbers_stay_numbers() -> None:
    assert csv_text(["value"], [[-1.5]]) == "value\n-1.5\n"


def test_versions_and_hardware_name_what_ran() -> None:
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert hardware()["cores"] >= 1
    assert hardware()["memory_gib"] > 0
