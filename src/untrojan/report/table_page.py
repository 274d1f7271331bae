"""A table as a page of its own, in the audit's dress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from untrojan.report.environment import environment


@dataclass(frozen=True)
class TablePage:
    """A titled table with a paragraph before and notes after it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[object], ...]
    introduction: str = ""
    caption: str = ""
    notes: tuple[str, ...] = ()


def render_table_page(page: TablePage) -> str:
    """The page as one HTML document: nothing fetched, every cell escaped. The first column heads the rows."""
    return environment().get_template("table.html").render(page=page)
