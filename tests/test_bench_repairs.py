"""Plans with repairs: what they expand to, whose images a repair gets, and one run to its tables."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from untrojan.attacks.poisoning import Poisoning
from untrojan.bench.cells import expand
from untrojan.bench.measures import value_of
from untrojan.bench.plan import read_plan
from untrojan.bench.published import read_published
from untrojan.bench.runner import run_plan
from untrojan.bench.stages import _Made, _untouched
from untrojan.bench.table import render
from untrojan.data.image_set import Splits
from untrojan.data.save import save_npz
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError

PLAN = """
name = "repairs"
title = "Repairs"
seeds = [0, 1]
[data.signs]
[nets.small]
architecture = "cnn@0.25"
victim = "quick"
probe = "quick"
published = "resnet20"
[recipes.quick]
epochs = 8
batch_size = 16
learning_rate = 3e-3
[attacks]
blend = { trigger = "blend", rate = 0.1, target = 1 }
clean = { clean = true, seed_offset = 5 }
[defenses.undefended]
[defenses.finetune]
repair = "finetune"
share = 0.2
options = { epochs = 1 }
robustness = true
distance = "mask"
[defenses.clp]
repair = "clp"
[[tables]]
name = "final"
title = "Final"
rows = ["attack", "defense"]
columns = ["final.attack_success", "final.benign_accuracy", "final.accuracy_cost", "repair.backwards"]
published = ["deck-table-04"]
published_data = "cifar10"
[[bounds]]
text = "robustness"
cells = { defenses = ["finetune"] }
measure = "robustness.cost"
statistic = "mean"
at_most = 1.0
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_repairs_share_the_victim_and_get_the_cells_seed(tmp_path: Path) -> None:
    cells = {cell.name: cell for cell in expand(read_plan(written(tmp_path, PLAN)))}
    mended, bare, given = (cells[f"signs/small/blend/{name}/1"] for name in ("finetune", "clp", "undefended"))
    assert mended.stages["repair"].inputs["victim"].key == given.stages["undefended"].inputs["model"].key
    assert mended.stages["repair"].config["options"]["seed"] == mended.stages["repair"].config["seed"] == 1
    assert cells["signs/small/clean/finetune/1"].stages["repair"].config["seed"] == 6
    assert bare.stages["repair"].config["share"] == 0.05
    assert set(bare.stages) == {"data", "undefended", "clean_model", "repair", "repaired"}
    assert mended.stages["effects"].inputs["defended"].key == mended.stages["repair"].key


def test_the_undefended_model_is_measured_once_for_all_repairs(tmp_path: Path) -> None:
    both = 'repair = "clp"\nrobustness = true\ndistance = "mask"\nshare = 0.2'
    plan = read_plan(written(tmp_path, PLAN.replace('repair = "clp"', both)))
    cells = {cell.name: cell for cell in expand(plan)}
    effects = [cells[f"signs/small/blend/{name}/1"].stages["effects"] for name in ("finetune", "clp")]
    assert effects[0].key != effects[1].key
    assert effects[0].inputs["gauged"].key == effects[1].inputs["gauged"].key


def test_a_repair_after_a_training_defence_mends_what_that_made(tmp_path: Path) -> None:
    robust = '[defenses.robust]\ntraining = "pgd"\n[defenses.clp]\nafter = "robust"'
    plan = PLAN.replace("[defenses.clp]", robust)
    cells = {cell.name: cell for cell in expand(read_plan(written(tmp_path, plan)))}
    mended, trained = (cells[f"signs/small/blend/{name}/1"] for name in ("clp", "robust"))
    victim = mended.stages["repair"].inputs["victim"]
    assert (victim.kind, victim.key) == ("defend", trained.stages["defense"].key)
    # It is what the repair's costs are counted from.
    assert mended.stages["undefended"].key == trained.stages["defended"].key
    assert mended.stages["repaired"].inputs["model"].key == mended.stages["repair"].key


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('repair = "clp"', 'repair = "clap"', "defenses.clp: unknown repair 'clap'.*moth"),
        ("epochs = 1 }", "epoch = 1 }", "defenses.finetune: .*no option 'epoch'"),
        ('repair = "clp"', 'repair = "clp"\ncleanser = "strip"', "defenses.clp: a repair stands alone"),
        ('repair = "clp"', "share = 0.1", "defenses.clp: after and share are a repair's"),
        ("robustness = true", 'after = "clp"', "finetune.after: 'clp' is no training defence.*has none"),
        ('repair = "clp"', "robustness = true", "defenses.clp: robustness and distance are of a repair or"),
        ("share = 0.2", "share = 0.0", "defenses.finetune.share"),
        ('distance = "mask"', "distance_options = { steps = 20 }", "distance_options say how a distance"),
        ("share = 0.2", "distance_options = { step = 20 }", "finetune.distance_options: .*no option 'step'"),
        ("share = 0.2", "distance_options = { seed = 1 }", "has no measure and no seed"),
    ],
)
def test_what_is_wrong_with_such_a_plan(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UntrojanError, match=said):
        read_plan(written(tmp_path, PLAN.replace(old, new, 1)))


def test_a_repair_learns_from_what_the_attacker_left_alone() -> None:
    data = make_signs(num_classes=4, size=16, train_per_class=40, test_per_class=4, seed=0)
    attack = Poisoning("blend", target=2, rate=0.15, clean_label=True)(data, 0)
    drawn = _untouched(_Made(data, attack), 0.2, seed=3)
    # The attacker had 24 of the target's forty.
    assert drawn.class_counts.tolist() == [8, 8, 8, 8]
    poisoned = set(attack.train.select(attack.record.poisoned).ids)
    assert not poisoned & set(drawn.ids)
    assert set(drawn.ids) == set(_untouched(_Made(data, attack), 0.2, seed=3).ids)
    assert set(drawn.ids) != set(_untouched(_Made(data, attack), 0.2, seed=4).ids)
    assert _untouched(_Made(data, attack), 1.0, seed=3).class_counts.tolist() == [40, 40, 16, 40]
    assert len(_untouched(_Made(Splits(data.train, data.test), None), 0.1, seed=0)) == 16


def test_a_cell_is_repaired_measured_and_told_of(tmp_path: Path) -> None:
    made = make_signs(num_classes=4, size=16, train_per_class=40, test_per_class=12, seed=0)
    save_npz(tmp_path / "signs.npz", made.train, made.test)
    fewer = PLAN.replace("[0, 1]", "[0]").replace(
        "robustness", "distance_options = { pairs = 6 }\nrobustness", 1
    )
    plan, results = written(tmp_path, fewer), tmp_path / "results"
    summary = run_plan(
        plan, tmp_path / "store", results=results, only=["*/blend/*"],
        data={"signs": str(tmp_path / "signs.npz")},
    )  # fmt: skip
    assert summary.failed == ()
    files = {path.stem.split("__")[3]: json.loads(path.read_text()) for path in results.rglob("*.json")}
    result = files["finetune"]["result"]
    assert result["repair"]["images"] == 32
    assert result["repair"]["backwards"] > 0 == files["clp"]["result"]["repair"]["backwards"]
    assert value_of(files["finetune"], "final.attack_success") == result["repaired"]["attack_success"]
    undefended = result["undefended"]["benign_accuracy"]
    cost = undefended - result["repaired"]["benign_accuracy"]
    assert value_of(files["finetune"], "final.accuracy_cost") == pytest.approx(cost)
    assert result["robustness"]["before"] <= undefended
    assert result["distance"]["pairs"] == 6
    assert (value_of(files["finetune"], "defense.seconds") or 0) >= result["repair"]["seconds"] > 0
    text = render(plan, results, None)
    assert "[84.92]" in next(line for line in text.splitlines() if "| blend | finetune |" in line)
    assert "[99.96]" in next(line for line in text.splitlines() if "| blend | undefended |" in line)


def test_published_figures_agree_with_the_averages_printed_below_them() -> None:
    printed = {
        ("deck-table-04", "none"): (86.42, 97.16),
        ("deck-table-04", "nad"): (None, 31.03),
        ("deck-table-04", "moth"): (84.00, None),
        ("deck-table-04", "deck"): (84.59, 4.90),
        ("deck-table-09", "fine-pruning"): (82.61, 49.09),
        ("deck-table-09", "mcr"): (82.99, 48.83),
    }
    for (name, defense), means in printed.items():
        entries = [entry for entry in read_published(name)["entries"] if entry["defense"] == defense]
        assert len(entries) == 16
        for key, mean in zip(("benign_accuracy", "attack_success"), means, strict=True):
            if mean is not None:
                assert statistics.fmean(entry[key] for entry in entries) == pytest.approx(mean, abs=0.006)
    # The supplement's averages are over two rows more.
    both = [
        *read_published("deck-table-09")["entries"],
        *read_published("deck-supplement-table-08")["entries"],
    ]
    rates = torch.tensor([entry["attack_success"] for entry in both]).view(18, 4).mean(0)
    assert rates.tolist() == pytest.approx([97.46, 43.75, 43.57, 4.55], abs=0.006)
