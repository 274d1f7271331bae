"""Tables made of result files alone."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from untrojan.bench.cells import expand
from untrojan.bench.measures import value_of
from untrojan.bench.plan import read_plan
from untrojan.bench.table import check_bound, outcomes_of, render
from untrojan.errors import UntrojanError

PLAN = """
name = "tables"
title = "Tables"
seeds = [0, 1, 2]
[data.cifar10]
[nets.compact]
architecture = "resnet18-compact"
victim = "desk-victim"
probe = "desk-probe"
[attacks]
A-1SC = { named = "A-1SC" }
F-1SC = { named = "F-1SC" }
clean-A = { clean = true }
clean-B = { clean = true, seed_offset = 10 }
[defenses.re]
cleanser = "reverse-engineering"
[[tables]]
name = "all"
title = "All of it"
columns = [
  "undefended.attack_success", "detection.right_target", "cleansing.true_positive_rate",
  "retrained.accuracy_drop",
]
published = ["re-table-01", "re-table-02", "re-table-03"]
[[bounds]]
text = "right target"
cells = { attacks = ["?-1SC"] }
measure = "detection.right_target"
statistic = "fraction"
at_least = [17, 18]
[[bounds]]
text = "false alarms"
cells = { attacks = ["clean-*"] }
measure = "detection.false_alarm"
statistic = "fraction"
at_most = [1, 6]
[[bounds]]
text = "retrained"
cells = { attacks = ["?-1SC"] }
given = "detection.detected"
measure = "retrained.attack_success"
statistic = "largest"
at_most = 0.049
[[bounds]]
text = "accuracy"
cells = { attacks = ["?-1SC"] }
measure = "retrained.accuracy_drop"
statistic = "largest"
at_most = 0.01
"""

COMPARED = (
    PLAN
    + """
[defenses.spectre]
cleanser = "spectre"
[defenses.none]
[[comparisons]]
name = "beside"
title = "Beside"
defense = "re"
cells = { attacks = ["?-1SC"] }
columns = ["retrained.attack_success"]
"""
)


class Bench:
    """A plan, and result files that a run of it might have left."""

    def __init__(self, folder: Path, plan: str = PLAN) -> None:
        self.plan_path, self.results = folder / "plan.toml", folder / "results"
        self.plan_path.write_text(plan)
        self.plan = read_plan(self.plan_path)
        self.cells = {cell.name: cell for cell in expand(self.plan)}
        self.folder = self.results / "tables" / "cells"
        self.folder.mkdir(parents=True)

    def write(
        self, attack: str, seed: int, sections: dict[str, Any], defense: str = "re", **other: Any
    ) -> None:  # fmt: skip
        cell = self.cells[f"cifar10/compact/{attack}/{defense}/{seed}"]
        content = {
            "cell": dict(cell.axes),
            "key": cell.key,
            "status": "done",
            "result": sections,
            "cost": [{"kind": "audit", "seconds": 5.0}],
            "hardware": {"cpu": "a | <b>", "threads": 1},
            "versions": {"torch": "1"},
        }
        (self.folder / cell.file_name).write_text(json.dumps(content | other))

    def attack(self, name: str, seed: int, defense: str = "re", **given: Any) -> None:
        told = {"success": 0.95, "right": True, "rate": 0.9, "after": 0.01, "accuracy": 0.9} | given
        self.write(
            name,
            seed,
            {
                "undefended": {"attack_success": told["success"], "benign_accuracy": told["accuracy"]},
                "detection": {"detected": told["right"], "right_target": told["right"]},
                "cleansing": {"true_positive_rate": told["rate"]},
                "retrained": {"attack_success": told["after"], "benign_accuracy": told["accuracy"]},
            },
            defense,
        )

    def control(self, name: str, seed: int, accuracy: float = 0.9, alarm: bool = False) -> None:
        self.write(
            name, seed, {"undefended": {"benign_accuracy": accuracy}, "detection": {"false_alarm": alarm}}
        )

    def everything(self) -> None:
        for seed in range(3):
            for name in ("A-1SC", "F-1SC"):
                self.attack(name, seed)
            for name in ("clean-A", "clean-B"):
                self.control(name, seed)

    def markdown(self) -> str:
        return render(self.plan_path, self.results, None)

    def row(self, start: str) -> list[str]:
        line = next(each for each in self.markdown().splitlines() if each.startswith(f"| {start}"))
        return [entry.strip() for entry in line.strip("|").split("|")]

    def figures(self) -> dict[tuple[str, str], dict[str, str]]:
        lines = csv.DictReader(io.StringIO(render(self.plan_path, self.results, None, "csv")))
        return {(line["attack"], line["measure"]): line for line in lines}

    def verdicts(self) -> dict[str, tuple[str, int]]:
        cells = list(self.cells.values())
        outcomes = outcomes_of(self.plan, cells, self.folder)
        checked = [check_bound(bound, cells, outcomes) for bound in self.plan.bounds]
        return {each.bound.text: (each.verdict, each.counted) for each in checked}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_mean_spread_and_published_figure(bench: Bench) -> None:
    bench.everything()
    rates = [0.80, 0.90, 0.97]
    for seed, rate in enumerate(rates):
        bench.attack("A-1SC", seed, rate=rate, right=seed > 0)
    line = bench.figures()["A-1SC", "cleansing.true_positive_rate"]
    assert float(line["mean"]) == pytest.approx(statistics.mean(rates), rel=1e-5)
    assert float(line["standard_deviation"]) == pytest.approx(statistics.stdev(rates), rel=1e-5)
    assert float(line["published"]) == pytest.approx(0.936)
    assert line["cells"] == "3"
    assert bench.row("A-1SC") == [
        "A-1SC", "3", "95.0 ± 0.0 [99.1]", "2 of 3 [yes]", "89.0 ± 8.5 [93.6]", "0.0 ± 0.0", "3 of 3",
    ]  # fmt: skip


def test_an_attack_that_does_not_work_is_shown_and_not_counted(bench: Bench) -> None:
    bench.everything()
    for seed in range(3):
        bench.attack("F-1SC", seed, success=0.84, right=False, after=0.5)
    row = bench.row("F-1SC")
    assert row[2] == "84.0 ± 0.0 [89.4]"
    assert row[3] == "(0 of 3) [yes]"
    assert row[-1] == "attack not potent"
    assert bench.verdicts()["right target"] == ("holds", 3)
    assert bench.verdicts()["retrained"] == ("holds", 3)
    # One seed that works is what the row then speaks of.
    bench.attack("F-1SC", 1, success=0.86, rate=0.5)
    assert bench.row("F-1SC")[4].startswith("50.0 [")
    assert bench.row("F-1SC")[-1] == "1 of 3"


def test_a_victim_that_learned_its_task_badly_does_not_count_either(bench: Bench) -> None:
    bench.everything()
    bench.attack("A-1SC", 0, accuracy=0.875, right=False)
    assert bench.row("A-1SC")[-1] == "2 of 3"
    assert bench.verdicts()["right target"] == ("holds", 5)


def test_accuracy_is_held_against_the_controls_of_the_same_seed(bench: Bench) -> None:
    bench.everything()
    bench.control("clean-A", 0, accuracy=0.905)
    bench.control("clean-B", 0, accuracy=0.925)
    outcomes = outcomes_of(bench.plan, list(bench.cells.values()), bench.folder)
    drops = {
        outcome.cell.axes["seed"]: outcome.values["retrained.accuracy_drop"]
        for outcome in outcomes
        if outcome.cell.axes["attack"] == "A-1SC"
    }
    assert drops == pytest.approx({0: 0.015, 1: 0.0, 2: 0.0})
    assert bench.verdicts()["accuracy"] == ("does not hold", 6)


def test_bounds(bench: Bench) -> None:
    bench.everything()
    assert bench.verdicts() == {
        "right target": ("holds", 6),
        "false alarms": ("holds", 6),
        "retrained": ("holds", 6),
        "accuracy": ("holds", 6),
    }
    bench.control("clean-A", 0, alarm=True)
    assert bench.verdicts()["false alarms"] == ("holds", 6)
    bench.control("clean-A", 1, alarm=True)
    assert bench.verdicts()["false alarms"] == ("does not hold", 6)
    # An attack that was missed is not retrained against, so the bound on retraining passes it over.
    bench.attack("A-1SC", 0, right=False, after=0.95)
    assert bench.verdicts()["retrained"] == ("holds", 5)
    assert bench.verdicts()["right target"] == ("does not hold", 6)
    bench.attack("A-1SC", 1, after=0.0491)
    assert bench.verdicts()["retrained"] == ("does not hold", 5)
    assert "**does not hold**" in bench.markdown()


def test_a_defense_is_compared_on_the_cells_that_another_has_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, COMPARED)
    for attack, seed, defense, after in [
        ("A-1SC", 0, "re", 0.1),
        ("A-1SC", 0, "spectre", 0.5),
        ("A-1SC", 1, "re", 0.3),
        ("A-1SC", 1, "spectre", 0.1),
        ("F-1SC", 0, "re", 0.9),
    ]:
        bench.attack(attack, seed, defense=defense, after=after)
    # Of an attack that does not work nothing is learned.
    bench.attack("F-1SC", 1, defense="re", success=0.2, after=0.0)
    bench.attack("F-1SC", 1, defense="spectre", success=0.2, after=1.0)
    head, _, *rows = [
        line for line in bench.markdown().split("## Beside")[1].splitlines() if line.startswith("|")
    ]
    assert head == "| defense | cells shared | retrained ASR %, its | retrained ASR %, re |"
    assert rows[:2] == ["| spectre | 2 | 30.0 | 20.0 |", "| none | 0 | - | - |"]
    lines = [
        line for line in render(bench.plan_path, bench.results, None, "csv").splitlines() if "beside" in line
    ]
    assert [line.split(",")[:8] for line in lines] == [
        ["beside: spectre", "", "", "", "re", "", "retrained.attack_success", "2"],
        ["beside: spectre", "", "", "", "spectre", "", "retrained.attack_success", "2"],
    ]
    assert [float(line.split(",")[8]) for line in lines] == [pytest.approx(0.2), pytest.approx(0.3)]


def test_cells_of_either_kind(bench: Bench) -> None:
    bench.everything()
    both = '[{ attacks = ["A-1SC"] }, { attacks = ["F-1SC"] }]'
    bench.plan_path.write_text(PLAN.replace('{ attacks = ["?-1SC"] }', both))
    bench.plan = read_plan(bench.plan_path)
    assert bench.verdicts()["right target"] == ("holds", 6)
    one = '[{ attacks = ["A-1SC"] }, { attacks = ["F-1SC"], seeds = [1] }]'
    bench.plan_path.write_text(PLAN.replace('{ attacks = ["?-1SC"] }', one))
    bench.plan = read_plan(bench.plan_path)
    assert bench.verdicts()["right target"] == ("holds", 4)
    bench.plan_path.write_text(PLAN.replace('{ attacks = ["?-1SC"] }', one.replace("[1]", "[3]")))
    with pytest.raises(UntrojanError, match=r"bounds\.0\.cells\.seeds: '3' matches none of 0, 1, 2"):
        read_plan(bench.plan_path)
    bench.plan_path.write_text(
        PLAN.replace('{ attacks = ["?-1SC"] }', '[{ attacks = ["A-1SC"] }, { attacks = ["B"] }]')
    )
    with pytest.raises(UntrojanError, match=r"bounds\.0\.cells\.attacks: 'B' matches none of A-1SC"):
        read_plan(bench.plan_path)


def test_a_comparison_is_with_a_defense_of_the_plan(tmp_path: Path) -> None:
    with pytest.raises(
        UntrojanError, match=r"comparisons\.beside\.defense: 'deck' matches none of re, spectre"
    ):
        Bench(tmp_path, COMPARED.replace('defense = "re"', 'defense = "deck"'))


def test_what_is_missing_stale_or_failed_is_said(bench: Bench) -> None:
    with pytest.raises(UntrojanError, match="has no result of this plan's 12 cells"):
        bench.markdown()
    bench.attack("A-1SC", 0)
    bench.write("A-1SC", 1, {}, key="0" * 64)
    error = {"stage": "victim", "message": "a | b <script>"}
    bench.write("A-1SC", 2, {}, status="failed", error=error)
    (bench.folder / bench.cells["cifar10/compact/F-1SC/re/0"].file_name).write_text("{ torn")
    text = bench.markdown()
    assert "1 of 12 cells done, 1 failed, 1 of another configuration (left out), 9 not run" in text
    assert r"failed: cifar10/compact/A-1SC/re/2: victim: a \| b &lt;script&gt;" in text
    assert bench.row("A-1SC")[1] == "1 of 3"
    assert bench.verdicts()["right target"] == ("holds so far", 1)
    assert bench.verdicts()["false alarms"] == ("nothing to count", 0)
    assert "<b>" not in text


def test_sources_are_named(bench: Bench) -> None:
    bench.everything()
    text = bench.markdown()
    assert "table 1: Attack success rate" in text
    assert "Xiang, Miller & Kesidis" in text


def test_format_and_place(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UntrojanError, match="choose markdown or csv"):
        render(bench.plan_path, bench.results, None, "html")
    with pytest.raises(UntrojanError, match="--out DIR, or --results DIR"):
        render(bench.plan_path, None, None)
    bench.everything()
    assert render(bench.plan_path, None, tmp_path) == render(bench.plan_path, bench.results, None)


def test_what_is_left_of_a_backdoor_is_counted_above_a_clean_model() -> None:
    result = {"result": {"retrained": {"attack_success": 0.053}, "clean_model": {"attack_success": 0.059}}}
    assert value_of(result, "retrained.above_clean_model") == pytest.approx(-0.006)
    result["result"]["repaired"] = {"attack_success": 0.079}
    assert value_of(result, "final.above_clean_model") == pytest.approx(0.02)
    del result["result"]["clean_model"]
    assert value_of(result, "retrained.above_clean_model") is None
    assert value_of(result, "final.above_clean_model") is None
