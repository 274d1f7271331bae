"""Plans with federations: what they expand to, and one run on Flower's engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from untrojan.bench.cells import expand
from untrojan.bench.measures import value_of
from untrojan.bench.plan import read_plan
from untrojan.bench.runner import run_plan
from untrojan.data.save import save_npz
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError

PLAN = """
name = "federated"
title = "Federated"
seeds = [3]
[data.signs]
[nets.small]
architecture = "cnn@0.25"
victim = "local"
probe = "local"
[recipes.local]
epochs = 1
batch_size = 16
optimizer = "sgd"
learning_rate = 0.02
[attacks.distributed.federated]
rounds = 2
clients = 3
malicious = 1
attack = { epochs = 1, target = 1 }
[defenses.undefended]
[defenses.none]
training = "none"
options = { epochs = 1 }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_the_defence_is_a_part_of_the_federation(tmp_path: Path) -> None:
    undefended, defended = expand(read_plan(written(tmp_path, PLAN)))
    assert list(undefended.stages) == list(defended.stages) == ["data", "federated"]
    assert undefended.stages["federated"].config["defense"] is None
    assert defended.stages["federated"].config["defense"]["seed"] == 3
    assert defended.stages["federated"].config["federated"]["attack"] == {"epochs": 1, "target": 1}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("malicious = 1", "malicious = 4", "attacks.distributed.federated: 4 malicious clients of 3"),
        ("target = 1", "goal = 1", "attacks.distributed.federated: .*no option 'goal'"),
        ("epochs = 1, target", 'trigger = "strip", target', "attacks.distributed.federated: unknown trigger"),
        ('training = "none"', 'training = "dbd"', "distributed/none: federations go with training"),
        ('training = "none"', 'repair = "finetune"', "distributed/none: federations go with training"),
    ],
)
def test_what_is_wrong_with_such_a_plan(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = PLAN.replace(old, new, 1)
    if "none" not in new:
        text = text.replace("options = { epochs = 1 }", "")
    with pytest.raises(UntrojanError, match=said):
        expand(read_plan(written(tmp_path, text)))


def test_a_federation_is_run_and_told_of(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    made = make_signs(num_classes=4, size=16, train_per_class=30, test_per_class=20, seed=0)
    save_npz(tmp_path / "signs.npz", made.train, made.test)
    plan, results, data = written(tmp_path, PLAN), tmp_path / "results", str(tmp_path / "signs.npz")
    # Ray leaves a process behind for the interpreter's end.
    command = [
        *(sys.executable, "-m", "untrojan", "bench", "run", str(plan), "--quiet", "--only", "*/none/*"),
        *("--out", str(tmp_path / "store"), "--results", str(results), "--data", f"signs={data}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = results.rglob("*.json")
    content = json.loads(path.read_text())
    assert content["status"] == "done", content
    before, after = content["result"]["undefended"], content["result"]["defended"]
    # Two rounds, the analysis, and one more.
    assert (before["round"], after["round"]) == (2, 4)
    assert value_of(content, "final.attack_success") == after["attack_success"]
    cost = before["benign_accuracy"] - after["benign_accuracy"]
    assert value_of(content, "final.accuracy_cost") == pytest.approx(cost)
    with pytest.raises(UntrojanError, match=r"attacks.distributed on data 'signs': .*9"):
        run_plan(
            written(tmp_path, PLAN.replace("target = 1", "target = 9")), tmp_path / "other", results=results,
            data={"signs": data},
        )  # fmt: skip
