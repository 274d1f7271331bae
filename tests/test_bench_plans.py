"""Plan files, the cells they expand to, and the published figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from untrojan.bench.cells import expand
from untrojan.bench.graph import Cell, stages_of
from untrojan.bench.measures import MEASURES
from untrojan.bench.plan import read_plan, takes
from untrojan.bench.published import PUBLISHED, published_figure, read_published
from untrojan.errors import UntrojanError

PLANS = sorted((Path(__file__).parents[1] / "plans").glob("*.toml"))

SMALL = """
name = "small"
title = "Small"
seeds = [0, 1]
[data.signs]
[nets.small]
architecture = "patch-cnn"
victim = "quick"
probe = "quick-probe"
[recipes.quick]
epochs = 1
flip = true
[recipes.quick-probe]
epochs = 1
[attacks]
A-1SC = { named = "A-1SC" }
cross = { trigger = "cross", sources = [0], target = 1, count = 5 }
clean = { clean = true }
[defenses.none]
[defenses.re]
cleanser = "reverse-engineering"
[defenses.re-wide]
cleanser = "reverse-engineering"
options = { flip_fraction = 0.9 }
retrain = false
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def cells_of(folder: Path, text: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in expand(read_plan(written(folder, text)))}


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ("seeds = [0, 1]", "seeds = []", "seeds", "at least 1 item"),
        ("seeds = [0, 1]", "sedes = [0, 1]", "plan", "'sedes'.*choose one of name, title"),
        ('title = "Small"', "", "title", "missing"),
        ("patch-cnn", "patch-cmm", "nets.small.architecture", "unknown architecture 'patch-cmm'.*lenet5"),
        (
            'victim = "quick"',
            'victim = "slow"',
            "nets.small.victim",
            "'slow'.*quick, quick-probe.*paper-victim",
        ),
        ("epochs = 1\nflip", "epochs = 0\nflip", "nets.small.victim", "epochs = 0 is not valid"),
        ("flip = true", "flop = true", "nets.small.victim", "no option 'flop'.*it takes epochs"),
        ('named = "A-1SC"', 'named = "Z-1SC"', "attacks.A-1SC", "unknown attack 'Z-1SC'.*A-3SC"),
        ('trigger = "cross"', 'trigger = "crass"', "attacks.cross", "unknown trigger 'crass'.*chessboard"),
        ("count = 5", "count = 0", "attacks.cross.count", "greater than or equal to 1"),
        ("count = 5", "count = 5, rate = 0.1", "attacks.cross", "either a count.*or a rate"),
        ("count = 5", "amount = 5", "attacks.cross", "'amount'.*choose one of"),
        ("target = 1", "target = 0", "attacks.cross", "is the target and can't be a source"),
        ("clean = true", 'clean = true, named = "A-1SC"', "attacks.clean", "give one of clean"),
        ('"reverse-engineering"\n[', '"re"\n[', "defenses.re", "unknown cleanser 're'.*reverse-engineering"),
        (
            "flip_fraction = 0.9",
            "flip_fraction = 1.9",
            "defenses.re-wide",
            "flip_fraction = 1.9 is not valid",
        ),
        ("epochs = 1\nflip", "epochs = true\nflip", "nets.small.victim", "= true is not valid: .*a number"),
        ("flip_fraction = 0.9", "pi = 0.9", "defenses.re-wide", "no option 'pi'.*flip_fraction"),
        ("[defenses.none]", '[[grid]]\nattacks = ["B*"]\n[defenses.none]', "grid.0.attacks", "none of A-1SC"),
        ("[defenses.none]", '[defenses."a/b"]\n[defenses.none]', "defenses.a/b", "pattern"),
        (
            "[defenses.none]",
            '[[tables]]\nname = "t"\ntitle = "T"\ncolumns = ["asr"]\n[defenses.none]',
            "tables.0",
            "unknown measure 'asr'.*undefended.attack_success",
        ),
        (
            "[defenses.none]",
            '[[bounds]]\ntext = "b"\nmeasure = "audit.flagged"\nstatistic = "mean"\n[defenses.none]',
            "bounds.0",
            "either at_least or at_most",
        ),
    ],
)
def test_what_is_wrong_with_a_plan(tmp_path: Path, old: str, new: str, key: str, said: str) -> None:
    assert SMALL.count(old) >= 1
    path = written(tmp_path, SMALL.replace(old, new, 1))
    with pytest.raises(UntrojanError, match=rf"(?s)plan.toml: {key}: .*{said}") as error:
        read_plan(path)
    assert "\n" not in str(error.value)


def test_unreadable_plans(tmp_path: Path) -> None:
    with pytest.raises(UntrojanError, match=r"cannot read plan .*gone\.toml"):
        read_plan(tmp_path / "gone.toml")
    with pytest.raises(UntrojanError, match="is not a TOML file"):
        read_plan(written(tmp_path, "name = "))
    with pytest.raises(UntrojanError, match=r"--data cifar=...: the plan's data are signs"):
        read_plan(written(tmp_path, SMALL)).resolve_sources({"cifar": "x"})


def test_cells_and_what_they_share(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, SMALL)
    assert len(cells) == 3 * 3 * 2
    assert [cell.axes["seed"] for cell in cells.values()] == [0] * 9 + [1] * 9
    stages = stages_of(cells.values())
    kinds = [stage.kind for stage in stages]
    # Victim and probe of 3 sets and 2 seeds; the two defences share them, and "none" needs no probe.
    assert kinds.count("train") == 3 * 2 * 2
    assert kinds.count("poison") == 2 * 2 + 1
    assert kinds.count("audit") == 3 * 2 * 2
    assert kinds.count("retrain") == 3 * 2
    assert kinds.count("data") == 1
    none = cells["signs/small/cross/none/0"]
    assert list(none.stages) == ["data", "undefended", "clean_model"]
    assert none.stages["undefended"].key == cells["signs/small/cross/re/0"].stages["undefended"].key
    assert len({cell.key for cell in cells.values()}) == len(cells)


def keys(cell: Cell) -> Mapping[tuple[str, str], str]:
    """Key by kind and label, but for the clean control's, which no attack changes."""
    of_control = {stage.key for stage in cell.stages["clean_model"].inputs["model"].ancestry()}
    own = [s for s in cell.all_stages if s.kind == "data" or s.key not in of_control]
    return {(stage.kind, stage.label): stage.key for stage in own}


@pytest.mark.parametrize(
    ("old", "new", "kept", "changed"),
    [
        ("flip = true", "flip = true\nrotation = 5.0", {"data", "poison", "audit", "score"}, {"retrain"}),
        (
            "[recipes.quick-probe]",
            "[recipes.quick-probe]\nrotation = 5.0",
            {"data", "poison"},
            {"audit", "score"},
        ),
        ("count = 5", "count = 6", {"data"}, {"poison", "train", "audit", "score", "retrain", "evaluate"}),
        ("[data.signs]", "[data.signs]\nsize = 24", set(), {"data", "poison", "train", "audit"}),
        (
            "[defenses.re]\n",
            "[defenses.re]\noptions = { balance = 2.0 }\n",
            {"data", "poison", "train"},
            {"audit", "score", "retrain"},
        ),
    ],
)
def test_a_change_reaches_what_depends_on_it(
    tmp_path: Path, old: str, new: str, kept: set[str], changed: set[str]
) -> None:
    name = "signs/small/cross/re/0"
    before, after = (keys(cells_of(tmp_path, t)[name]) for t in (SMALL, SMALL.replace(old, new, 1)))
    assert before.keys() == after.keys()
    for place, key in before.items():
        if place[0] in kept:
            assert after[place] == key, place
        if place[0] in changed:
            assert after[place] != key, place


def test_another_attack_is_left_alone(tmp_path: Path) -> None:
    before, after = (cells_of(tmp_path, text) for text in (SMALL, SMALL.replace("count = 5", "count = 6")))
    for name, cell in before.items():
        assert (cell.key == after[name].key) == ("/cross/" not in name)


def test_controls_differ_by_their_offset_and_share_the_set(tmp_path: Path) -> None:
    text = SMALL.replace(
        "clean = { clean = true }", "clean = {clean = true}\nc2 = {clean = true, seed_offset = 9}"
    )
    cells = cells_of(tmp_path, text)
    first, second = cells["signs/small/clean/re/0"], cells["signs/small/c2/re/0"]
    assert first.key != second.key
    by_kind = [{stage.kind: stage.key for stage in cell.all_stages} for cell in (first, second)]
    assert by_kind[0]["poison"] == by_kind[1]["poison"]
    assert by_kind[0]["audit"] != by_kind[1]["audit"]


def test_the_adaptive_attack_has_a_surrogate_and_a_clean_model(tmp_path: Path) -> None:
    text = SMALL.replace('named = "A-1SC"', 'named = "adaptive"')
    cell = cells_of(tmp_path, text)["signs/small/A-1SC/re/0"]
    assert "clean_model" in cell.stages
    poisoned = next(
        s for s in cell.all_stages if s.kind == "poison" and s.inputs.keys() == {"data", "surrogate"}
    )
    surrogate = poisoned.inputs["surrogate"]
    models = {s.key for s in cell.all_stages if s.kind == "train"}
    # Surrogate, clean model, victim and probe are four different models.
    assert len(models) == 4
    without_control = "\n".join(line for line in text.splitlines() if "clean = true" not in line)
    alone = cells_of(tmp_path, without_control)["signs/small/A-1SC/re/0"]
    assert alone.stages["clean_model"].inputs["model"].key not in models
    assert surrogate.inputs["poisoned"].config == {"attack": None}


def test_a_verdict_is_doubted_unless_the_plan_says_not_to(tmp_path: Path) -> None:
    name = "signs/small/cross/re/0"
    audits = [
        cells_of(tmp_path, SMALL.replace("[defenses.re]\n", f"[defenses.re]\n{line}"))[name].stages["audit"]
        for line in ("", "canaries = true\n", "canaries = false\n")
    ]
    assert audits[0].key == audits[1].key
    assert "canaries" not in audits[0].config
    assert audits[2].config["canaries"] is False


def test_a_second_probe_is_asked_by_the_audit_alone(tmp_path: Path) -> None:
    name = "signs/small/cross/re/0"
    text = SMALL.replace('probe = "quick-probe"', 'probe = "quick-probe"\nsecond_probe = "quick"')
    one, two = cells_of(tmp_path, SMALL)[name], cells_of(tmp_path, text)[name]
    assert two.stages["audit"].inputs["second_probe"].key == two.stages["undefended"].inputs["model"].key
    assert two.stages["audit"].inputs["probe"].key == one.stages["audit"].inputs["probe"].key
    assert two.stages["undefended"].key == one.stages["undefended"].key
    assert two.stages["audit"].key != one.stages["audit"].key
    with pytest.raises(UntrojanError, match=r"nets\.small\.second_probe.*'quik'"):
        read_plan(written(tmp_path, text.replace('second_probe = "quick"', 'second_probe = "quik"')))


def test_a_cleanser_may_look_through_a_probe_of_its_own(tmp_path: Path) -> None:
    name = "signs/small/cross/re/0"
    own = 'probe = { architecture = "lenet5", recipe = "quick" }\n'
    text = SMALL.replace("[defenses.re]\n", f"[defenses.re]\n{own}")
    one, two = cells_of(tmp_path, SMALL)[name], cells_of(tmp_path, text)[name]
    probe = two.stages["audit"].inputs["probe"]
    assert probe.config["architecture"] == "lenet5"
    assert probe.config["recipe"]["flip"] is True
    assert two.stages["undefended"].key == one.stages["undefended"].key
    retrained = two.stages["retrained"].inputs["model"]
    assert retrained.config["architecture"] == one.stages["undefended"].inputs["model"].config["architecture"]
    others = cells_of(tmp_path, SMALL)["signs/small/cross/re-wide/0"], cells_of(tmp_path, text)
    assert others[1]["signs/small/cross/re-wide/0"].key == others[0].key


@pytest.mark.parametrize(
    ("line", "key", "said"),
    [
        (
            '[defenses.re]\nprobe = { architecture = "lenet6", recipe = "quick" }',
            "re.probe.architecture",
            "lenet5",
        ),
        ('[defenses.re]\nprobe = { architecture = "lenet5", recipe = "quik" }', "re.probe.recipe", "'quik'"),
        (
            '[defenses.none]\nprobe = { architecture = "lenet5", recipe = "quick" }',
            "none",
            "probe is a cleanser's",
        ),
    ],
)
def test_a_probe_that_can_not_be(tmp_path: Path, line: str, key: str, said: str) -> None:
    text = SMALL.replace(line.partition("\n")[0], line, 1)
    with pytest.raises(UntrojanError, match=rf"(?s)defenses\.{key}.*{said}"):
        read_plan(written(tmp_path, text))


def test_every_attack_is_shown_to_the_clean_control(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, SMALL)
    clean_model = cells["signs/small/A-1SC/re/0"].stages["clean_model"].inputs["model"]
    control = cells["signs/small/clean/re/0"].stages["undefended"].inputs["model"]
    assert clean_model.key == control.key
    assert "clean_model" not in cells["signs/small/clean/re/0"].stages


def test_class_names_in_attacks(tmp_path: Path) -> None:
    text = SMALL.replace("sources = [0], target = 1", 'sources = ["frog", "cat"], target = "deer"')
    entry = read_plan(written(tmp_path, text)).attacks["cross"]
    names = ["cat", "deer", "frog"]
    attack = entry.poisoning(lambda label: names.index(str(label)))
    assert (attack.sources, attack.target) == ((2, 0), 1)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_that_come_with_the_project(path: Path) -> None:
    plan = read_plan(path)
    cells = expand(plan)
    assert plan.name == path.stem
    figures = [
        figure
        for table in plan.tables
        for name in table.published
        for column in table.columns
        for attack, entry in plan.attacks.items()
        for net in plan.nets.values()
        for defense in plan.defenses.values()
        if (
            figure := published_figure(
                name,
                column,
                {
                    "attack": entry.published or attack,
                    "net": table.published_net or net.published or net.architecture,
                    "defense": defense.published_name,
                    "data": table.published_data or ("gtsrb" if attack == "gtsrb" else "cifar10"),
                },
            )
        )
        is not None
    ]
    wants = any(table.published for table in plan.tables)
    assert bool(figures) == wants
    if path.stem.startswith("re-desk"):
        assert len(cells) == 24 * len(plan.seeds)
        for cell in cells:
            assert cell.axes["seed"] in (0, 1, 2)
    for bound in plan.bounds:
        assert any(takes(bound.cells, cell.axes) for cell in cells), bound.text


def test_what_a_cleanser_is_given_beside_the_set(tmp_path: Path) -> None:
    """Trusted images and the target that retraining is told are settings of those stages alone."""
    more = """[defenses.told]
cleanser = "activation-clustering"
trusted_per_class = 7
target_known = true
"""
    cells = cells_of(tmp_path, SMALL.replace("[defenses.re]", more + "[defenses.re]"))
    told, plain = cells["signs/small/A-1SC/told/0"], cells["signs/small/A-1SC/re/0"]
    assert told.stages["audit"].config["trusted_per_class"] == 7
    assert told.stages["retrained"].inputs["model"].config["target_known"] is True
    assert "trusted_per_class" not in plain.stages["audit"].config
    assert "target_known" not in plain.stages["retrained"].inputs["model"].config
    for wrong, said in (
        ("[defenses.none]\ntrusted_per_class = 7", "trusted_per_class is a cleanser's"),
        ("[defenses.none]\ntarget_known = true", "target_known is about retraining"),
    ):
        with pytest.raises(UntrojanError, match=said):
            read_plan(written(tmp_path, SMALL.replace("[defenses.none]", wrong)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_well_formed(name: str) -> None:
    content = read_published(name)
    assert content["unit"] in ("percent", "none")
    authors = ("Xiang, Miller & Kesidis", "Wang, Ding, Zhai & Ma", "Tao et al.", "Xia, Niu, Li & Li")
    assert content["source"].startswith(authors)
    seen = set()
    for entry in content["entries"]:
        figures = entry.keys() - {"attack", "net", "defense", "data"}
        assert figures
        assert all(f"{content['section']}.{figure}" in MEASURES for figure in figures)
        assert all(0 <= entry[figure] <= 100 for figure in figures)
        place = tuple(entry.get(key) for key in ("attack", "net", "defense", "data"))
        assert place not in seen
        seen.add(place)


def entries(name: str, **wanted: str) -> list[Mapping[str, Any]]:
    found = [e for e in read_published(name)["entries"] if all(e.get(k) == v for k, v in wanted.items())]
    assert found
    return found


def test_published_figures_agree_with_what_the_papers_text_says_of_them() -> None:
    attacks = [e for e in entries("re-table-01") if not e["attack"].startswith("clean")]
    assert len(attacks) == 36
    assert min(e["attack_success"] for e in attacks) == 86.1
    # "the maximum ASR of the 18 attacks is merely 4.9 %"
    assert max(e["attack_success"] for e in entries("re-table-04")) == 4.9
    # "successfully detecting all attacks ... with only one false detection"
    re = entries("re-table-02", defense="reverse-engineering")
    assert sum("right_target" in e for e in re) == 36
    assert all(e["right_target"] == 100 for e in re if "right_target" in e)
    assert [e["attack"] for e in re if e.get("false_alarm")] == ["clean-E"]
    # "CI fails to detect any attacks for the wide DNN architecture"; AC and CI: no false alarm there
    ci = entries("re-table-02", defense="cluster-impurity", net="resnet18")
    assert all(e.get("detected", 0) == 0 and e.get("false_alarm", 0) == 0 for e in ci)
    table_3 = entries("re-table-03", defense="reverse-engineering")
    assert min(e["true_positive_rate"] for e in table_3) == 83.0
    assert max(e["false_positive_rate"] for e in table_3) == 20.9
    assert len(entries("re-table-03", defense="spectral-signatures")) == 36
    assert len(entries("re-table-03", defense="cluster-impurity")) == 17
    # "our RE outperforms both ... detecting all the attacks, with no false detections on clean training sets"
    assert all(
        e.get("right_target", 100) == 100 for e in entries("re-table-07", defense="reverse-engineering")
    )
    assert not any(e.get("false_alarm") for e in entries("re-table-07", defense="reverse-engineering"))


@pytest.mark.parametrize(
    ("name", "measure", "wanted", "figure"),
    [
        ("re-table-01", "undefended.attack_success", ("D-9SC", "resnet18-compact", "none"), 86.5),
        ("re-table-01", "undefended.benign_accuracy", ("clean-F", "resnet18", "none"), 91.3),
        ("re-table-01", "undefended.attack_success", ("B-3SC", "resnet18", "reverse-engineering"), 98.5),
        ("re-table-03", "cleansing.true_positive_rate", ("E-3SC", "resnet18", "reverse-engineering"), 90.3),
        (
            "re-table-03",
            "cleansing.false_positive_rate",
            ("F-1SC", "resnet18-compact", "activation-clustering"),
            35.4,
        ),
        (
            "re-table-03",
            "cleansing.false_positive_rate",
            ("E-9SC", "resnet18-compact", "cluster-impurity"),
            43.9,
        ),
        ("re-table-04", "retrained.benign_accuracy", ("C-9SC", "resnet18", "reverse-engineering"), 92.9),
        ("re-table-06", "undefended.attack_success", ("D-3SC", "mobilenetv2", "none"), 95.1),
        ("re-table-06", "undefended.benign_accuracy", ("A-3SC", "densenet", "none"), 91.5),
        (
            "re-table-08",
            "cleansing.false_positive_rate",
            ("B-3SC", "mobilenetv2", "reverse-engineering"),
            9.62,
        ),
        ("re-table-08", "cleansing.true_positive_rate", ("F-3SC", "densenet", "spectral-signatures"), 14.7),
        (
            "re-table-10",
            "retrained.attack_success",
            ("E-9SC", "resnet18-compact", "spectral-signatures"),
            13.6,
        ),
        ("re-table-11", "retrained.attack_success", ("C-9SC", "resnet18", "activation-clustering"), 55.4),
        ("re-table-12", "retrained.benign_accuracy", ("E-3SC", "resnet18-compact", "cluster-impurity"), 89.3),
        ("re-table-14", "cleansing.true_positive_rate", ("A-3SC-9", "resnet18", "reverse-engineering"), 71.3),
        (
            "re-section-18-retrained",
            "retrained.attack_success",
            ("adaptive", "resnet18", "reverse-engineering"),
            6.7,
        ),
    ],
)
def test_published_figures_read_a_second_time(
    name: str, measure: str, wanted: tuple[str, str, str], figure: float
) -> None:
    place = dict(zip(("attack", "net", "defense"), wanted, strict=True))
    assert published_figure(name, measure, place) == figure


def test_a_published_figure_of_another_net_or_section_is_not_taken() -> None:
    place = {"attack": "A-1SC", "net": "vgg16", "defense": "none"}
    assert published_figure("re-table-01", "undefended.attack_success", place) is None
    assert published_figure("re-table-01", "retrained.attack_success", place | {"net": "resnet18"}) is None
    other = {"attack": "A-1SC", "net": "resnet18", "defense": "fine-pruning"}
    assert published_figure("re-table-03", "cleansing.true_positive_rate", other) is None
