"""Plans with scans: of victims, of what a training defence made, of models infected by their trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from untrojan.bench.cells import expand
from untrojan.bench.measures import value_of
from untrojan.bench.plan import read_plan
from untrojan.bench.runner import run_plan
from untrojan.bench.stages import _detection, _of_a_clean_one
from untrojan.bench.table import render
from untrojan.data.save import save_npz
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError

PLAN = """
name = "scans"
title = "Scans"
seeds = [0]
[data.signs]
[nets.small]
architecture = "cnn@0.25"
victim = "quick"
probe = "quick"
[recipes.quick]
epochs = 6
batch_size = 16
learning_rate = 3e-3
[attacks]
patch = { trigger = "patch", rate = 0.1, target = 1 }
infected = { sdrm = { trigger = "patched", strength = 0.0 } }
clean = { clean = true, seed_offset = 5 }
[defenses.nc]
scan = { method = "neural-cleanse", share = 0.4 }
[defenses.none]
training = "none"
options = { epochs = 1 }
scan = { method = "natural", options = { sizes = [0.1], levels = ["penultimate"] } }
[[grid]]
defenses = ["nc"]
[[grid]]
attacks = ["clean"]
defenses = ["none"]
[[tables]]
name = "scans"
title = "Scans"
rows = ["attack", "defense"]
columns = [
  "detection.detected", "detection.right_target", "detection.false_alarm", "scan.anomaly_index",
  "scan.mean_max_reasr", "scan.seconds",
]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_a_scan_is_of_the_model_one_ends_with(tmp_path: Path) -> None:
    cells = {cell.name.split("/", 2)[2]: cell for cell in expand(read_plan(written(tmp_path, PLAN)))}
    assert set(cells) == {"patch/nc/0", "infected/nc/0", "clean/nc/0", "clean/none/0"}
    victim = cells["patch/nc/0"].stages["undefended"].inputs["model"]
    assert cells["patch/nc/0"].stages["scan"].inputs["model"].key == victim.key
    infected = cells["infected/nc/0"].stages
    assert infected["scan"].inputs["model"].key == infected["undefended"].key
    assert infected["scan"].config["seed"] == infected["scan"].config["options"]["seed"] == 0
    defended = cells["clean/none/0"].stages
    assert defended["scan"].inputs["model"].key == defended["defense"].key
    assert defended["scan"].config["options"]["seed"] == 5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('method = "neural-cleanse"', 'method = "xray"', "defenses.nc.scan: unknown scanner"),
        ("sizes = [0.1]", "sizes = [2.0]", "defenses.none.scan"),
        ("share = 0.4", "share = 0.0", "defenses.nc.scan.share"),
        (
            "[defenses.nc]",
            '[defenses.nc]\ncleanser = "spectral-signatures"',
            "defenses.nc: a scan is of a model",
        ),
    ],
)
def test_what_is_wrong_with_such_a_plan(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert PLAN.count(old) == 1
    with pytest.raises(UntrojanError, match=said):
        read_plan(written(tmp_path, PLAN.replace(old, new)))


def test_what_a_verdict_is_worth() -> None:
    def found(verdict: str, *targets: int) -> dict[str, Any]:
        return {"verdict": verdict, "targets": list(targets)}

    assert _detection(found("poisoned", 3), 3) == {
        "detected": True, "right_target": True, "undecided": False,
    }  # fmt: skip
    assert not _detection(found("poisoned", 3, 4), 3)["right_target"]
    assert _detection(found("poisoned", 3, 4), None)["right_target"]
    assert _detection(found("undecided"), 3)["undecided"]
    assert _of_a_clean_one(found("poisoned", 1)) == {"false_alarm": True, "undecided": False}


def test_models_are_scanned_and_told_of(tmp_path: Path) -> None:
    made = make_signs(num_classes=4, size=16, train_per_class=60, test_per_class=20, seed=0)
    save_npz(tmp_path / "signs.npz", made.train, made.test)
    plan, results = written(tmp_path, PLAN), tmp_path / "results"
    run_plan(plan, tmp_path / "store", results=results, data={"signs": str(tmp_path / "signs.npz")})
    files = {
        tuple(path.stem.split("__")[2:4]): json.loads(path.read_text()) for path in results.rglob("*.json")
    }
    assert {name for name, content in files.items() if content["status"] == "done"} == {
        ("patch", "nc"), ("infected", "nc"), ("clean", "nc"), ("clean", "none"),
    }  # fmt: skip
    for attack in ("patch", "infected"):
        result = files[attack, "nc"]["result"]
        assert result["detection"].keys() == {"detected", "right_target", "undecided"}
        assert result["scan"]["images"] == 96
    assert files["clean", "nc"]["result"]["detection"].keys() == {"false_alarm", "undecided"}
    fragile = value_of(files["clean", "none"], "scan.mean_max_reasr")
    assert fragile is not None
    assert 0 <= fragile <= 1
    assert "mean MAX-REASR" in render(plan, results, None)
