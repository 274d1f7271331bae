"""ABS: stimulate every inner channel, and invert triggers for those that raise one class on all images.

Liu et al., "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation", CCS 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport, blind_to
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import ANY, Adam, Schedule, invert
from untrojan.inversion.stimulated import Released, StimulatedPattern
from untrojan.models.classifier import Classifier, evaluating, predictions_of, to_float
from untrojan.models.taps import SDRM_LEVELS, Place, edited, levels_of, place_of, tapped
from untrojan.progress import task
from untrojan.seeding import generator
from untrojan.triggers.base import to_bytes

STRENGTHS: dict[Released, tuple[float, ...]] = {
    "pytorch": (0.5, 1.0),
    "tensorflow": (1.6, 3.2, 4.8, 6.4),
}
"""Values a channel is set to, besides 0, in units of the layer's largest activation."""

MOST_CANDIDATES: dict[Released, int] = {"pytorch": 10, "tensorflow": 20}

PAPER = Schedule(
    Adam(0.1, (0.9, 0.999)), images_a_side=24, flip_fraction=0.99, confirm_every=50, most_steps=1000,
    stall_steps=10**9, images_a_forward=480,
)  # fmt: skip
FAST = replace(PAPER, stepper=Adam(0.1, (0.5, 0.9)), images_a_side=16, confirm_every=20, most_steps=300)

_STIMULATED_VALUES = 1 << 24
"""Values of one layer's activations in one forward at most: 64 MiB."""
_IMAGES_A_FORWARD = 32


@dataclass(frozen=True)
class Candidate:
    """A channel under suspicion."""

    level: str
    channel: int
    label: int
    """The class it raises."""
    gain: float
    """The least of its gains over images of other classes, see :func:`margins`."""


def margins(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class a stimulated channel raises most, and by how much more than any other, (...,) each.

    ``logits`` are (V, ..., K): with the channel at 0 first, then at V - 1 values above. A class's elevation
    is the largest logit above 0 less that at 0 (the released code's form of the paper's NSF).
    """
    elevation = logits[1:].amax(0) - logits[0]
    best = elevation.topk(2, -1)
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1]


@torch.no_grad()
def stimulate(
    model: Classifier, images: Tensor, place: Place, channels: int, values: Tensor, elements: int
) -> tuple[Tensor, Tensor]:
    """:func:`margins` of every channel at ``place`` on every image, int64 and float (C, N).

    ``images`` are uint8 (N, C, H, W), ``values`` (V,) with 0 first: what a channel is set to on every place.
    ``elements`` is the number of values the level has for one image. Many channels go through in one
    forward. Where nothing after the level depends on what came before it but by way of it, the layers up to
    it see each image once a forward; else the images are repeated.
    """
    raised = torch.empty(channels, len(images), dtype=torch.int64)
    gaps = torch.empty(channels, len(images))
    with evaluating(model), task("stimulating channels", channels * len(images), "channels x images") as bar:
        alone = _is_bottleneck(model, to_float(images[:2], model.device), place)
        for rows in torch.arange(len(images)).split(_IMAGES_A_FORWARD):
            batch = to_float(images[rows], model.device)
            many = max(1, _STIMULATED_VALUES // (elements * len(values) * len(batch)))
            for some in torch.arange(channels).split(min(many, 1024)):
                logits = _stimulated(model, batch, place, some, values, alone)
                label, gap = margins(logits)
                raised[some[:, None], rows], gaps[some[:, None], rows] = label.cpu(), gap.cpu()
                bar.advance(len(some) * len(rows))
    return raised, gaps


def _stimulated(
    model: Classifier, images: Tensor, place: Place, channels: Tensor, values: Tensor, alone: bool
) -> Tensor:
    """Logits (V, B, N, K) with each of B channels at each of V values."""
    count = len(values) * len(channels)
    which, each = channels.repeat(len(values)), values.repeat_interleave(len(channels))

    def edit(features: Tensor) -> Tensor:
        many = features[None].expand(count, *features.shape) if alone else features.unflatten(0, (count, -1))
        many = many.clone()
        many[torch.arange(count), :, which] = each.to(many).view(-1, *[1] * (many.ndim - 2))
        flat: Tensor = many.flatten(0, 1)
        return flat

    with edited(model, place, edit):
        logits: Tensor = model(images if alone else images.repeat(count, 1, 1, 1))
    split: Tensor = logits.unflatten(0, (len(values), len(channels), len(images)))
    return split


def _is_bottleneck(model: Classifier, images: Tensor, place: Place) -> bool:
    """Whether everything after ``place`` is computed from it alone, found out by repeating it."""
    if len(images) < 2:
        return False
    try:
        with edited(model, place, lambda features: features.repeat(3, *[1] * (features.ndim - 1))):
            repeated = model(images)
    # What layers say that are given two different numbers of images, or a shape noted earlier.
    except (RuntimeError, ValueError, IndexError):
        return False
    plain = model(images)
    return repeated.shape == (3 * len(images), plain.shape[1]) and torch.allclose(
        repeated.unflatten(0, (3, -1)), plain.expand(3, *plain.shape), rtol=1e-3, atol=1e-4
    )


def suspicious(
    raised: Tensor, gaps: Tensor, labels: Tensor, agreement: float
) -> list[tuple[int, int, float]]:
    """(channel, class, gain) where one class is raised most on at least the share ``agreement`` of images.

    ``raised`` and ``gaps`` are (C, N), ``labels`` (N,). The gain is the least over those of the agreeing
    images that are not of the class themselves; a channel without such images, or without gain, is left
    out. Largest gain first.
    """
    winner = raised.mode(1).values
    agree = raised == winner[:, None]
    counted = agree & (labels != winner[:, None])
    gain = torch.where(counted, gaps, torch.inf).amin(1)
    kept = (agree.double().mean(1) >= agreement) & counted.any(1) & (gain > 0)
    order = gain.argsort(descending=True, stable=True)
    return [(int(c), int(winner[c]), float(gain[c])) for c in order if kept[c]]


def chosen(candidates: list[Candidate], rule: Released) -> list[Candidate]:
    """The best of all layers' candidates: the top ten of one a class (PyTorch, NONE), or the top twenty of
    three a layer (TensorFlow)."""
    of_group: dict[object, int] = {}
    found = []
    for each in sorted(candidates, key=lambda each: -each.gain):
        group, most = (each.label, 1) if rule == "pytorch" else (each.level, 3)
        of_group[group] = of_group.get(group, 0) + 1
        if of_group[group] <= most:
            found.append(each)
    return found[: MOST_CANDIDATES[rule]]


@dataclass(frozen=True, eq=False)
class Patch:
    """A candidate's inverted trigger."""

    candidate: Candidate
    bound: int
    """Pixels it may have."""
    trigger: InvertedTrigger
    success: float
    """REASR: the share of clean images of other classes that it carries to the candidate's class."""

    def to_json(self) -> dict[str, Any]:
        pixels = int(self.trigger.mask.sum())
        return {**asdict(self.candidate), "bound": self.bound, "pixels": pixels, "reasr": self.success}


@dataclass(frozen=True)
class Stimulation:
    """What ABS and the study of natural backdoors have in common."""

    levels: tuple[str, ...] = ()
    """Layers to stimulate: s1, s2, s3, penultimate or module paths. By default those of s1 to s3 that the
    network has, else penultimate."""
    released: Released = "pytorch"
    """Which released code's rules for stimulation strengths, the choice of candidates and the size penalty:
    the PyTorch one, which NONE uses, or the TensorFlow one."""
    schedule: Literal["fast", "paper"] = "fast"
    """``paper``: 1,000 steps; ``fast``: 300."""
    images_to_stimulate: Annotated[int, Ge(1)] = 5
    """Clean images a class; NONE's code takes 20, the TensorFlow code 1."""
    images_to_invert: Annotated[int, Ge(1)] = 24
    """Clean images a class. The trigger is then tried on all of them."""
    pattern_space: Literal["pixels", "normalised"] = "pixels"
    """``pixels``: the pattern reaches every colour. ``normalised``: as released, values in [0, 1] after the
    model's normalisation, which are only the colours from its mean to one deviation above."""
    seed: int = 0

    def candidates(self, model: Classifier, clean: ImageSet) -> list[Candidate]:
        """Channels that raise one class on all images, the best of all layers."""
        sample = sampled(clean, self.images_to_stimulate, self.seed)
        # Everything but two of the TensorFlow code's ten images, or all but a tenth.
        agreement = 0.9 if self.released == "pytorch" else max(0.5, 1 - 2 / max(1, len(sample)))
        found = []
        for level in self._levels(model, clean):
            place = place_of(model, to_float(clean.images[:1], model.device), level)
            peak, channels, elements = _range(model, sample.images, level)
            values = peak * torch.tensor([0.0, *STRENGTHS[self.released]])
            raised, gaps = stimulate(model, sample.images, place, channels, values, elements)
            found += [
                Candidate(level, *each)
                for each in suspicious(raised, gaps, sample.labels, agreement)
                if each[1] < clean.num_classes
            ]
        return chosen(found, self.released)

    def _levels(self, model: Classifier, clean: ImageSet) -> tuple[str, ...]:
        if self.levels:
            return self.levels
        found = levels_of(model, to_float(clean.images[:1], model.device))
        usual = tuple(level for level in SDRM_LEVELS if level in found)
        if not usual and "penultimate" not in found:
            raise UntrojanError(
                "this network has no layer before its last to stimulate: name one by its path"
            )
        return usual or ("penultimate",)

    def invert(
        self,
        model: Classifier,
        clean: ImageSet,
        candidates: list[Candidate],
        sizes: tuple[float, ...],
        checkpoint: Path | None = None,
    ) -> list[Patch]:
        """Every candidate's patch at every size (shares of all pixels), in that order, in one search."""
        if not candidates:
            return []
        levels = tuple(dict.fromkeys(each.level for each in candidates))
        pixels = clean.image_shape[1] * clean.image_shape[2]
        bounds = [max(1, int(size * pixels)) for size in sizes]
        pairs = torch.tensor([
            [ANY, each.label, levels.index(each.level), each.channel, bound]
            for each in candidates for bound in bounds
        ])  # fmt: skip
        low, high = self._colours(model, clean.image_shape[0])
        problem = StimulatedPattern(levels, low, high, self.released)
        found = invert(
            model, sampled(clean, self.images_to_invert, self.seed), pairs, problem,
            PAPER if self.schedule == "paper" else FAST, seed=self.seed, checkpoint=checkpoint,
            description="inverting candidates",
        )  # fmt: skip
        masks, patterns = problem.patches(found.parameters, pairs[:, -1])
        triggers = [InvertedTrigger(*each) for each in zip(masks, patterns, strict=True)]
        owners = [(each, bound) for each in candidates for bound in bounds]
        return [
            Patch(each, bound, trigger, success_of(trigger, model, clean, each.label))
            for (each, bound), trigger in zip(owners, triggers, strict=True)
        ]

    def _colours(self, model: Classifier, channels: int) -> tuple[Tensor, Tensor]:
        low, high = torch.zeros(channels), torch.ones(channels)
        if self.pattern_space == "normalised":
            mean, std = (each.flatten().cpu().expand(channels) for each in (model.mean, model.std))
            low, high = mean.clamp(0, 1), (mean + std).clamp(0, 1)
        return low, high


@dataclass(frozen=True)
class ABS(Stimulation):
    """Artificial brain stimulation, the mask form.

    A model is taken for backdoored where an inverted patch carries over at least ``limit`` of the clean
    images of other classes. Models without any attack can have such patches too, and the more the larger
    they may be: see :class:`~untrojan.defenses.scanning.natural.NaturalTrojans`.
    """

    size: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """The share of the image's pixels a patch may have: ten at 32 x 32, enough for BadNets' nine. Published
    bounds vary and are larger; small clean nets were seen to have patches that work at 2 % for half of their
    classes."""
    limit: Annotated[float, Gt(0)] = 0.8

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> ScanReport:
        """Scan ``model`` with clean images, rightly labelled. Neither is changed.

        Raises UntrojanError for a level the network lacks, or where the model's classes are not the images'.
        """
        blind = blind_to(model, clean)
        patches = self.invert(model, clean, self.candidates(model, clean), (self.size,), checkpoint)
        best = best_by_class(patches)
        targets = tuple(label for label, patch in best.items() if patch.success >= self.limit)
        return ScanReport(
            verdict="undecided" if blind else "poisoned" if targets else "clean",
            targets=() if blind else targets,
            statistics=class_statistics(best, clean.num_classes),
            triggers={label: best[label].trigger for label in targets},
            reason=blind or self._reason(clean, patches, targets),
            evidence={"candidates": [patch.to_json() for patch in patches]},
        )

    def _reason(self, clean: ImageSet, patches: list[Patch], targets: tuple[int, ...]) -> str:
        if not patches:
            return "no inner channel raises one class on all images"
        best = max(patches, key=lambda patch: patch.success)
        each = best.candidate
        shown = (
            f"a patch of {int(best.trigger.mask.sum())} pixels that excites channel {each.channel} of "
            f"{each.level} carries {best.success:.0%} of other classes' images to "
            f"{clean.class_names[each.label]!r}"
        )
        return (
            shown
            if targets
            else f"of {len(patches)} suspicious channels none is a backdoor's: at most {shown}"
        )


def best_by_class(patches: list[Patch]) -> dict[int, Patch]:
    """Each class's most successful patch, the most successful class first."""
    found: dict[int, Patch] = {}
    for patch in sorted(patches, key=lambda patch: -patch.success):
        found.setdefault(patch.candidate.label, patch)
    return found


def class_statistics(best: dict[int, Patch], classes: int) -> dict[int, dict[str, float]]:
    """REASR, pixels and gain by class; nothing where a class has no candidate."""
    return {
        label: {
            "reasr": best[label].success,
            "mask_size": float(best[label].trigger.mask.sum()),
            "gain": best[label].candidate.gain,
        }
        if label in best
        else {}
        for label in range(classes)
    }


def success_of(trigger: Callable[[Tensor], Tensor], model: Classifier, clean: ImageSet, label: int) -> float:
    """The share of clean images of other classes than ``label`` that the trigger, in bytes, carries there."""
    others = clean.images[clean.labels != label]
    if not len(others):
        return 0.0
    stamped = torch.cat([to_bytes(trigger(to_float(batch))) for batch in others.split(4096)])
    return float((predictions_of(model, stamped) == label).double().mean())


def sampled(clean: ImageSet, a_class: int, seed: int) -> ImageSet:
    """At most ``a_class`` random images of every class."""
    order = torch.randperm(len(clean), generator=generator(seed, "stimulated images"))
    by_class = order[clean.labels[order].argsort(stable=True)]
    counts = clean.class_counts
    places = torch.arange(len(clean)) - (counts.cumsum(0) - counts)[clean.labels[by_class]]
    return clean.select(by_class[places < a_class].sort().values)


def _range(model: Classifier, images: Tensor, level: str) -> tuple[float, int, int]:
    """Of a level's features over the images: the largest value, the channels, the values of one image."""
    peak, shape = 0.0, torch.Size()
    with torch.no_grad(), evaluating(model), tapped(model, [level]) as taps:
        for batch in images.split(512):
            model(to_float(batch, model.device))
            peak, shape = max(peak, float(taps[level].max())), taps[level].shape
    if len(shape) not in (2, 4):
        raise UntrojanError(f"level {level!r} gives {len(shape)} dimensions: name one with channels")
    return peak, shape[1], shape[1:].numel()
