"""Plans with models that their trainer infected, and detectors that are asked about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from untrojan.bench import stages
from untrojan.bench.cells import expand
from untrojan.bench.measures import BESIDE_REGULAR
from untrojan.bench.plan import ExposureEntry, read_plan
from untrojan.bench.runner import run_plan
from untrojan.bench.table import outcomes_of, render
from untrojan.data.save import save_npz
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError

CLEAN = "[attacks]\nclean = { clean = true, seed_offset = 100 }"
PLAN = """
name = "infected"
title = "Infected"
seeds = [0]
[data.signs]
[nets.small]
architecture = "cnn@0.25"
victim = "quick"
probe = "quick"
[recipes.quick]
epochs = 2
batch_size = 64
[attacks]
rbt = { sdrm = { trigger = "patched", strength = 0.0 } }
sdrm-a = { sdrm = { trigger = "patched", strength = 0.3 } }
[defenses.none]
[defenses.ac]
cleanser = "activation-clustering"
options = { components = 4, level = "s2" }
exposure = { clean = 20, ratio = 0.5 }
[defenses.sr]
cleanser = "subspace-reconstruction"
exposure = { clean = 20, ratio = 1.0, trusted_share = 0.1 }
[defenses.consistency]
cleanser = "consistency"
exposure = { clean = 20, ratio = 0.5, trusted_share = 0.5, trusted_as = "predicted" }
[defenses.consistency-unseen]
cleanser = "consistency"
exposure = { clean = 20, ratio = 0.5, trusted_share = 0.25, trusted_from = "test" }
[defenses.pruned]
pruning = { step = 0.25, images = 20 }
[[grid]]
attacks = ["rbt", "sdrm-a"]
[[tables]]
name = "differences"
title = "Differences"
cells = { defenses = ["none"] }
columns = ["undefended.attack_success", "undefended.mmd_s3", "undefended.intra_s3"]
[[tables]]
name = "exposure"
title = "Exposure"
cells = { defenses = ["ac", "sr"] }
rows = ["attack", "defense"]
columns = ["exposure.f1", "exposure.auc", "exposure.detected", "exposure.false_alarm"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_detectors_share_the_infected_model(tmp_path: Path) -> None:
    cells = {cell.name: cell for cell in expand(read_plan(written(tmp_path, PLAN)))}
    assert len(cells) == 2 * 6
    ac, sr, none = (cells[f"signs/small/sdrm-a/{name}/0"] for name in ("ac", "sr", "none"))
    assert ac.stages["undefended"].key == sr.stages["undefended"].key == none.stages["undefended"].key
    assert ac.stages["exposure"].key != sr.stages["exposure"].key
    assert list(none.stages) == ["data", "undefended"]
    other = cells["signs/small/rbt/ac/0"]
    assert other.stages["undefended"].key != ac.stages["undefended"].key
    assert ac.stages["undefended"].config["method"]["strength"] == 0.3
    assert ac.stages["exposure"].config["options"]["level"] == "s2"
    assert not {"trusted_as", "trusted_from"} & sr.stages["exposure"].config.keys()
    unseen = cells["signs/small/rbt/consistency-unseen/0"].stages["exposure"].config
    assert (unseen["trusted_from"], "trusted_as" in unseen) == ("test", False)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'trigger = "patched", strength = 0.3',
            'trigger = "stamped"',
            "attacks.sdrm-a.sdrm: unknown trigger",
        ),
        ("strength = 0.3", "strength = -1.0", "attacks.sdrm-a.sdrm.strength"),
        ("strength = 0.3", 'strength = 0.3, kernel = "GK9"', "attacks.sdrm-a.sdrm: .*kernel"),
        ("ratio = 0.5", "ratio = 0", "defenses.ac.exposure.ratio"),
        (
            'cleanser = "subspace-reconstruction"',
            'cleanser = "reverse-engineering"',
            "defenses.sr.exposure: only a cleanser that looks at features",
        ),
    ],
)
def test_what_is_wrong_with_such_a_plan(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert PLAN.count(old) >= 1
    with pytest.raises(UntrojanError, match=said):
        read_plan(written(tmp_path, PLAN.replace(old, new, 1)))


def test_other_attacks_are_kept_apart(tmp_path: Path) -> None:
    other = '[attacks]\nother = { trigger = "patch", rate = 0.1, target = 0 }'
    text = PLAN.replace("[attacks]", other).replace('attacks = ["rbt", "sdrm-a"]', "")
    plan = read_plan(written(tmp_path, text))
    with pytest.raises(UntrojanError, match=r"other/ac: infected models \(sdrm\) go with exposure"):
        expand(plan)


def test_an_infected_model_is_trained_asked_and_told_of(tmp_path: Path) -> None:
    made = make_signs(num_classes=4, size=16, train_per_class=60, test_per_class=40, seed=0)
    save_npz(tmp_path / "signs.npz", made.train, made.test)
    plan, results = written(tmp_path, PLAN), tmp_path / "results"
    run_plan(plan, tmp_path / "store", results=results, data={"signs": str(tmp_path / "signs.npz")})
    files = {
        tuple(path.stem.split("__")[2:4]): json.loads(path.read_text()) for path in results.rglob("*.json")
    }
    assert len(files) == 12
    undefended = files["sdrm-a", "none"]["result"]["undefended"]
    assert undefended == files["sdrm-a", "sr"]["result"]["undefended"]
    assert 0 <= undefended["attack_success"] <= 1
    assert {"mmd_s3", "intra_s3", "inter_s3", "mmd_unbiased_s3"} <= undefended.keys()
    asked = files["sdrm-a", "sr"]["result"]["exposure"]
    assert 0 < asked["clean"] <= 20
    assert isinstance(asked["detected"], bool)
    # Of 40 test images of each class, 15 are the defender's.
    unseen = files["sdrm-a", "consistency-unseen"]["result"]["exposure"]
    assert 0 < unseen["clean"] <= 20
    folders = {path.name: path for path in (tmp_path / "store").glob("store/done/*/*")}
    stage = next(c for c in expand(read_plan(plan)) if c.axes["defense"] == "none").stages["undefended"]
    asked_for = ExposureEntry(clean=20, ratio=0.5, trusted_share=0.25, trusted_from="test")
    question = stages._question(
        folders[stage.key],
        True,
        folders[stage.inputs["data"].key],
        (("signs", str(tmp_path / "signs.npz")),),
        asked_for,
        0,
    )
    trusted = question.attacked.trusted
    assert trusted is not None
    assert len(trusted.data) == 4 * 15
    known = {image.numpy().tobytes() for image in trusted.data.images}
    assert not known & {image.numpy().tobytes() for image in question.attacked.data.images}
    pruned = files["rbt", "pruned"]["result"]["pruning"]
    shares = [look["pruned"] for look in pruned["curve"]]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert pruned["attack_success"] <= pruned["curve"][0]["trigger_success"]
    assert pruned["benign_accuracy"] >= pruned["curve"][0]["benign_accuracy"] - 0.05
    text = render(plan, results, None)
    assert "sdrm-a" in text
    assert "MMD² s3" in text


REPAIRS = """
[defenses.none]
[defenses.under-none]
training = "none"
options = { epochs = 1, split = "all-at-once", separation = 0.0 }
[defenses.mended]
repair = "finetune"
options = { epochs = 1 }
share = 0.2
[[grid]]
"""


def with_repairs(text: str) -> str:
    """The plan with models that are trained for longer, and with what mends them in place of detectors."""
    before, rest = text.split("[defenses.none]")
    return (
        before.replace("epochs = 2", "epochs = 8\nlearning_rate = 3e-3") + REPAIRS + rest.split("[[grid]]")[1]
    )


def test_an_infected_model_is_mended_and_trained_on(tmp_path: Path) -> None:
    made = make_signs(num_classes=4, size=16, train_per_class=60, test_per_class=40, seed=0)
    save_npz(tmp_path / "signs.npz", made.train, made.test)
    text = with_repairs(PLAN.split("[[tables]]")[0])
    plan, results = written(tmp_path, text), tmp_path / "results"
    run_plan(
        plan,
        tmp_path / "store",
        results=results,
        only=["*/rbt/*"],
        data={"signs": str(tmp_path / "signs.npz")},
    )
    files = {
        path.stem.split("__")[3]: json.loads(path.read_text())["result"] for path in results.rglob("*.json")
    }
    under, mended = files["under-none"], files["mended"]
    assert under["undefended"] == mended["undefended"] == files["none"]["undefended"]
    # Both are measured by the infected model's own trigger, and what is dropped is held against its set.
    assert {"attack_success", "poison_fit"} <= mended["repaired"].keys() & under["defended"].keys()
    assert under["dropping"]["removed"] == under["defense"]["dropped"] > 0
    assert 0 <= under["dropping"]["true_positive_rate"] <= 1
    # A fifth of 240 images and of the poisoned ones beside them, from those that carry no trigger.
    assert 48 <= mended["repair"]["images"] <= 56


def test_no_other_training_defence_goes_on_from_a_model(tmp_path: Path) -> None:
    text = with_repairs(PLAN).replace('training = "none"', 'training = "abl"')
    text = text.replace('options = { epochs = 1, split = "all-at-once", separation = 0.0 }', "")
    with pytest.raises(UntrojanError, match=r'rbt/under-none: .*training = "none"'):
        expand(read_plan(written(tmp_path, text.split("[[tables]]")[0])))


def test_a_clean_control_can_only_alarm(tmp_path: Path) -> None:
    made = make_signs(num_classes=4, size=16, train_per_class=30, test_per_class=40, seed=0)
    save_npz(tmp_path / "signs.npz", made.train, made.test)
    text = PLAN.replace("[attacks]", CLEAN).replace('attacks = ["rbt", "sdrm-a"]', 'attacks = ["clean"]')
    plan, results = written(tmp_path, text.replace('["ac", "sr"]', '["ac"]')), tmp_path / "results"
    plan.write_text(plan.read_text().replace("[[grid]]", '[[grid]]\ndefenses = ["none", "ac", "sr"]'))
    run_plan(plan, tmp_path / "store", results=results, data={"signs": str(tmp_path / "signs.npz")})
    files = {path.stem.split("__")[3]: json.loads(path.read_text()) for path in results.rglob("*.json")}
    assert files.keys() == {"none", "ac", "sr"}
    for name in ("ac", "sr"):
        assert files[name]["status"] == "done"
        exposed = files[name]["result"]["exposure"]
        assert exposed.keys() == {"false_alarm", "clean"}
        assert isinstance(exposed["false_alarm"], bool)
        assert 0 < files[name]["result"]["undefended"]["benign_accuracy"] <= 1


def test_infected_models_stand_beside_their_regular_twin(tmp_path: Path) -> None:
    """Cuts are shares of the twin's MMD², costs are points below it; another trigger has another twin."""
    more = 'other = { sdrm = { trigger = "blended", strength = 0.3 } }\n[defenses.none]'
    text = PLAN.replace("[defenses.none]", more).replace('attacks = ["rbt", "sdrm-a"]', "")
    plan = read_plan(written(tmp_path, text))
    figures = {
        "rbt": {"attack_success": 1.0, "benign_accuracy": 0.9, "mmd_s1": 0.8, "mmd_s2": 0.0, "inter_s1": 0.3},
        "sdrm-a": {
            "attack_success": 0.95,
            "benign_accuracy": 0.91,
            "mmd_s1": 0.2,
            "mmd_s2": 0.1,
            "inter_s1": 0.3,
        },
        "other": {"attack_success": 0.95, "benign_accuracy": 0.91, "mmd_s1": 0.2},
    }
    cells = [cell for cell in expand(plan) if cell.axes["defense"] == "none"]
    folder = tmp_path / "cells"
    folder.mkdir()
    for cell in cells:
        result = {"undefended": figures[str(cell.axes["attack"])]}
        content = {"key": cell.key, "status": "done", "axes": dict(cell.axes), "result": result}
        (folder / cell.file_name).write_text(json.dumps(content))
    values = {str(each.cell.axes["attack"]): each.values for each in outcomes_of(plan, cells, folder)}
    assert values["sdrm-a"]["undefended.mmd_reduction_s1"] == pytest.approx(0.75)
    assert values["sdrm-a"]["undefended.attack_success_cost"] == pytest.approx(0.05)
    assert values["sdrm-a"]["undefended.benign_accuracy_cost"] == pytest.approx(-0.01)
    assert "undefended.mmd_reduction_s2" not in values["sdrm-a"]
    assert values["rbt"]["undefended.mmd_reduction_s1"] == 0
    above = {name: each.get("undefended.above_inter_s1") for name, each in values.items()}
    assert above == {"rbt": 1.0, "sdrm-a": 0.0, "other": None}
    assert not values["other"].keys() & BESIDE_REGULAR.keys()


def test_a_model_made_again_elsewhere_is_no_twin_where_another_was_made_along(tmp_path: Path) -> None:
    """A seed gives another model on another machine: cells are compared with those of their defence."""
    plan = read_plan(written(tmp_path, PLAN.replace('attacks = ["rbt", "sdrm-a"]', "")))
    chosen = [cell for cell in expand(plan) if cell.axes["attack"] in ("rbt", "sdrm-a")]
    first, other = sorted({str(cell.axes["defense"]) for cell in chosen if "exposure" not in cell.stages})[:2]
    cells = [cell for cell in chosen if cell.axes["defense"] in (first, other)]
    successes = {("rbt", first): 1.0, ("rbt", other): 0.8, ("sdrm-a", first): 0.9, ("sdrm-a", other): 0.8}
    folder = tmp_path / "cells"
    folder.mkdir()
    for cell in cells:
        success = successes[str(cell.axes["attack"]), str(cell.axes["defense"])]
        result = {"undefended": {"attack_success": success, "benign_accuracy": 0.9}}
        content = {"key": cell.key, "status": "done", "axes": dict(cell.axes), "result": result}
        (folder / cell.file_name).write_text(json.dumps(content))
    costs = {
        str(each.cell.axes["defense"]): each.values["undefended.attack_success_cost"]
        for each in outcomes_of(plan, cells, folder)
        if each.cell.axes["attack"] == "sdrm-a"
    }
    assert costs == {first: pytest.approx(0.1), other: pytest.approx(0.0)}
