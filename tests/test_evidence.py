"""What documents and tables say is what the committed result files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from untrojan.bench.plan import read_plan
from untrojan.bench.table import render

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "results" / "README.md"]
TABLES = {path.read_text().partition("\n")[0]: path for path in (ROOT / "results").glob("*/*.md")}
"""By title, which is the plan's."""
PLANS = [path for path in sorted((ROOT / "plans").glob("*.toml")) if any(ROOT.glob(f"results/*/{path.stem}"))]
EVIDENCE = sorted((ROOT / "docs" / "evidence").glob("*.md"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_a_committed_table_is_what_its_command_prints(plan: Path) -> None:
    committed = TABLES[f"# {read_plan(plan).title}"]
    assert committed.read_text() == render(plan, committed.parent, None) + "\n"


@pytest.mark.parametrize("document", EVIDENCE, ids=lambda path: path.stem)
def test_a_quoted_row_stands_in_a_committed_table(document: Path) -> None:
    known = {line for path in TABLES.values() for line in path.read_text().splitlines()}
    quoted = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    assert quoted
    assert [line for line in quoted if line not in known] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_name_what_there_is(document: Path) -> None:
    text = document.read_text()
    for target, _, heading in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)):
        found = document.parent / target if target else document
        assert found.exists(), target
        assert not heading or heading in _anchors(found), f"{target}#{heading}"
    for plan in re.findall(r"plans/[a-z0-9-]+\.toml", text):
        assert (ROOT / plan).exists(), plan


def _anchors(document: Path) -> set[str]:
    """GitHub's, of the headings."""
    headings = [line.lstrip("# ") for line in document.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
