"""The one template environment."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from untrojan.report import text

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """Autoescaping, strict about undefined names, with the filters that make text and numbers presentable."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("untrojan.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        shown=text.shown,
        percent=text.percent,
        number=text.number,
        duration=text.duration,
        grouped=lambda count: f"{count:,}",
    )
    made.globals.update(p_value=text.p_value, rarity=text.rarity)
    return made
