"""Attacks that compute before they poison, from a plan to its results."""

from __future__ import annotations

import json

import pytest

from crafted_data import coloured_splits
from untrojan.bench.cells import expand
from untrojan.bench.plan import read_plan
from untrojan.bench.runner import run_plan
from untrojan.data.save import save_npz
from untrojan.errors import UntrojanError

PLAN = """
name = "crafted"
title = "Crafted"
seeds = [0]
[data.colours]
[nets.small]
architecture = "cnn@0.1"
victim = "quick"
probe = "quick"
[recipes.quick]
epochs = 2
batch_size = 20
optimizer = "adam"
learning_rate = 3e-3
[attacks]
clean = { clean = true }
[attacks.label-consistent]
method = "label-consistent"
trigger = "patch"
trigger_options = { size = 2, place = "top-left" }
target = "c"
options = { share = 0.3, steps = 2 }
[attacks.hidden]
method = "hidden-trigger"
target = "c"
sources = ["a"]
count = 8
trigger_options = { size = 4, place = "random" }
options = { iterations = 3, update = "sign" }
[attacks.invisible]
method = "invisible"
target = 2
rate = 0.1
options = { bits = 3, epochs = 2, secret_only = 1, filters = 4, images = 60 }
[attacks.style]
method = "dfst-style"
target = "c"
rate = 0.1
options = { rounds = 0, epochs = 3 }
[defenses.none]
[defenses.clustering]
cleanser = "activation-clustering"
canaries = false
[defenses.rounds]
training = "none"
options = { epochs = 1 }
[[grid]]
attacks = ["label-consistent", "invisible", "style"]
defenses = ["none"]
[[grid]]
attacks = ["hidden"]
defenses = ["clustering", "rounds"]
"""


def test_a_plan_runs_them_all(tmp_path):
    plan, data = tmp_path / "plan.toml", tmp_path / "colours.npz"
    plan.write_text(PLAN)
    splits = coloured_splits(train=20, test=6)
    save_npz(data, splits.train, splits.test)
    summary = run_plan(plan, tmp_path / "out", data={"colours": str(data)})
    assert (summary.done, summary.failed, summary.left) == (5, (), 0)
    results = {
        name: json.loads((summary.results / f"colours__small__{name}__0.json").read_text())["result"]
        for name in (
            "label-consistent__none",
            "hidden__clustering",
            "hidden__rounds",
            "invisible__none",
            "style__none",
        )
    }
    for result in results.values():
        assert 0 <= result["undefended"]["attack_success"] <= 1
        assert 0 <= result["clean_model"]["benign_accuracy"] <= 1
    hidden = results["hidden__clustering"]
    assert {"cleansing", "detection", "retrained"} <= set(hidden)
    assert results["hidden__rounds"]["undefended"] == hidden["undefended"]
    assert 0 <= results["hidden__rounds"]["defended"]["attack_success"] <= 1


def test_an_attackers_own_model_is_the_victim(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    cells = {cell.axes["attack"]: cell for cell in expand(read_plan(plan))}
    kinds = {name: cells[name].stages["undefended"].inputs["model"].kind for name in ("style", "invisible")}
    assert kinds == {"style": "deliver", "invisible": "train"}


def test_a_hidden_trigger_is_learned_by_transfer_alone(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    cell, rounds = (cell for cell in expand(read_plan(plan)) if cell.axes["attack"] == "hidden")
    pretrained = cell.stages["undefended"].inputs["poisoned"].inputs["surrogate"]
    assert pretrained.inputs["poisoned"].config == {"attack": None, "without": ["a", "c"]}
    for role in ("undefended", "probe", "retrained", "clean_model"):
        assert cell.stages[role].inputs["model"].inputs["pretrained"].key == pretrained.key
    clean = cell.stages["clean_model"].inputs["model"].inputs["poisoned"]
    assert clean.config == {"attack": None, "only": ["a", "c"]}
    # Whose rounds follow the transfer; what trains anew would not be attacked at all.
    assert rounds.stages["defense"].inputs["start"].key == cell.stages["undefended"].inputs["model"].key
    plan.write_text(PLAN.replace('training = "none"\noptions = { epochs = 1 }', 'training = "abl"'))
    with pytest.raises(UntrojanError, match="hidden/rounds: abl trains anew"):
        expand(read_plan(plan))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('method = "invisible"', 'method = "visible"', "unknown attack 'visible'"),
        ("bits = 3", "bits = 0", "bits = 0"),
        ("bits = 3", "bites = 3", "no option 'bites'"),
        ('method = "invisible"', 'method = "invisible"\nall_to_all = true', "takes no all_to_all"),
        ('sources = ["a"]', 'sources = ["a", "b"]', "one source class"),
        ("size = 2, place", "size = 0, place", "size = 0"),
        ("clean = { clean = true }", "clean = { clean = true, options = {} }", "name it"),
        ('method = "invisible"', 'method = "invisible"\nnamed = "A-3SC"', "give one of"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, old, new, message):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(UntrojanError, match=message):
        read_plan(plan)
