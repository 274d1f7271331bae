"""Words and numbers for a page: hostile text made harmless, figures made readable."""

from __future__ import annotations

import math
import unicodedata

# Control, format (bidirectional overrides, zero-width), lone surrogate, private and unassigned code points;
# line and paragraph separators. Escaping for HTML stops none of these from disguising a name.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def shown(text: object, limit: int = 48) -> str:
    """Text from a data owner as one harmless line of at most ``limit`` characters; still to be HTML-escaped.

    Invisible, control and direction-changing characters appear as ``⟨U+202E⟩`` and the like, accents are
    cut to two a letter, and what is too long keeps its head and its end, where a path says most.
    """
    raw = str(text)
    if len(raw) > 4 * limit:
        raw = raw[: 2 * limit] + raw[-2 * limit :]
    marks, out = 0, []
    for character in raw:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if category in _INVISIBLE:
            out.append(f"⟨U+{ord(character):04X}⟩")
        elif category == "Zs":
            out.append(" ")
        elif marks <= 2:
            out.append(character)
    line = "".join(out).strip()
    if len(line) > limit:
        head = (limit - 1) // 2
        line = line[:head] + "…" + line[len(line) - (limit - 1 - head) :]
    return line or "(no name)"


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.941 as ``94.1 %``, which no line breaks in two; ``–`` where there is none."""
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands grouped; ``–`` where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or abs(value) >= 10**digits or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return scientific(math.copysign(1, value), math.log10(abs(value)))
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def scientific(sign: float, log10: float) -> str:
    """``2.4 × 10⁻¹⁴`` from a sign and a base-10 logarithm, which may lie far below what a float holds."""
    exponent = math.floor(log10)
    mantissa = round(10 ** (log10 - exponent), 1)
    if mantissa >= 10:
        mantissa, exponent = 1.0, exponent + 1
    head = "" if mantissa == 1 else f"{mantissa:g} × "
    return f"{'−' if sign < 0 else ''}{head}10{str(exponent).translate(_SUPERSCRIPTS)}"


def p_value(value: float | None, log10: float | None = None) -> str:
    """A p-value, from its logarithm where the value itself has underflowed."""
    if log10 is None and value is not None and value > 0:
        log10 = math.log10(value)
    if log10 is None or math.isnan(log10):
        return "–" if value is None or math.isnan(value) else "0"
    if math.isinf(log10):
        return "0"
    if log10 < -3:
        return scientific(1, log10)
    return f"{10**log10:.2g}"


def rarity(value: float | None, log10: float | None = None) -> str:
    """How often chance alone would do it, in words: ``fewer than 1 in a million``; empty above 1 in 20."""
    if log10 is None:
        log10 = math.log10(value) if value else (-math.inf if value == 0 else math.nan)
    for power, words in ((-12, "a million million"), (-9, "a billion"), (-6, "a million")):
        if log10 < power:
            return f"fewer than 1 in {words}"
    if log10 <= math.log10(0.05) + 1e-9:
        return f"about 1 in {round(10**-log10):,}"
    return ""


def duration(seconds: float | None) -> str:
    """``0.42 s``, ``38 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
