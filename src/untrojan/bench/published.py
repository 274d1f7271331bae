"""The figures that papers report, to stand beside ours. Data files, each with its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "published"
PUBLISHED: tuple[str, ...] = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
"""Names of the files."""


@cache
def read_published(name: str) -> Mapping[str, Any]:
    """A file of ``PUBLISHED``.

    It holds ``source``, ``table``, ``caption``, ``note``, ``section`` (which section of a cell's result its
    figures belong to), ``unit`` and ``entries``: flat objects of ``attack``, ``net``, ``defense``, ``data``
    where there are several, and figures under the names of ``measures.MEASURES``. Shares are in percent, as
    printed.
    """
    found: Mapping[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def published_figure(name: str, measure: str, wanted: Mapping[str, str]) -> float | None:
    """The figure for ``measure`` (``section.key``) of the entry that agrees with ``wanted``, or None.

    An entry that does not mention one of the wanted keys agrees with any value of it. Figures of what no
    defence has touched are the same whatever the defence.
    """
    content = read_published(name)
    section, _, key = measure.partition(".")
    if content["section"] != section:
        return None
    keys = [each for each in wanted if each != "defense" or section != "undefended"]
    for entry in content["entries"]:
        if key in entry and all(entry.get(each, wanted[each]) == wanted[each] for each in keys):
            return float(entry[key])
    return None
