"""Class distance: how little turns one class into another, for all ordered pairs; a backdoor is a short cut.

Tao et al., "Model Orthogonalization: Class Distance Hardening in Neural Networks for Better Security" (MOTH),
S&P 2022; the protocol is that of Tao et al., "DECK: Model Hardening for Defending Pervasive Backdoors",
section III: some images of the one class, so many steps, most must flip, the smallest of three trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.data.sampling import some_of_each
from untrojan.defenses.outliers import anomaly_indices
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport, blind_to
from untrojan.inversion.engine import Inversion, Problem, Schedule, Shrink, all_pairs, invert
from untrojan.inversion.filters import second_moments
from untrojan.inversion.generators import FeatureGenerator, FilterGenerator, Generator, MaskGenerator
from untrojan.inversion.masked import MaskedPattern
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.metrics.class_distance import measured
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import frozen
from untrojan.seeding import generator as random_stream

MOST_NUMBERS = 1 << 25
"""Parameters searched for at a time, an eighth of a gigabyte: DECK's are half a million a pair."""
FEWEST_PAIRS = 6
"""Fewer measured pairs have no median to stand out from."""


@dataclass(frozen=True, eq=False)
class Distances:
    """All that was measured."""

    matrix: Tensor
    """float (K, K), sources in rows: NaN on the diagonal and where no trial met the constraint."""
    flips: Tensor
    """float (K, K): the share of the source's images that flip, the best trial's; NaN where not tried."""
    pairs: Tensor
    """int64 (P, 2): those tried."""
    parameters: Tensor | None
    """float (P, ...): the nearest trial's transformation; None where all would be too large to keep."""

    def tensors(self) -> dict[str, Tensor]:
        """All that there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Distances:
        """What :meth:`tensors` gave."""
        return cls(tensors["matrix"], tensors["flips"], tensors["pairs"], tensors.get("parameters"))


def schedule_of(
    generator: Generator, steps: int, flip_fraction: float, paper: bool, images_a_forward: int = 512
) -> Schedule:
    """How hard to look for a distance.

    The paper's: ``steps`` times through a hundred images in batches of 32, the cost changed by half after
    ten epochs of one kind. Else ``steps`` batches of ten, and the cost changed twice as much after 20.
    """
    if paper:
        shrink = Shrink(generator.cost, look_every=4, patience=10, confirm=True)
        return Schedule(
            generator.stepper, 32, flip_fraction, None, most_steps=4 * steps,
            images_a_forward=images_a_forward, shrink=shrink,
        )  # fmt: skip
    shrink = Shrink(generator.cost, look_every=10, patience=2, rise=2.0, fall=2.0**1.5, confirm=True)
    return Schedule(
        generator.stepper, 10, flip_fraction, None, most_steps=steps, images_a_forward=images_a_forward,
        shrink=shrink,
    )  # fmt: skip


def class_distances(
    model: Classifier,
    data: ImageSet,
    generator: Generator,
    schedule: Schedule,
    *,
    pairs: Tensor | None = None,
    images: int = 100,
    trials: int = 3,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> Distances:
    """The distance of each of ``pairs``, int64 (P, 2), or of all K(K-1), many in one batch.

    A trial draws ``images`` of each class and sets out from parameters of its own. A pair's distance is the
    mean movement of the images that flip, the smallest over the trials that met the constraint: a failure is
    never a small distance. ``schedule`` must shrink.

    Raises UntrojanError where a class of a pair has no images or the model another number of classes.
    """
    pairs = all_pairs(data.num_classes) if pairs is None else pairs
    best = torch.full((len(pairs),), float("inf"))
    flips = torch.zeros(len(pairs))
    one = generator.problem(seed).initial(pairs[:1], data.image_shape)[0]
    numbers = one.numel()
    parameters = torch.zeros(len(pairs), *one.shape) if len(pairs) * numbers <= MOST_NUMBERS else None
    group = max(1, MOST_NUMBERS // numbers)
    for trial in range(trials):
        sample = some_of_each(data, images, seed, trial)
        problem = generator.problem(seed + trial)
        for number, places in enumerate(torch.arange(len(pairs)).split(group)):
            name = f"{trial}-{number}-{checkpoint.name}" if checkpoint else ""
            found = invert(
                model, sample, pairs[places], problem, schedule, seed=seed + trial,
                checkpoint=checkpoint.with_name(name) if checkpoint else None,
                description=f"class distances, trial {trial + 1} of {trials}",
            )  # fmt: skip
            distances = _movement(model, sample, generator, problem, found)
            nearer = found.solved & (distances < best[places])
            best[places[nearer]] = distances[nearer]
            flips[places] = torch.maximum(flips[places], found.flip_fraction)
            if parameters is not None:
                parameters[places[nearer]] = found.parameters[nearer]
    matrix = torch.full((data.num_classes, data.num_classes), float("nan"))
    shares = matrix.clone()
    matrix[pairs[:, 0], pairs[:, 1]] = torch.where(best.isfinite(), best, torch.nan)
    shares[pairs[:, 0], pairs[:, 1]] = flips
    return Distances(matrix, shares, pairs, parameters)


@torch.no_grad()
def _movement(
    model: Classifier, sample: ImageSet, generator: Generator, problem: Problem, found: Inversion
) -> Tensor:
    """Mean movement (P,) of each pair's flipped images; infinite where none flips."""
    asked = frozen(model)
    means = torch.full((len(found.pairs),), float("inf"))
    for place in found.solved.nonzero().flatten().tolist():
        source, target = found.pairs[place].tolist()
        images = to_float(sample.images[sample.indices_of(source)], model.device)[None]
        parameters = found.parameters[place : place + 1].to(model.device)
        flipped = asked(problem.embed(parameters, images)[0]).argmax(1) == target
        if flipped.any():
            means[place] = generator.moved(problem, parameters, images)[0, flipped].mean()
    return means


def exceptionally_small(distances: Tensor, error: float = 0.05) -> tuple[Tensor, Tensor, float, float]:
    """Anomaly indices of classes as targets (K,) and of pairs (K, K), and the limit for either.

    On logarithms, for distances vary by a factor rather than by a difference. A target's is the median over
    its sources, a failed pair counting as infinitely far; NaN where that is not finite. A pair must stand out
    twice, among all pairs and from what is ordinary for its source and its target, and has the lesser index:
    a class that everything is near to, or that is near to everything, makes no pair remarkable. NaN for pairs
    without a distance. Of so many normally distributed values one lies beyond the limit with probability
    ``error``.
    """
    logs = torch.where(measured(distances), distances.double().clamp_min(1e-12).log(), torch.inf)
    count = len(distances)
    others = ~torch.eye(count, dtype=torch.bool)
    columns = logs.T[others].view(count, count - 1)
    middles = columns.sort(1).values[:, (count - 2) // 2]
    targets, pairs = torch.full_like(middles, torch.nan), torch.full_like(logs, torch.nan)
    targets[middles.isfinite()] = anomaly_indices(-middles[middles.isfinite()])
    left = median_polish(torch.where(logs.isfinite(), logs, torch.nan))
    raw, kept = anomaly_indices(-logs[logs.isfinite()]), anomaly_indices(-left[logs.isfinite()])
    pairs[logs.isfinite()] = torch.minimum(raw, kept)
    limits = [largest_by_chance(int(each.isfinite().sum()), error) for each in (targets, pairs)]
    return targets, pairs, limits[0], limits[1]


@lru_cache
def largest_by_chance(count: int, error: float, draws: int = 2000) -> float:
    """The anomaly index that the largest of ``count`` normal values exceeds with probability ``error``.

    Drawn rather than read off the normal distribution: the median absolute deviation of ten values is
    itself so uncertain that the normal quantile would be exceeded five times as often as meant.
    """
    if count < 2:
        return float("inf")
    stream = random_stream(0, "largest by chance", count)
    largest = [float(anomaly_indices(values).max()) for values in torch.randn(draws, count, generator=stream)]
    return float(torch.tensor(largest).quantile(1 - error))


def median_polish(values: Tensor, rounds: int = 10) -> Tensor:
    """Values (K, K) less their rows' and columns' medians, NaN where they are (Tukey 1977, chapter 11).

    Rows and columns with fewer than three values keep what they have: they have nothing to be compared with.
    """
    left = values.clone()
    for _ in range(rounds):
        for dim in (1, 0):
            enough = (~left.isnan()).sum(dim, keepdim=True) >= 3
            middle = left.nanquantile(0.5, dim, keepdim=True)
            left = left - torch.where(enough, middle, 0.0)
    return left


@dataclass(frozen=True)
class ClassDistance:
    """Measure all class distances, and suspect a class or a pair that is exceptionally near."""

    measure: Literal["mask", "filter", "feature"] = "mask"
    """``mask``: MOTH's, the pixels of a patch. ``filter``: the grey levels that ABS's filter changes.
    ``feature``: DECK's, the change of an encoder's features."""
    schedule: Literal["fast", "paper"] = "fast"
    images: Annotated[int, Ge(1)] = 100
    """Of each class."""
    steps: Annotated[int, Ge(10)] = 300
    flip_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.9
    trials: Annotated[int, Ge(1)] = 3
    pairs: Annotated[int, Ge(6)] | None = None
    """So many random pairs instead of all, where K(K-1) are too many; DECK takes 20 for TrojAI's models."""
    error: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    """How often one of all classes, or of all pairs, may stand out by chance."""
    encoder: str = "local"
    """For ``feature``: a name of :func:`untrojan.models.encoders.load_encoder`."""
    relative: bool = False
    """For ``feature``: :attr:`~untrojan.inversion.feature_space.FeatureSpacePattern.relative`. The paper's
    way counts what normalising and decoding do to an image before anything is searched for; with a decoder
    of a few images that is most of the distance, and hardening moves only the rest."""
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> ScanReport:
        """Scan ``model`` with clean images, rightly labelled. Neither is changed.

        ``evidence["distances"]`` is the (K, K) matrix as lists, None on the diagonal and for pairs that were
        not tried or never flipped; ``evidence["failed_pairs"]`` and ``evidence["suspicious_pairs"]`` are
        lists of (source, target). Raises UntrojanError where the model's classes are not the images'.
        """
        found = self.distances(model, clean, self.generator(model, clean), checkpoint=checkpoint)
        return self.judge(found, model, clean)

    def distances(
        self, model: Classifier, data: ImageSet, generator: Generator, *, checkpoint: Path | None = None
    ) -> Distances:
        """:func:`class_distances` by these settings. Raises UntrojanError as that does."""
        schedule = schedule_of(generator, self.steps, self.flip_fraction, self.schedule == "paper")
        return class_distances(
            model, data, generator, schedule, pairs=self.chosen_pairs(data.num_classes),
            images=self.images, trials=self.trials, seed=self.seed, checkpoint=checkpoint,
        )  # fmt: skip

    def generator(self, model: Classifier, clean: ImageSet) -> Generator:
        """What the distances are measured with."""
        if self.measure == "filter":
            sample = some_of_each(clean, self.images, self.seed, "moments")
            return FilterGenerator(second_moments(sample.images.float() / 255))
        if self.measure == "feature":
            from untrojan.models.decoders import prepare_decoder

            encoder, decoder = prepare_decoder(self.encoder, clean, seed=self.seed, device=str(model.device))
            return FeatureGenerator(encoder, decoder, precision=model.precision, relative=self.relative)
        return MaskGenerator()

    def chosen_pairs(self, num_classes: int) -> Tensor:
        """int64 (P, 2), in the order of :func:`~untrojan.inversion.engine.all_pairs`."""
        pairs = all_pairs(num_classes)
        if self.pairs is None or self.pairs >= len(pairs):
            return pairs
        drawn = torch.randperm(len(pairs), generator=random_stream(self.seed, "pairs"))[: self.pairs]
        return pairs[drawn.sort().values]

    def judge(self, found: Distances, model: Classifier, clean: ImageSet) -> ScanReport:
        """The verdict on measured distances."""
        by_target, by_pair, target_limit, pair_limit = exceptionally_small(found.matrix, self.error)
        if len(found.pairs) < clean.num_classes * (clean.num_classes - 1):
            # A few sources of a target say nothing of the others.
            by_target = torch.full_like(by_target, torch.nan)
        suspects = (by_target > target_limit).nonzero().flatten().tolist()
        suspects.sort(key=lambda label: -float(by_target[label]))
        near = (by_pair > pair_limit).nonzero().tolist()
        near.sort(key=lambda pair: -float(by_pair[tuple(pair)]))
        # What leads everywhere into a class shortens single ways elsewhere, too.
        targets = suspects or list(dict.fromkeys(target for _, target in near))
        blind = self._blind(found, model, clean)
        failed = found.pairs[found.matrix[found.pairs[:, 0], found.pairs[:, 1]].isnan()]
        return ScanReport(
            verdict="undecided" if blind else "poisoned" if targets else "clean",
            targets=() if blind else tuple(targets),
            statistics=_statistics(found.matrix, by_target, by_pair),
            triggers=self._triggers(found),
            failed=tuple((~measured(found.matrix).any(0)).nonzero().flatten().tolist()),
            reason=blind or self._reason(found.matrix, suspects, near, clean),
            evidence={
                "distances": _json(found.matrix),
                "flip_fractions": _json(found.flips),
                "failed_pairs": failed.tolist(),
                "suspicious_pairs": [] if blind else near,
                "target_limit": target_limit,
                "pair_limit": pair_limit,
                "images_a_class": min(self.images, int(clean.class_counts.min())),
                "benign_accuracy": benign_accuracy(model, clean),
            },
        )

    def _triggers(self, found: Distances) -> dict[int, InvertedTrigger]:
        """The smallest mask into each class."""
        if self.measure != "mask" or found.parameters is None:
            return {}
        masks, patterns = MaskedPattern().trigger(found.parameters)
        sizes = found.matrix[found.pairs[:, 0], found.pairs[:, 1]]
        order = sizes.nan_to_num(nan=float("inf")).argsort(descending=True).tolist()
        return {
            int(found.pairs[place, 1]): InvertedTrigger(masks[place], patterns[place])
            for place in order
            if bool(sizes[place].isfinite())
        }

    def _blind(self, found: Distances, model: Classifier, clean: ImageSet) -> str:
        """Why distances carry no verdict, or nothing where they do."""
        solved = int(measured(found.matrix).sum())
        if solved < max(FEWEST_PAIRS, len(found.pairs) / 2):
            return f"{solved} of {len(found.pairs)} class pairs have a distance: too few to compare"
        return blind_to(model, clean)

    def _reason(
        self, matrix: Tensor, suspects: list[int], near: list[list[int]], clean: ImageSet
    ) -> str:  # fmt: skip
        finite = matrix[measured(matrix)]
        middle, unit = float(finite.median()), "pixels" if self.measure == "mask" else "squared levels"
        if suspects:
            column = matrix[:, suspects[0]]
            typical = float(column[column.isfinite()].median())
            name = clean.class_names[suspects[0]]
            return (
                f"{name!r} is exceptionally near from other classes: {typical:.3g} {unit} in the median, "
                f"{middle:.3g} over all pairs"
            )
        nearest = near[0] if near else (matrix == finite.min()).nonzero()[0].tolist()
        source, target = (clean.class_names[label] for label in nearest)
        shortest = float(matrix[tuple(nearest)])
        which = f"from {source!r} to {target!r} ({shortest:.3g} {unit}, median {middle:.3g})"
        if near:
            return f"an exceptionally short way leads {which}"
        return f"no class and no pair is exceptionally near; the shortest way leads {which}"


def _statistics(matrix: Tensor, by_target: Tensor, by_pair: Tensor) -> dict[int, dict[str, float]]:
    out: dict[int, dict[str, float]] = {}
    for label in range(len(matrix)):
        column = matrix[:, label]
        known = column[column.isfinite()]
        out[label] = {"pairs_measured": len(known)}
        if len(known):
            index = float(by_pair[:, label].nan_to_num(nan=-1e9).max())
            out[label] |= {
                "median_distance": float(known.median()), "least_distance": float(known.min()),
                "pair_anomaly_index": index,
            }  # fmt: skip
        if bool(by_target[label].isfinite()):
            out[label]["anomaly_index"] = float(by_target[label])
    return out


def _json(matrix: Tensor) -> list[list[float | None]]:
    return [[value if value == value else None for value in row] for row in matrix.tolist()]
