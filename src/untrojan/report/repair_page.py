"""The page a repair ends with: what changed, at what price, and what was not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from untrojan.distance_change import UNITS, DistanceChange
from untrojan.report.audit_page import RunFacts
from untrojan.report.curves import curves
from untrojan.report.environment import environment
from untrojan.report.images import affordable_side, data_uri, reduced
from untrojan.triggers.base import to_bytes

METHODS: Mapping[str, tuple[str, str]] = {
    "finetune": (
        "standard fine-tuning",
        "It is trained on for a few epochs, with a learning rate that falls soon.",
    ),
    "fine-pruning": (
        "fine-pruning",
        "Channels of the last convolution that clean images leave idle are silenced as long as accuracy "
        "lasts, and the rest is fine-tuned.",
    ),
    "nad": (
        "neural attention distillation (NAD)",
        "A fine-tuned copy teaches it where to look: their attention maps are brought together.",
    ),
    "mcr": (
        "mode connectivity repair (MCR)",
        "A curve of low loss is trained between it and a fine-tuned copy, and a point in between is kept.",
    ),
    "unlearning": (
        "unlearning of inverted triggers",
        "Triggers that Neural Cleanse inverts are stamped on images that keep their right labels.",
    ),
    "neuron-pruning": (
        "pruning of the neurons that an inverted trigger excites",
        "Neurons are silenced in the order in which the trigger that Neural Cleanse inverts excites them.",
    ),
    "abs": (
        "artificial brain stimulation (ABS)",
        "Channels that raise one class on all images are searched, a patch and a filter that excite each are "
        "inverted, and what works best is stamped on images that keep their right labels.",
    ),
    "anp": (
        "adversarial neuron pruning (ANP)",
        "Neurons whose perturbed weights mislead it most are silenced as long as accuracy lasts.",
    ),
    "clp": (
        "channel Lipschitz pruning (CLP)",
        "Channels that answer far more strongly than the rest of their layer can are silenced, by the "
        "weights alone.",
    ),
    "ft-sam": (
        "sharpness-aware fine-tuning (FT-SAM)",
        "Fine-tuning looks for flat minima, which moves the large weights of a backdoor further.",
    ),
    "i-bau": (
        "implicit backdoor adversarial unlearning (I-BAU)",
        "The universal perturbation that misleads it most is found and unlearned, round after round.",
    ),
    "moth": (
        "hardening against patches (MOTH)",
        "It is trained on images with patches that make one class look like another, rightly labelled, so "
        "that larger ones are needed.",
    ),
    "deck": (
        "hardening against pervasive backdoors (DECK)",
        "It is trained on images that were changed all over so that one class looks like another, in their "
        "features, by a warping, a filter or a patch, rightly labelled, so that larger changes are needed.",
    ),
}
"""Methods in words, and what each does to the model."""
TITLES: Mapping[str, str] = {name: title for name, (title, _) in METHODS.items()}

_PICTURE_BYTES = 200_000
_GENERATED_BYTES = 300_000


@dataclass(frozen=True, eq=False)
class Look:
    """One scan of a model, before or after."""

    verdict: str
    reason: str
    smallest_class: int | None = None
    smallest_pixels: float | None = None
    """The sum of the smallest working trigger's mask, in pixels."""
    mask: Tensor | None = None
    """float (1, H, W) in [0, 1]: the trigger itself."""
    pattern: Tensor | None = None
    """float (C, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Tried:
    """One of the methods that were tried."""

    method: str
    benign_accuracy: float | None
    smallest_pixels: float | None
    seconds: float
    chosen: bool
    within_tolerance: bool
    scanned: bool = True
    error: str = ""


@dataclass(frozen=True, eq=False)
class RepairPage:
    """Everything a page shows; what is missing is left out."""

    subject: str
    """The model's file."""
    method: str
    class_names: tuple[str, ...]
    accuracy_before: float
    accuracy_after: float
    held_out: int
    """Images on which accuracy was measured."""
    held_out_split: str
    repair_images: int
    tolerance: float
    history: Mapping[str, Any] = field(default_factory=dict)
    """The repair's: its tables become curves."""
    before: Look | None = None
    after: Look | None = None
    tried: tuple[Tried, ...] = ()
    distance: DistanceChange | None = None
    run: RunFacts | None = None

    @property
    def costly(self) -> bool:
        """Whether accuracy fell by more than the tolerance."""
        return self.accuracy_before - self.accuracy_after > self.tolerance + 1e-9

    @property
    def tone(self) -> str:
        """The colour of the verdict, by the audit's names for them."""
        suspect = self.after is not None and self.after.verdict != "clean"
        return "undecided" if self.costly or suspect else "clean"

    @property
    def title(self) -> str:
        return TITLES.get(self.method, self.method)

    @property
    def what_it_does(self) -> str:
        return METHODS[self.method][1] if self.method in METHODS else ""


def render_repair(page: RepairPage) -> str:
    """The page as one HTML document: no script, nothing fetched, every name escaped; the same page gives the
    same text."""
    return (
        environment()
        .get_template("repair.html")
        .render(
            page=page,
            titles=TITLES,
            curves=_curves(page.history),
            pictures=_pictures(page),
            distances=None if page.distance is None else _distances(page.distance),
        )
    )


def _distances(change: DistanceChange) -> dict[str, Any]:
    """Figures of the change, and the images that were generated, encoded within the page's budget."""
    shown = change.images
    shape = tuple(shown[0].clean.shape) if shown else (3, 8, 8)
    side = affordable_side(shape, 2 * len(shown), _GENERATED_BYTES)
    examples = [
        {
            "image": each,
            "clean": data_uri(reduced(each.clean, side)),
            "generated": data_uri(reduced(each.generated, side)),
        }
        for each in shown
    ]
    return {**change.to_json(), "unit": UNITS[change.measure], "examples": examples}


def _curves(history: Mapping[str, Any]) -> list[dict[str, str]]:
    """What happened, as drawings: training by stage, pruning by step, accuracy along a curve."""
    drawn: list[tuple[str, Mapping[str, Sequence[float]], str]] = []
    epochs = history.get("epochs") or []
    stages = list(dict.fromkeys(str(row.get("stage", "training")) for row in epochs))
    for label, key, factor in (
        ("Training loss", "loss", 1),
        ("Fit to the training images, %", "accuracy", 100),
    ):
        series = {
            stage: [factor * row[key] for row in epochs if str(row.get("stage", "training")) == stage]
            for stage in stages
        }
        drawn.append((label, series, "epoch"))
    looks = history.get("looks") or []
    names = {"benign_accuracy": "clean images right", "trigger_success": "inverted trigger works"}
    pruning = {
        name: [100 * row[key] for row in looks] for key, name in names.items() if looks and key in looks[0]
    }
    drawn.append(("While pruning, %", pruning, "look"))
    places = [100 * row["benign_accuracy"] for row in history.get("curve") or []]
    drawn.append(
        ("Validation images right along the curve, %", {"t = 0 to 1": places} if places else {}, "place")
    )
    return [
        {"label": label, "svg": curves(series, label, x_label)}
        for label, series, x_label in drawn
        if any(len(values) > 1 for values in series.values())
    ]


def _pictures(page: RepairPage) -> list[dict[str, Any]]:
    """The smallest triggers before and after, on grey."""
    looks = (("Before", page.before), ("After", page.after))
    return [
        {
            "when": when,
            "look": look,
            "uri": _picture(look.mask, look.pattern),
        }
        for when, look in looks
        if look is not None and look.mask is not None and look.pattern is not None
    ]


def _picture(mask: Tensor, pattern: Tensor) -> str:
    shown = to_bytes((1 - mask) * torch.full_like(pattern, 0.5) + mask * pattern).cpu()
    return data_uri(reduced(shown, affordable_side(tuple(shown.shape), 2, _PICTURE_BYTES)))
