"""A small experiment from a plan file to its table, with everything real."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from untrojan.bench import stages
from untrojan.bench.cells import expand
from untrojan.bench.graph import Place
from untrojan.bench.plan import read_plan
from untrojan.bench.runner import list_plan, run_plan
from untrojan.bench.store import Store
from untrojan.bench.table import render
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError

PLAN = """
name = "tiny"
title = "Tiny"
seeds = [0]
[data.tiny-signs]
train_per_class = 60
[nets.small]
architecture = "patch-cnn@0.25"
victim = "quick"
probe = "quick"
[recipes.quick]
epochs = 8
batch_size = 20
optimizer = "adam"
learning_rate = 3e-3
[attacks]
clean = { clean = true }
[attacks.square]
trigger = "square"
trigger_options = { amplitude = 255.0 }
sources = ["0"]
target = "1"
count = 30
[defenses.none]
[defenses.re]
cleanser = "reverse-engineering"
[[grid]]
attacks = ["clean"]
defenses = ["none"]
[[grid]]
attacks = ["square"]
[[tables]]
name = "all"
title = "All"
rows = ["attack", "defense"]
columns = ["undefended.attack_success", "undefended.benign_accuracy", "detection.detected", "audit.seconds"]
"""


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_signs(num_classes=4, size=16, train_per_class=70, test_per_class=20, seed=0)
    assert made.test is not None
    path = tmp_path_factory.mktemp("data") / "signs.npz"
    pairs = {"train": made.train, "test": made.test}
    arrays = {f"x_{name}": each.images.permute(0, 2, 3, 1).numpy() for name, each in pairs.items()}
    np.savez(path, **arrays, **{f"y_{name}": each.labels.numpy() for name, each in pairs.items()})
    return path


def test_a_plan_runs_resumes_and_gives_its_table(tmp_path: Path, signs: Path) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(PLAN)
    data = {"tiny-signs": str(signs)}
    assert {each["status"] for each in list_plan(plan, out, data=data)} == {"to do"}
    assert not out.exists()
    first = run_plan(plan, out, only=["*/square/none/*"], data=data)
    assert (first.done, first.failed, first.left) == (1, (), 0)
    summary = run_plan(plan, out, data=data)
    assert (summary.done, summary.failed, summary.left) == (3, (), 0)

    attacked = json.loads((summary.results / "tiny-signs__small__square__re__0.json").read_text())["result"]
    assert attacked["undefended"]["benign_accuracy"] > 0.5
    assert attacked["undefended"]["attack_success"] > 0.5
    assert attacked["undefended"] == attacked["probe"]
    assert set(attacked["detection"]) == {"detected", "right_target", "right_source", "undecided"}
    assert attacked["cleansing"]["removed"] == attacked["audit"]["flagged"]
    assert 0 <= attacked["retrained"]["attack_success"] <= 1
    if not attacked["audit"]["flagged"]:
        assert attacked["retrained"] == attacked["undefended"]
    clean = json.loads((summary.results / "tiny-signs__small__clean__none__0.json").read_text())["result"]
    assert "attack_success" not in clean["undefended"]

    trained = list((out / "store" / "done" / "train").iterdir())
    # Victim and probe have one recipe and so are one model, for each of the two sets.
    assert len(trained) == 2
    assert {each["status"] for each in list_plan(plan, out, data=data)} == {"done"}
    assert "| square | re |" in render(plan, None, out)


class Bench:
    """Finished stages of one attack and of the clean set, and room for made-up audits of them."""

    def __init__(self, folder: Path, signs: Path) -> None:
        plan, self.folder = folder / "plan.toml", folder
        plan.write_text(PLAN.replace("epochs = 8", "epochs = 1"))
        self.sources = {"tiny-signs": str(signs)}
        run_plan(plan, folder / "out", only=["*/none/*"], data=self.sources)
        store = Store(folder / "out" / "store")
        self.inputs = {}
        for cell in expand(read_plan(plan)):
            found = {stage.kind: store.folder(stage) for stage in cell.stages["undefended"].ancestry()}
            self.inputs[str(cell.axes["attack"])] = found
        self.train_config = json.loads((self.inputs["square"]["train"] / "stage.json").read_text())["config"]

    def place(self, attack: str, **summary: Any) -> Place:
        """Where a stage after an audit with this summary would work; ``flags`` are the rows it flagged."""
        found = self.inputs[attack]
        work = Path(tempfile.mkdtemp(dir=self.folder))
        flags = torch.zeros(240, dtype=torch.bool)
        flags[summary.pop("flags", [])] = True
        save_file({"flagged": flags}, work / "flags.safetensors")
        (work / "stage.json").write_text(json.dumps({"summary": summary}))
        (work / "out").mkdir()
        inputs = {"data": found["data"], "poisoned": found["poison"], "victim": found["train"], "audit": work}
        return Place(work / "out", work, inputs, self.sources)

    def poisoned_rows(self) -> list[int]:
        made = stages._poisoned(self.place("square"))
        assert made.attack is not None
        rows: list[int] = made.attack.record.poisoned.nonzero().flatten().tolist()
        return rows


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, signs: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), signs)


@pytest.mark.parametrize(
    ("verdict", "targets", "sources", "expected"),
    [
        ("poisoned", [1], [[0, 2]], (True, True, True, False)),
        ("poisoned", [1], [[2, 0]], (True, True, False, False)),
        ("poisoned", [2], [[0]], (True, False, False, False)),
        ("poisoned", [1, 2], [[0], [0]], (True, False, False, False)),
        ("clean", [], [], (False, False, False, False)),
        ("undecided", [], [], (False, False, False, True)),
    ],
)
def test_audits_are_held_against_the_truth(
    bench: Bench, verdict: str, targets: list[int], sources: list[list[int]], expected: tuple[bool, ...]
) -> None:
    place = bench.place("square", verdict=verdict, targets=targets, sources=sources)
    found = stages.score({}, place)["sections"]["detection"]
    names = ("detected", "right_target", "right_source", "undecided")
    assert tuple(found[name] for name in names) == expected


def test_cleansing_counts_and_false_alarms(bench: Bench) -> None:
    rows = bench.poisoned_rows()
    assert len(rows) == 30
    place = bench.place("square", verdict="poisoned", targets=[1], sources=[[0]], flags=rows[:24])
    rates = stages.score({}, place)["sections"]["cleansing"]
    assert (rates["true_positive_rate"], rates["false_positive_rate"], rates["missed"]) == (0.8, 0.0, 6)
    alarm = bench.place("clean", verdict="poisoned", targets=[1], sources=[[0]], flags=[0, 1, 2])
    found = stages.score({}, alarm)["sections"]
    assert found["detection"] == {"false_alarm": True, "undecided": False}
    assert found["cleansing"] == {"removed": 3, "false_positive_rate": 3 / 240}


def test_retraining_leaves_out_what_was_flagged(bench: Bench) -> None:
    config, rows = bench.train_config, bench.poisoned_rows()
    cleansed, kept = bench.place("square", flags=rows), bench.place("square")
    assert stages.retrain(config, cleansed)["images"] == 240 - 30
    assert (cleansed.out / stages.MODEL).exists()
    # Nothing flagged: nothing retrained, the model is the victim.
    assert stages.retrain(config, kept) == {"unchanged": True}
    assert stages._model_folder(kept.out).parts[-2:] == bench.inputs["square"]["train"].parts[-2:]


def test_who_is_told_the_target_removes_nothing_elsewhere(bench: Bench) -> None:
    """Flags in every class, as of methods that detect nothing: only the target's are taken."""
    made = stages._poisoned(bench.place("square"))
    assert made.attack is not None
    of_target = int((made.train.labels == made.attack.record.target).sum())
    place = bench.place("square", flags=list(range(240)))
    told = bench.train_config | {"target_known": True}
    assert stages.retrain(told, place)["images"] == 240 - of_target
    # A clean set has no target.
    clean = bench.place("clean", flags=[0, 1, 2])
    assert stages.retrain(told, clean) == {"unchanged": True}


def test_wrong_data_are_found_before_anything_runs(tmp_path: Path, signs: Path) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(PLAN.replace('target = "1"', 'target = "stop"'))
    with pytest.raises(UntrojanError, match=r"attacks.square on data 'tiny-signs': no class 'stop'"):
        run_plan(plan, out, data={"tiny-signs": str(signs)})
    plan.write_text(PLAN)
    with pytest.raises(UntrojanError):
        run_plan(plan, out, data={"tiny-signs": str(tmp_path / "nothing.npz")})
    with pytest.raises(UntrojanError, match="--workers must be at least 1"):
        run_plan(plan, out, workers=0, data={"tiny-signs": str(signs)})
    assert not out.exists()


def test_data_that_changed_are_refused(tmp_path: Path, signs: Path) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(PLAN.replace("epochs = 8", "epochs = 1"))
    run_plan(plan, out, only=["*/clean/none/*"], data={"tiny-signs": str(signs)})
    other = tmp_path / "other.npz"
    with np.load(signs) as known:
        arrays = dict(known)
    arrays["x_train"] = 255 - arrays["x_train"]
    np.savez(other, **arrays)
    summary = run_plan(plan, out, only=["*/square/none/*"], data={"tiny-signs": str(other)})
    assert len(summary.failed) == 1
    assert "are not those this folder was begun with" in summary.failed[0]
