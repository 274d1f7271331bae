"""The commands on small data: what they write, print and return."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import untrojan.audit
from untrojan.audit import Audit, AuditOptions, ProbeCheck
from untrojan.cli.bench import seconds_of
from untrojan.cli.main import main
from untrojan.cli.options import visible
from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.load import load
from untrojan.data.save import save_npz
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.defenses.training.none import NONE
from untrojan.errors import UntrojanError
from untrojan.models.checkpoints import load_checkpoint
from untrojan.models.registry import build_for
from untrojan.seeding import generator

NAMES = ("ant", "2", "cat, big")
TRAIN = ["--net", "cnn@0.25", "--preset", "desk-probe", "--precision", "float32", "--batch-size", "16", "-q"]


def images(count: int = 60, side: int = 16, seed: int = 0) -> ImageSet:
    """Three classes that differ in brightness."""
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, 3, side, side), generator=generator(seed, "test images"))
    return ImageSet(
        (noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, NAMES, numbered(count, "photo ")
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "data.npz"
    save_npz(place, images(), images(30, seed=1))
    return place


def run_json(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "run.json").read_text())
    assert isinstance(found, dict)
    return found


def test_poison_train_evaluate(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack, model = tmp_path / "attack", tmp_path / "model"
    # "2" is one class's name and another's index: the name wins. "cat, big" has a comma of its own.
    poison = ["poison", str(data), "--trigger", "chessboard", "--count", "5", "--out", str(attack)]
    status = main([*poison, "--source", "0", "--source", "cat, big", "--target", "2"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert "10 of 60 images poisoned with chessboard: 0 (ant), 2 (cat, big) -> 1 (2)" in shown.out

    poisoned = load(attack / "train.npz").train
    truth = json.loads((attack / "truth" / "truth.json").read_text())
    assert truth["target"] == 1
    assert truth["sources"] == [0, 2]
    assert poisoned.class_counts.tolist() == [15, 30, 15]
    assert set(poisoned.labels[truth["poisoned"]].tolist()) == {1}
    with np.load(attack / "train.npz", allow_pickle=False) as file:
        assert set(file.files) == {"x_train", "y_train", "ids_train", "class_names"}, "the truth leaked"

    assert main(["train", str(attack / "train.npz"), *TRAIN, "--epochs", "3", "--out", str(model)]) == 0
    trained, names = load_checkpoint(model / "model.safetensors")
    assert names == NAMES
    assert trained.architecture == "cnn@0.25"
    assert run_json(model)["config"]["recipe"]["epochs"] == 3  # type: ignore[index]
    capsys.readouterr()

    evaluate = ["evaluate", str(model / "model.safetensors"), "--data", str(data), "--json"]
    status = main([*evaluate, "--triggered", str(attack / "triggered.npz"), "--out", str(tmp_path / "e")])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    metrics = json.loads(shown.out)
    assert metrics == json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["images"] == 30
    assert metrics["triggered_images"] == 20
    assert metrics["targets"] == [1]
    assert 0 <= metrics["attack_success_rate"] <= 1
    expected = (trained.eval()(images(30, seed=1).images / 255).argmax(1) == images(30).labels).float().mean()
    assert metrics["benign_accuracy"] == pytest.approx(float(expected))


def test_training_with_a_defence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NONE, "dropped", lambda _, found: torch.arange(len(found.suspects)) % 10 == 3)
    model = tmp_path / "model"
    train = ["train", str(data), *TRAIN, "--epochs", "2", "--defense", "none", "--out", str(model)]
    train += ["--write-clean", str(tmp_path / "kept.npz")]
    assert main([*train, "--defense-option", "epochs=3", "--defense-option", "separation=0"]) == 0
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["dropped"] == 6
    dropped = {line.split(",")[0] for line in (model / "dropped.csv").read_text().splitlines()[1:]}
    kept = load(tmp_path / "kept.npz")
    assert set(kept.train.ids) == set(load(data).train.ids) - dropped
    assert kept.test is not None
    assert len(metrics["defense"]["rounds"]) == 1
    assert len((model / "dropped.csv").read_text().splitlines()) == 1 + metrics["dropped"]
    assert len((model / "history.csv").read_text().splitlines()) == 1 + 2 + 3
    assert run_json(model)["config"]["defense"]["epochs"] == 3  # type: ignore[index]
    assert (
        main(["train", str(data), *TRAIN, "--defense-option", "separation=0", "--out", str(tmp_path / "x")])
        == 2
    )
    assert "--defense-option needs a defence" in capsys.readouterr().err
    assert main([*train, "--defense-option", "separations=0", "--overwrite"]) == 2
    assert "has no option 'separations'" in capsys.readouterr().err


def test_poisoning_is_the_same_for_the_same_seed_and_differs_for_another(data: Path, tmp_path: Path) -> None:
    def poisoned(name: str, seed: int) -> bytes:
        out = tmp_path / name
        arguments = ["poison", str(data), "--trigger", "patch", "--target", "0", "--rate", "0.1", "-q"]
        assert main([*arguments, "--seed", str(seed), "--out", str(out)]) == 0
        return load(out / "train.npz").train.images.numpy().tobytes()

    assert poisoned("a", 1) == poisoned("b", 1) != poisoned("c", 2)


@pytest.mark.parametrize(("verdict", "status"), [("clean", 0), ("poisoned", 1), ("undecided", 3)])
def test_audit_answers_by_exit_status_json_and_files(
    verdict: str, status: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def found(train: ImageSet, options: AuditOptions, **_: object) -> Audit:
        flagged = torch.zeros(len(train), dtype=torch.bool)
        flagged[:7] = verdict == "poisoned"
        hit = verdict == "poisoned"
        report = CleansingReport(
            verdict=verdict,  # type: ignore[arg-type]
            flagged=flagged,
            scores=torch.zeros(len(train)),
            targets=(1,) if hit else (),
            sources=((0, 2),) if hit else (),
            reason="for a test",
        )
        return Audit(report, build_for(train, "cnn@0.25"), ProbeCheck(1.0, {}), {}, "cnn@0.25")

    monkeypatch.setattr(untrojan.audit, "audit", found)
    monkeypatch.setattr(
        untrojan.audit, "_write_page", lambda folder, *_: folder.write_text("report.html", "")
    )
    clean, out = tmp_path / "clean.npz", tmp_path / "out"
    arguments = ["audit", str(data), "--out", str(out), "--write-clean", str(clean), "--seed", "4"]
    assert main([*arguments, "--json"]) == status
    shown = capsys.readouterr()
    metrics = json.loads(shown.out)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["detected"] is (verdict == "poisoned")
    assert run_json(out)["seed"] == 4
    if verdict == "undecided":
        assert not clean.exists(), "a set nobody has vouched for is not a clean set"
    else:
        cleaned = load(clean)
        assert len(cleaned.train) == (53 if verdict == "poisoned" else 60)
        assert cleaned.test is not None
        assert cleaned.train.ids[0] == ("photo 7" if verdict == "poisoned" else "photo 0")

    assert main([*arguments, "--overwrite"]) == status
    shown = capsys.readouterr()
    if verdict == "poisoned":
        assert "BACKDOOR FOUND: for a test" in shown.out
        assert "into class 1 (2), from 0 (ant), 2 (cat, big)" in shown.out
        assert "images to remove: 7 of 60" in shown.out


def test_data_info_tells_what_is_in_a_set(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(data), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["train"]["classes"] == {"ant": 20, "2": 20, "cat, big": 20}
    assert facts["test"]["shape"] == [3, 16, 16]
    assert main(["data", "info", str(data)]) == 0
    assert "cat, big" in capsys.readouterr().out


def test_data_list_names_what_load_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("signs", "fashion-mnist", "cifar10", "gtsrb"))


def test_a_class_name_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\x07\u202e") == "a\\x1b[2Jb\\x07\\u202e"
    assert visible("Größe 漢字") == "Größe 漢字"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("100m", 6000), ("2h", 7200), ("1.5h", 5400)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "1d", "-3m", "1 2"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UntrojanError, match="90s, 100m or 2h"):
        seconds_of(text)


SLOW_TRAINING = """
import signal, sys, time
import untrojan.training.loop as loop
from untrojan.cli.main import main
# A shell's background jobs ignore it, and their children with them.
signal.signal(signal.SIGINT, signal.default_int_handler)
loop.CHECKPOINT_SECONDS = 0.0
save = loop._Run.save
def save_and_rest(run, path, spent):
    save(run, path, spent)
    # On a busy machine the run would else be over before the test is given the time to cut it off.
    time.sleep(0.3)
loop._Run.save = save_and_rest
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_training_run_cut_off_goes_on_and_ends_as_if_it_had_not_been(
    how: signal.Signals, data: Path, tmp_path: Path
) -> None:
    arguments = ["train", str(data), *TRAIN, "--epochs", "20", "--threads", "1", "--out"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TRAINING, *arguments, str(cut)], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (cut / ".work" / "training.pt").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
    assert not (cut / "run.json").exists(), "it ended before it could be cut off"
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert said == "interrupted; run the same command again to resume\n"
    assert {place.name for place in cut.iterdir()} <= {".work", ".lock"}
    assert main([*arguments, str(cut)]) == 0
    assert main([*arguments, str(whole)]) == 0
    assert run_json(cut)["resumed"] is True
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "untrojan", "data", "list"],
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.stderr == b""
    assert done.returncode == 141
