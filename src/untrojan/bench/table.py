"""Tables from result files, and from nothing else."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from untrojan.bench.graph import Cell
from untrojan.bench.measures import MEASURES, beside_regular, value_of
from untrojan.bench.plan import BoundEntry, ComparisonEntry, Plan, TableEntry, read_plan, takes
from untrojan.bench.published import published_figure, read_published
from untrojan.errors import UntrojanError

Verdict = Literal["holds", "does not hold", "holds so far", "does not hold so far", "nothing to count"]


@dataclass(frozen=True)
class Outcome:
    """A cell's result file, and what follows from it beside the others."""

    cell: Cell
    content: Mapping[str, Any]
    values: Mapping[str, float]
    """Every measure that the cell yields, the derived ones included."""
    impotent: str
    """Why the attack does not count; empty where it does, and for clean controls."""
    clean: bool


@dataclass(frozen=True)
class Figure:
    """One entry of a table."""

    count: int
    mean: float | None
    spread: float | None
    """Sample standard deviation; None for fewer than two cells."""
    published: float | None
    """In percent for shares, as printed."""
    counts: bool
    """False where only cells were averaged whose attack does not work."""


@dataclass(frozen=True)
class Row:
    place: Mapping[str, str]
    potent: int
    attacked: int
    """Cells with an attack, of which ``potent`` have one that works."""
    cells: int
    missing: int
    figures: Mapping[str, Figure]


def render(plan: Path, results: Path | None, out: Path | None, format: str = "markdown") -> str:
    """A plan's tables and bounds, as ``markdown`` or ``csv``.

    Result files are looked for in ``results``, else in ``out/results``. Results of another configuration
    than the plan's present one are left out, and counted. Raises UntrojanError where there is no result.
    """
    from untrojan.bench.cells import expand
    from untrojan.bench.runner import cells_folder

    if format not in ("markdown", "csv"):
        raise UntrojanError(f"unknown format {format!r}: choose markdown or csv")
    if results is None and out is None:
        raise UntrojanError("where are the results? give --out DIR, or --results DIR")
    checked = read_plan(plan)
    cells = expand(checked)
    folder = cells_folder(out or Path(), results, checked.name)
    outcomes = outcomes_of(checked, cells, folder)
    if not outcomes:
        raise UntrojanError(f"{folder} has no result of this plan's {len(cells)} cells: run the plan first")
    if format == "csv":
        return _as_csv(checked, cells, outcomes)
    return _as_markdown(checked, cells, outcomes, folder)


def outcomes_of(plan: Plan, cells: Sequence[Cell], folder: Path) -> list[Outcome]:
    """The cells that are done, with the measures that need other cells to be taken."""
    from untrojan.bench.runner import read_result

    found = []
    for cell in cells:
        content = read_result(cell, folder)
        if content and content.get("key") == cell.key and content.get("status") == "done":
            found.append((cell, content))
    accuracies: dict[tuple[Any, ...], list[float]] = {}
    for cell, content in found:
        value = value_of(content, "undefended.benign_accuracy")
        if plan.attacks[str(cell.axes["attack"])].clean and value is not None:
            accuracies.setdefault(_control_of(cell), []).append(value)
    outcomes = [
        _outcome(plan, cell, content, _mean(accuracies.get(_control_of(cell), []))) for cell, content in found
    ]
    return _beside_regular(plan, outcomes)


def _beside_regular(plan: Plan, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, those of infected models compared with the regularly trained model of the same attack.

    Where the model was made more than once, on several machines, with that of the same defence's cell.
    """
    regular: dict[tuple[Any, ...], dict[str, Outcome]] = {}
    twins: list[tuple[Any, ...] | None] = []
    for outcome in outcomes:
        entry = plan.attacks[str(outcome.cell.axes["attack"])].sdrm
        place = [outcome.cell.axes[axis] for axis in ("data", "net", "seed")]
        twins.append(None if entry is None else (str(entry.infection()), *place))
        if entry is not None and entry.strength == 0:
            same = regular.setdefault((str(entry.infection()), *place), {})
            same.setdefault(str(outcome.cell.axes["defense"]), outcome)
    compared = []
    for outcome, twin in zip(outcomes, twins, strict=True):
        if twin in regular:
            known = regular[twin]
            beside = known.get(str(outcome.cell.axes["defense"])) or next(iter(known.values()))
            values = {**outcome.values, **beside_regular(outcome.values, beside.values)}
            outcome = replace(outcome, values=values)
        compared.append(outcome)
    return compared


def _outcome(plan: Plan, cell: Cell, content: Mapping[str, Any], clean_accuracy: float | None) -> Outcome:
    values = {name: value for name in MEASURES if (value := value_of(content, name)) is not None}
    if clean_accuracy is not None:
        for section in ("undefended", "retrained", "final"):
            if f"{section}.benign_accuracy" in values:
                values[f"{section}.accuracy_drop"] = clean_accuracy - values[f"{section}.benign_accuracy"]
    clean = plan.attacks[str(cell.axes["attack"])].clean
    return Outcome(cell, content, values, "" if clean else _impotence(plan, values), clean)


def _impotence(plan: Plan, values: Mapping[str, float]) -> str:
    success = values.get("undefended.attack_success", 0.0)
    if success < plan.potency.attack_success:
        return f"ASR {100 * success:.1f} < {100 * plan.potency.attack_success:g}"
    drop, allowed = values.get("undefended.accuracy_drop"), plan.potency.accuracy_drop
    if drop is not None and allowed is not None and drop > allowed:
        return f"ACC {100 * drop:.1f} below clean"
    return ""


def rows_of(plan: Plan, table: TableEntry, cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> list[Row]:
    """A table's rows, in the order in which the plan names their cells."""
    places: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if takes(table.cells, cell.axes):
            places.setdefault(tuple(str(cell.axes[axis]) for axis in table.rows), []).append(cell)
    known = {outcome.cell.name: outcome for outcome in outcomes}
    rows = []
    for place, members in places.items():
        done = [known[cell.name] for cell in members if cell.name in known]
        attacked = [outcome for outcome in done if not outcome.clean]
        rows.append(
            Row(
                place=dict(zip(table.rows, place, strict=True)),
                potent=sum(not outcome.impotent for outcome in attacked),
                attacked=len(attacked),
                cells=len(members),
                missing=len(members) - len(done),
                figures={column: _figure(plan, table, column, done, members) for column in table.columns},
            )
        )
    return rows


def _figure(
    plan: Plan, table: TableEntry, column: str, done: Sequence[Outcome], members: Sequence[Cell]
) -> Figure:
    counted = [outcome for outcome in done if not outcome.impotent or not MEASURES[column].of_defense]
    values = [outcome.values[column] for outcome in (counted or done) if column in outcome.values]
    return Figure(
        count=len(values),
        mean=_mean(values),
        spread=statistics.stdev(values) if len(values) > 1 else None,
        published=_published(plan, table, column, members),
        counts=bool(counted) or not done,
    )


def _published(plan: Plan, table: TableEntry, column: str, members: Sequence[Cell]) -> float | None:
    """The published figure, where all of the row's cells have the same one."""
    found = set()
    for cell in members:
        attack, net = str(cell.axes["attack"]), str(cell.axes["net"])
        defense = plan.defenses[str(cell.axes["defense"])]
        wanted = {
            "attack": plan.attacks[attack].published or attack,
            "net": table.published_net or plan.nets[net].published or plan.nets[net].architecture,
            "defense": defense.published_name,
            "data": table.published_data or str(cell.axes["data"]),
        }
        found.add(
            next(
                (f for name in table.published if (f := published_figure(name, column, wanted)) is not None),
                None,
            )
        )
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class Comparison:
    """One defence beside another, averaged over the cells that both have."""

    other: str
    shared: int
    figures: Mapping[str, tuple[float, float]]
    """The one's mean and the other's; measures that a shared cell lacks are left out."""


def comparisons_of(
    entry: ComparisonEntry, cells: Sequence[Cell], outcomes: Sequence[Outcome]
) -> list[Comparison]:  # fmt: skip
    """One for each other defence, in the plan's order; those that share no cell are among them."""
    potent = {outcome.cell.name: outcome.values for outcome in outcomes if not outcome.impotent}
    by_defense: dict[str, dict[tuple[Any, ...], Mapping[str, float]]] = {}
    for cell in cells:
        defense = str(cell.axes["defense"])
        if defense == entry.defense or takes(entry.cells, cell.axes):
            place = tuple(cell.axes[axis] for axis in ("data", "net", "attack", "seed"))
            held = by_defense.setdefault(defense, {})
            if cell.name in potent:
                held[place] = potent[cell.name]
    ours = by_defense.pop(entry.defense, {})
    found = []
    for other, theirs in by_defense.items():
        pairs = [(ours[place], values) for place, values in theirs.items() if place in ours]
        figures = {
            column: (
                statistics.fmean(one[column] for one, _ in pairs),
                statistics.fmean(values[column] for _, values in pairs),
            )
            for column in entry.columns
            if pairs and all(column in one and column in values for one, values in pairs)
        }
        found.append(Comparison(other, len(pairs), figures))
    return found


@dataclass(frozen=True)
class BoundOutcome:
    bound: BoundEntry
    verdict: Verdict
    found: str
    needed: str
    counted: int
    missing: int
    impotent: int


def check_bound(bound: BoundEntry, cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> BoundOutcome:
    """Whether a stated bound holds over the cells it is about."""
    wanted = [cell for cell in cells if takes(bound.cells, cell.axes)]
    known = {outcome.cell.name: outcome for outcome in outcomes}
    done = [known[cell.name] for cell in wanted if cell.name in known]
    potent = [outcome for outcome in done if not outcome.impotent]
    counted = [o for o in potent if bound.given is None or o.values.get(bound.given)]
    values = [outcome.values[bound.measure] for outcome in counted if bound.measure in outcome.values]
    missing = len(wanted) - len(done)
    limit = bound.at_least if bound.at_least is not None else bound.at_most
    assert limit is not None
    needed = f"{'at least' if bound.at_least is not None else 'at most'} {_limit(bound, limit)}"
    if not values:
        return BoundOutcome(bound, "nothing to count", "-", needed, 0, missing, len(done) - len(potent))
    value = _statistic(bound.statistic, values)
    number = limit[0] / limit[1] if isinstance(limit, tuple) else limit
    # Shares of counts are compared with a hair's room, for 17/18 is no exact number.
    holds = value >= number - 1e-9 if bound.at_least is not None else value <= number + 1e-9
    verdict: Verdict = "holds" if holds else "does not hold"
    if missing:
        verdict = "holds so far" if holds else "does not hold so far"
    kind = MEASURES[bound.measure].kind
    shown = f"{sum(values):.0f} of {len(values)}" if bound.statistic == "fraction" else _spell(value, kind)
    return BoundOutcome(bound, verdict, shown, needed, len(values), missing, len(done) - len(potent))


def _limit(bound: BoundEntry, limit: float | tuple[int, int]) -> str:
    if isinstance(limit, tuple):
        return f"{limit[0]} of {limit[1]}"
    return _spell(limit, "share" if bound.statistic == "fraction" else MEASURES[bound.measure].kind)


def _as_markdown(plan: Plan, cells: Sequence[Cell], outcomes: Sequence[Outcome], folder: Path) -> str:
    parts = [f"# {plan.title}", plan.description] if plan.description else [f"# {plan.title}"]
    for table in plan.tables:
        parts.append(_markdown_table(plan, table, cells, outcomes))
    for comparison in plan.comparisons:
        parts.append(_markdown_comparison(comparison, cells, outcomes))
    if plan.bounds:
        parts.append(_markdown_bounds(plan, cells, outcomes))
    parts.append(_footer(plan, cells, outcomes, folder))
    return "\n\n".join(parts) + "\n"


def _markdown_table(plan: Plan, table: TableEntry, cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> str:
    rows = rows_of(plan, table, cells, outcomes)
    potency = any(row.attacked for row in rows)
    titles = _titles(table.columns)
    head = [*table.rows, "cells", *titles, *(["attack works"] if potency else [])]
    lines = [f"## {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for row in rows:
        entries = [_entry(row.figures[column], MEASURES[column].kind) for column in table.columns]
        works = f"{row.potent} of {row.attacked}" if row.attacked else "-"
        if row.attacked and not row.potent:
            works = "attack not potent"
        counted = f"{row.cells - row.missing} of {row.cells}" if row.missing else str(row.cells)
        lines.append(_line([*row.place.values(), counted, *entries, *([works] if potency else [])]))
    sources = [read_published(name) for name in table.published]
    if sources:
        net = f", net {table.published_net}" if table.published_net else ""
        lines += ["", f"In brackets, as published{net}:"]
        lines += [
            f"- {_numbered(s['table'])}: {s['caption']}. {s['source']}. {s['note']}".rstrip() for s in sources
        ]
    return "\n".join(lines)


def _markdown_comparison(
    entry: ComparisonEntry, cells: Sequence[Cell], outcomes: Sequence[Outcome]
) -> str:  # fmt: skip
    titles = _titles(entry.columns)
    head = [
        "defense",
        "cells shared",
        *(f"{title}, {whose}" for title in titles for whose in ("its", entry.defense)),
    ]
    lines = [f"## {entry.title}", ""]
    if entry.note:
        lines += [entry.note, ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for each in comparisons_of(entry, cells, outcomes):
        shown = []
        for column in entry.columns:
            kind = MEASURES[column].kind
            one, other = each.figures.get(column, (None, None))
            shown += ["-" if mean is None else _spell(mean, kind, unit=False) for mean in (other, one)]
        lines.append(_line([each.other, str(each.shared), *shown]))
    return "\n".join(lines)


def _titles(columns: Iterable[str]) -> list[str]:
    return [MEASURES[name].label + (" %" if MEASURES[name].kind == "share" else "") for name in columns]


def _numbered(table: str) -> str:
    return f"table {table}" if table.isdecimal() else table


def _markdown_bounds(plan: Plan, cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> str:
    head = ["to hold", "found", "needed", "verdict", "cells counted", "attack not potent", "not yet run"]
    lines = ["## What was to hold", "", _line(head), _line(["---"] * len(head))]
    for bound in plan.bounds:
        o = check_bound(bound, cells, outcomes)
        verdict = f"**{o.verdict}**" if o.verdict.startswith("does not") else o.verdict
        lines.append(
            _line([bound.text, o.found, o.needed, verdict, str(o.counted), str(o.impotent), str(o.missing)])
        )
    return "\n".join(lines)


def _footer(plan: Plan, cells: Sequence[Cell], outcomes: Sequence[Outcome], folder: Path) -> str:
    from untrojan.bench.runner import read_result, status_of

    statuses = [status_of(cell, folder) for cell in cells]
    lines = [
        f"{len(outcomes)} of {len(cells)} cells done, {statuses.count('failed')} failed, "
        f"{statuses.count('stale')} of another configuration (left out), {statuses.count('to do')} not run. "
        f"Mean ± standard deviation over the cells of a row (seeds {', '.join(map(str, plan.seeds))}). "
        f"An attack works where its undefended ASR is at least {100 * plan.potency.attack_success:g} %"
        + (
            f" and its accuracy at most {100 * plan.potency.accuracy_drop:g} points below clean training's"
            if plan.potency.accuracy_drop is not None
            else ""
        )
        + "; figures of a defence in parentheses are of attacks that do not, and count for nothing."
    ]
    for cell, status in zip(cells, statuses, strict=True):
        error = (read_result(cell, folder) or {}).get("error") if status == "failed" else None
        if error:
            lines.append(f"- failed: {cell.name}: {_safe(error['stage'])}: {_safe(error['message'])}")
    machines = {_machine(outcome.content) for outcome in outcomes}
    lines += [f"- measured on {_safe(machine)}" for machine in sorted(machines)]
    return "\n".join(lines)


def _machine(content: Mapping[str, Any]) -> str:
    hardware, versions = content.get("hardware") or {}, content.get("versions") or {}
    device = hardware.get("gpu") or f"{hardware.get('cpu', '?')}, {hardware.get('threads', '?')} threads"
    return f"{device}; " + ", ".join(f"{name} {version}" for name, version in versions.items())


def _as_csv(plan: Plan, cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> str:
    """One line a figure: table, row, measure, cells, mean, standard deviation, published."""
    axes = ["data", "net", "attack", "defense", "seed"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "table",
            *axes,
            "measure",
            "cells",
            "mean",
            "standard_deviation",
            "published",
            "attack_works",
            "attacked",
        ]
    )
    for table in plan.tables:
        for row in rows_of(plan, table, cells, outcomes):
            place = [row.place.get(axis, "") for axis in axes]
            for column, figure in row.figures.items():
                share = MEASURES[column].kind in ("share", "yes")
                published = figure.published
                numbers = [
                    figure.mean,
                    figure.spread,
                    published / 100 if published is not None and share else published,
                ]
                shown = ["" if number is None else f"{number:.6g}" for number in numbers]
                writer.writerow([table.name, *place, column, figure.count, *shown, row.potent, row.attacked])
    for entry in plan.comparisons:
        for each in comparisons_of(entry, cells, outcomes):
            for column, means in each.figures.items():
                for whose, mean in zip((entry.defense, each.other), means, strict=True):
                    place = ["", "", "", whose, ""]
                    measured = [column, each.shared, f"{mean:.6g}", "", "", each.shared, each.shared]
                    writer.writerow([f"{entry.name}: {each.other}", *place, *measured])
    for bound in plan.bounds:
        o = check_bound(bound, cells, outcomes)
        writer.writerow(["bound", *[""] * 5, bound.text, o.counted, o.found, "", o.needed, o.verdict, ""])
    return buffer.getvalue()


def _entry(figure: Figure, kind: str) -> str:
    published = "" if figure.published is None else f" [{figure.published:g}]"
    if kind == "yes" and published:
        published = " [yes]" if figure.published else " [no]"
    if figure.mean is None:
        return f"-{published}"
    if kind == "yes":
        text = f"{round(figure.mean * figure.count)} of {figure.count}"
    else:
        text = _spell(figure.mean, kind, unit=False)
        if figure.spread is not None:
            text += f" ± {_spell(figure.spread, kind, unit=False)}"
    return (text if figure.counts else f"({text})") + published


def _spell(value: float, kind: str, unit: bool = True) -> str:
    if kind in ("share", "yes"):
        return f"{100 * value:.1f}" + (" %" if unit else "")
    return f"{value:.0f}" if abs(value) >= 1000 or value == math.floor(value) else f"{value:.3g}"


def _line(entries: Iterable[str]) -> str:
    return "| " + " | ".join(_safe(entry) for entry in entries) + " |"


def _safe(text: object) -> str:
    """Text that cannot break out of a Markdown table or bring HTML with it."""
    plain = " ".join(str(text).split())
    return plain.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def _control_of(cell: Cell) -> tuple[Any, ...]:
    return cell.axes["data"], cell.axes["net"], cell.axes["seed"]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _statistic(name: str, values: Sequence[float]) -> float:
    if name == "largest":
        return max(values)
    return min(values) if name == "smallest" else statistics.fmean(values)
