"""Names that come from data: ordered as people order them, and never trusted."""

from __future__ import annotations

import re

from untrojan.errors import UntrojanError

LONGEST_NAME = 1024
DEEPEST_NAME = 32


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key under which "10" comes after "9", with a stable order for "1" and "01"."""
    parts = re.split(r"([0-9]+)", name)
    # Numbers compare by their length, then as text: int() refuses very long ones.
    keys = ((0, len(p.lstrip("0")), p.lstrip("0")) if p[:1].isdecimal() else (1, 0, p) for p in parts if p)
    return tuple(keys), name


def printable(text: str) -> str:
    """``text`` with each control, direction or undecodable character written as a visible escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def member_name(raw: str, archive: str) -> str:
    """An archive member's name as a relative POSIX path.

    Nothing is ever written to it; it is refused all the same where it is absolute or climbs out of the
    archive, because an archive that holds such a name was made to harm.
    """
    shown = printable(raw[:80])
    parts = re.split(r"[/\\]", raw)
    if raw.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", raw) or ".." in parts or "\0" in raw:
        raise UntrojanError(
            f"{archive} holds the name {shown!r}, which points outside it: don't unpack this archive, "
            "ask its maker for one with plain relative names"
        )
    name = "/".join(part for part in raw.split("/") if part not in ("", "."))
    if len(name) > LONGEST_NAME or name.count("/") > DEEPEST_NAME:
        raise UntrojanError(f"{archive} holds a name that is too long or too deep ({shown!r}...): shorten it")
    return name


def base(name: str) -> str:
    """The last part of a path inside a source."""
    return name.rpartition("/")[2]


def is_hidden(name: str) -> bool:
    """Files that tools leave behind: dot files, macOS resource forks."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
