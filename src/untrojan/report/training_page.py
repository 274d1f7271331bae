"""The page a training ends with: what was left out, which neurons were reset, how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.report.audit_page import MOST_THUMBNAILS, FlaggedImages, RunFacts, thumbnails
from untrojan.report.curves import curves
from untrojan.report.environment import environment
from untrojan.report.text import number

MOST_CHANNELS = 24
"""Channels named of each layer."""

ABOUT: Mapping[str, tuple[str, str]] = {
    "plain": (
        "Plain training",
        "No defence: whatever was hidden in the images has been learned with them.",
    ),
    "none": (
        "NONE",
        "A backdoor makes some neurons answer to its trigger and to nothing else. After training, such "
        "neurons were looked for, the images that excite them were left out where these form a group of "
        "their own, the neurons were reset and training went on.",
    ),
    "abl": (
        "Anti-backdoor learning",
        "Poisoned images are learned before all others. The images learned first were set aside, the model "
        "was trained on the rest and then made to unlearn those set aside.",
    ),
    "dp-sgd": (
        "DP-SGD",
        "The pull of each image on the model was bounded, and noise was added at every step: a few poisoned "
        "images cannot move the model far. Neither can rare honest ones, which costs accuracy.",
    ),
    "dbd": (
        "Decoupling-based defence",
        "Features were learned without labels. Images whose labels these features do not bear out kept their "
        "pixels and lost their labels: they were trained on as unlabelled ones.",
    ),
    "cleanse-none": (
        "Cleansing, then NONE",
        "A probe net trained on the set was questioned as in an audit and the images found were left out. "
        "NONE then trained on the rest, left out what excites the neurons of a patch and reset these.",
    ),
    "pgd": (
        "Adversarial training",
        "At every step each image was changed, within a small bound, to what the model got wrong: what leads "
        "from one class to another must then be larger than that. No image was left out.",
    ),
    "uap": (
        "Universal adversarial training",
        "One perturbation for all images, within a small bound, was kept as harmful as could be while the "
        "model learned to withstand it. No image was left out.",
    ),
}
"""By the defence's name: a title, and what it did in words."""


@dataclass(frozen=True)
class Layer:
    """A layer in which neurons were reset."""

    name: str
    width: int
    """Channels in all."""
    channels: tuple[int, ...]
    """Those reset, the worst first."""


@dataclass(frozen=True, eq=False)
class TrainingPage:
    """Everything the page shows; all but the first five may be missing."""

    defense: str
    """A key of :data:`ABOUT`, or any other name."""
    subject: str
    """The data, as their owner calls them."""
    architecture: str
    class_names: tuple[str, ...]
    images: int
    dropped: FlaggedImages | None = None
    """Some of the images left out; None where the method leaves out none."""
    dropped_by_class: tuple[tuple[int, int, int], ...] = ()
    """(class, left out, of how many) of classes that lost any, the largest loss first."""
    layers: tuple[Layer, ...] = ()
    history: tuple[Mapping[str, float], ...] = ()
    """An entry an epoch, with ``accuracy`` and ``loss``."""
    benign_accuracy: float | None = None
    training_accuracy: float | None = None
    findings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    run: RunFacts | None = None


def training_page(
    train: ImageSet,
    *,
    defense: str,
    subject: str,
    architecture: str,
    dropped: Tensor | None = None,
    evidence: Mapping[str, Any] | None = None,
    widths: Mapping[str, int] | None = None,
    history: Sequence[Mapping[str, float]] = (),
    benign_accuracy: float | None = None,
    training_accuracy: float | None = None,
    run: RunFacts | None = None,
    listing: str = "",
) -> TrainingPage:
    """From what a training has in hand to its page.

    ``dropped`` is bool (N,); ``evidence`` a training report's; ``widths`` the channels of each layer that the
    evidence may name; ``listing`` the file that names all dropped images.
    """
    evidence = evidence or {}
    last: Mapping[str, Any] = (evidence.get("rounds") or [{}])[-1]
    compromised = last.get("compromised") or {}
    return TrainingPage(
        defense=defense,
        subject=subject,
        architecture=architecture,
        class_names=train.class_names,
        images=len(train),
        dropped=None if dropped is None else _some(train, dropped, listing),
        dropped_by_class=() if dropped is None else _by_class(train, dropped),
        layers=tuple(
            Layer(name, (widths or {}).get(name, 0), tuple(channels))
            for name, channels in compromised.items()
            if channels
        ),
        history=tuple(history),
        benign_accuracy=benign_accuracy,
        training_accuracy=training_accuracy,
        findings=tuple(_findings({**evidence, **last})),
        notes=(*evidence.get("notes", ()), *last.get("notes", ())),
        run=run,
    )


def render_training(page: TrainingPage) -> str:
    """The page as one HTML document: no script, nothing fetched, every name escaped."""
    title, meaning = ABOUT.get(page.defense, (page.defense, ""))
    template = environment().get_template("training.html")
    return template.render(
        page=page,
        title=title,
        meaning=meaning,
        thumbnails=thumbnails(page.dropped),
        drawn=_drawn(page.history),
        most_channels=MOST_CHANNELS,
    )


def _some(train: ImageSet, dropped: Tensor, listing: str) -> FlaggedImages:
    """Thumbnails spread evenly over the rows left out."""
    rows = dropped.nonzero().flatten()
    every = max(1, -(-len(rows) // MOST_THUMBNAILS))
    chosen = rows[::every]
    return FlaggedImages(
        images=train.images[chosen],
        ids=tuple(map(str, train.ids[chosen.numpy()])),
        labels=tuple(train.labels[chosen].tolist()),
        total=len(rows),
        listing=listing,
    )


def _by_class(train: ImageSet, dropped: Tensor) -> tuple[tuple[int, int, int], ...]:
    lost = torch.bincount(train.labels[dropped], minlength=train.num_classes)
    order = lost.argsort(descending=True, stable=True).tolist()
    return tuple((c, int(lost[c]), int(train.class_counts[c])) for c in order if int(lost[c]))


def _findings(evidence: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Evidence that fits on a line, as words and values; ``cost`` stands in the table of costs."""
    found: list[tuple[str, str]] = []
    for key, value in evidence.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, Mapping) and key not in ("compromised", "cost"):
            found += _findings(value, f"{name}: ")
        elif isinstance(value, str):
            found.append((name, value))
        elif isinstance(value, bool):
            found.append((name, "yes" if value else "no"))
        elif isinstance(value, int | float):
            found.append((name, number(value)))
        elif value is None and key == "epsilon":
            found.append((name, "unbounded, without noise"))
    return found


def _drawn(history: Sequence[Mapping[str, float]]) -> list[dict[str, str]]:
    series = {
        "Accuracy while training, %": [100 * epoch["accuracy"] for epoch in history],
        "Loss": [epoch["loss"] for epoch in history],
    }
    drawn = {label: curves({"training": values}, label) for label, values in series.items() if values}
    return [{"label": label, "svg": svg} for label, svg in drawn.items() if svg]
