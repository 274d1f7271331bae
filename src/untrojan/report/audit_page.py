"""The page an audit ends with: plain numbers, strings and tensors in, one self-contained HTML file out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from untrojan.defenses.cleansing.report import Verdict
from untrojan.errors import UntrojanError
from untrojan.report import text
from untrojan.report.curves import curves
from untrojan.report.environment import environment
from untrojan.report.heat_map import heat_map, reciprocals_of
from untrojan.report.histogram import Null, reciprocal_histogram
from untrojan.report.images import (
    affordable_side,
    amplification_for,
    data_uri,
    pattern_image,
    reduced,
    reduced_pattern,
)

MOST_DETAILED = 4
"""Target classes shown with pattern and examples; any further ones stand in the table alone."""
MOST_THUMBNAILS = 48
MOST_EXAMPLES = 5
_PATTERN_BYTES, _EXAMPLE_BYTES, _THUMBNAIL_BYTES = 360_000, 480_000, 480_000


@dataclass(frozen=True, eq=False)
class TargetFinding:
    """One class into which poison was put."""

    target: int
    sources: tuple[int, ...] = ()
    """Classes the poison was taken from, the most certain first."""
    p_value: float | None = None
    log10_p_value: float | None = None
    """For a p-value below what a float holds."""
    pattern: Tensor | None = None
    """float (C, H, W) in [-1, 1]: the estimated pattern, in units of the pixel range."""
    true_pattern: Tensor | None = None
    """The pattern that was planted, where it is known (a demo, an evaluation)."""
    flagged: int = 0
    class_size: int = 0
    """Images that carry the target's label; ``flagged`` of them are to be removed."""
    reads_as: Mapping[int, int] = field(default_factory=dict)
    """How many flagged images the probe net calls what, once the pattern is removed."""
    before: Tensor | None = None
    """uint8 (M, C, H, W): examples as given."""
    after: Tensor | None = None
    """uint8 (M, C, H, W): the same with the estimated pattern removed."""
    example_ids: tuple[str, ...] = ()
    read_after: tuple[int, ...] = ()
    """What the probe net calls each example after removal."""


@dataclass(frozen=True, eq=False)
class PairStatistics:
    """What the search found for every class pair."""

    norms: Tensor
    """float (K, K), sources in rows: l2 norm of the smallest pattern found (pixels in [0, 1]); NaN on the
    diagonal, not finite where none was found."""
    null: Null | None = None
    """(shape, location, scale) of the Gamma density fitted to the reciprocals."""

    @property
    def reciprocals(self) -> Tensor:
        """float64 (K, K): 1 / norm, NaN where there is no finite norm."""
        return reciprocals_of(self.norms)


@dataclass(frozen=True, eq=False)
class FlaggedImages:
    """Some of the flagged images, the most suspicious first."""

    images: Tensor
    """uint8 (M, C, H, W)."""
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    predicted: tuple[int, ...] = ()
    """The class the probe net reads after removal of the pattern; empty where it was not asked."""
    truly_poisoned: tuple[bool, ...] = ()
    """Where the truth is known."""
    total: int = 0
    """All flagged images, of which these are some."""
    listing: str = ""
    """Name of the file that lists them all."""

    def __post_init__(self) -> None:
        count = len(self.images)
        for name in ("ids", "labels", "predicted", "truly_poisoned"):
            size = len(getattr(self, name))
            if size != count and (size or name in ("ids", "labels")):
                raise UntrojanError(f"{count} flagged images but {size} {name}: give one for each image")


@dataclass(frozen=True)
class Opinion:
    """One method's answer, where several were asked."""

    method: str
    verdict: Verdict
    targets: tuple[int, ...] = ()
    p_value: float | None = None
    log10_p_value: float | None = None
    flagged: int = 0
    in_common: int = 0
    """Images flagged both by it and by the method that decides."""
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """One model's accuracy on clean test images and, where an attack is known, the attack's success."""

    name: str
    benign_accuracy: float | None = None
    attack_success_rate: float | None = None


@dataclass(frozen=True)
class BeforeAfter:
    """What is known only where the truth is: how well an attack works, and how well cleansing does."""

    scores: tuple[Score, ...] = ()
    true_positive_rate: float | None = None
    """Share of the poisoned images that were flagged."""
    false_positive_rate: float | None = None
    """Share of the target class's clean images that were flagged."""


@dataclass(frozen=True)
class Check:
    """One thing the probe net had to show before its word counts."""

    name: str
    value: str
    passed: bool | None = None
    """None where the check says nothing either way."""
    meaning: str = ""


@dataclass(frozen=True)
class ProbeCheck:
    """The net the audit trained on the set under suspicion, and whether it learned enough to be believed."""

    architecture: str
    checks: tuple[Check, ...] = ()
    accuracy: tuple[float, ...] = ()
    """Training accuracy in [0, 1], an entry an epoch."""
    held_out_accuracy: tuple[float, ...] = ()
    loss: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class StageCost:
    """One row of the cost table; the numbers are those of :class:`untrojan.cost.Cost`."""

    stage: str
    seconds: float
    forwards: int = 0
    backwards: int = 0
    images: int = 0
    peak_memory_mb: float = 0.0


@dataclass(frozen=True)
class RunFacts:
    """What was run, on what, how long."""

    command: str = ""
    method: str = ""
    date: str = ""
    seed: int | None = None
    fingerprint: str = ""
    """Of the data: :meth:`untrojan.data.image_set.ImageSet.fingerprint`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[StageCost, ...] = ()


@dataclass(frozen=True, eq=False)
class AuditPage:
    """Everything a page shows; all but the first four may be missing, and the page then leaves it out."""

    verdict: Verdict
    subject: str
    """What was audited, as its owner calls it."""
    class_names: tuple[str, ...]
    images: int
    image_shape: tuple[int, int, int] | None = None
    reason: str = ""
    """One sentence: why this verdict."""
    p_value: float | None = None
    log10_p_value: float | None = None
    threshold: float = 0.05
    flagged_total: int = 0
    targets: tuple[TargetFinding, ...] = ()
    pairs: PairStatistics | None = None
    flagged: FlaggedImages | None = None
    comparison: BeforeAfter | None = None
    probe: ProbeCheck | None = None
    run: RunFacts | None = None
    opinions: tuple[Opinion, ...] = ()
    """Where several methods were asked: all of them, the one that decides first."""
    notes: tuple[str, ...] = ()
    """Further caveats, a sentence each."""


def render_audit(page: AuditPage) -> str:
    """The page as one HTML document of less than 2 MB: no script, nothing fetched, every name escaped.

    The same page gives the same text. Raises UntrojanError for an unknown verdict.
    """
    if page.verdict not in ("clean", "poisoned", "undecided"):
        raise UntrojanError(f"no verdict {page.verdict!r}: it is clean, poisoned or undecided")
    return (
        environment()
        .get_template("audit.html")
        .render(
            page=page,
            findings=_findings(page),
            heat_map=_heat_map(page),
            smallest=_smallest_pairs(page),
            histogram=_histogram(page),
            thumbnails=thumbnails(page.flagged),
            learning=_learning(page),
            has_failures=_has_failures(page),
        )
    )


def _marked(page: AuditPage) -> list[tuple[int, int]]:
    """Detected (source, target) pairs whose numbers are at hand."""
    if page.pairs is None:
        return []
    size = len(page.pairs.norms)
    pairs = [(source, found.target) for found in page.targets for source in found.sources]
    return [(s, t) for s, t in pairs if 0 <= s < size and 0 <= t < size and s != t]


def _heat_map(page: AuditPage) -> str:
    return heat_map(page.pairs.norms, page.class_names, _marked(page)) if page.pairs else ""


def _smallest_pairs(page: AuditPage, most: int = 10) -> list[dict[str, Any]]:
    """The class pairs with the smallest patterns: the heat map for those who can't see it."""
    if page.pairs is None:
        return []
    norms = page.pairs.norms
    order = torch.where(torch.isfinite(norms), norms, torch.inf).flatten().argsort(stable=True)[:most]
    marked = set(_marked(page))
    rows = []
    for flat in order.tolist():
        source, target = divmod(flat, len(norms))
        norm = float(norms[source, target])
        if source != target and norm < float("inf"):
            rows.append(
                {"source": source, "target": target, "norm": norm, "marked": (source, target) in marked}
            )
    return rows


def _histogram(page: AuditPage) -> str:
    if page.pairs is None:
        return ""
    reciprocals = page.pairs.reciprocals
    inside = torch.ones(len(reciprocals), dtype=torch.bool)
    outliers: dict[str, list[float]] = {}
    for found in page.targets:
        if not 0 <= found.target < len(inside):
            continue
        inside[found.target] = False
        column = reciprocals[:, found.target]
        values = [float(column[s]) for s, t in _marked(page) if t == found.target]
        sources = len(values)
        label = f"→ {text.shown(page.class_names[found.target], 24)}"
        outliers[f"{label} ({sources} source class{'' if sources == 1 else 'es'})"] = values
    return reciprocal_histogram(reciprocals, page.pairs.null, outliers, reciprocals[:, inside])


def _findings(page: AuditPage) -> list[dict[str, Any]]:
    """Each detailed target with its images encoded, all of them within the budgets."""
    detailed = page.targets[:MOST_DETAILED]
    return [{"found": found, **_pictures(found, len(detailed))} for found in detailed]


def _pictures(found: TargetFinding, sharing: int) -> dict[str, Any]:
    patterns = {"estimated": found.pattern, "true": found.true_pattern}
    given = {name: pattern for name, pattern in patterns.items() if pattern is not None}
    factors = {name: amplification_for(pattern) for name, pattern in given.items()}
    if factors and max(factors.values()) <= 4 * min(factors.values()):
        # One factor for both, so that they compare by eye; unless one of them would then vanish.
        factors = dict.fromkeys(factors, min(factors.values()))
    out: dict[str, Any] = {
        name: _pattern_picture(pattern, factors[name], 2 * sharing) for name, pattern in given.items()
    }
    out["examples"] = _examples(found, sharing)
    return out


def _pattern_picture(pattern: Tensor, amplification: int, sharing: int) -> dict[str, Any]:
    side = affordable_side(tuple(pattern.shape), sharing, _PATTERN_BYTES)
    finite = torch.nan_to_num(pattern.detach().float().cpu())
    return {
        "uri": data_uri(pattern_image(reduced_pattern(finite, side), amplification)),
        "amplification": amplification,
        "norm": float(finite.norm()),
        "peak": float(finite.abs().max()) * 255,
        "reduced": max(pattern.shape[-2:]) > side,
    }


def _examples(found: TargetFinding, sharing: int) -> list[dict[str, Any]]:
    if found.before is None or found.after is None:
        return []
    before, after = found.before[:MOST_EXAMPLES], found.after[:MOST_EXAMPLES]
    side = affordable_side(tuple(before.shape[1:]), 3 * MOST_EXAMPLES * sharing, _EXAMPLE_BYTES)
    differences = (before.float() - after.float()) / 255
    amplification = amplification_for(differences)
    return [
        {
            "before": data_uri(reduced(given, side)),
            "after": data_uri(reduced(mended, side)),
            "difference": data_uri(pattern_image(reduced_pattern(difference, side), amplification)),
            "amplification": amplification,
            "id": found.example_ids[i] if i < len(found.example_ids) else "",
            "read_after": found.read_after[i] if i < len(found.read_after) else None,
        }
        for i, (given, mended, difference) in enumerate(zip(before, after, differences, strict=True))
    ]


def thumbnails(flagged: FlaggedImages | None) -> list[dict[str, Any]]:
    """Some of the images, encoded within the budget, with what is known of each."""
    if flagged is None or not len(flagged.images):
        return []
    images = flagged.images[:MOST_THUMBNAILS]
    side = affordable_side(tuple(images.shape[1:]), len(images), _THUMBNAIL_BYTES)
    return [
        {
            "uri": data_uri(reduced(image, side)),
            "id": flagged.ids[i],
            "label": flagged.labels[i],
            "predicted": flagged.predicted[i] if flagged.predicted else None,
            "poisoned": flagged.truly_poisoned[i] if flagged.truly_poisoned else None,
        }
        for i, image in enumerate(images)
    ]


def _has_failures(page: AuditPage) -> bool:
    """Whether some class pair was searched in vain; the diagonal was never searched."""
    if page.pairs is None:
        return False
    return int(torch.isfinite(page.pairs.norms).sum()) < len(page.pairs.norms) * (len(page.pairs.norms) - 1)


def _learning(page: AuditPage) -> list[dict[str, str]]:
    """Learning curves of the probe net, where it left any."""
    probe = page.probe
    if probe is None:
        return []
    lines = {"training": probe.accuracy, "held out": probe.held_out_accuracy}
    accuracy: dict[str, Sequence[float]] = {
        name: [100 * value for value in values] for name, values in lines.items() if values
    }
    loss: dict[str, Sequence[float]] = {"training": probe.loss} if probe.loss else {}
    drawn = (("Accuracy, %", accuracy), ("Loss", loss))
    return [{"label": label, "svg": curves(series, label)} for label, series in drawn if series]
