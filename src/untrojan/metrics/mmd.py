"""Maximum mean discrepancy: how far apart two sets of feature vectors lie (Gretton et al. 2012).

As Xia et al., "Enhancing Backdoor Attacks with Multi-Level MMD Regularization" (2022), use it: to measure how
a model's features of triggered images differ from those of clean images (section 4, table 2), and as a term
of the training loss that makes them alike (section 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating, predictions_of, to_float
from untrojan.models.taps import SDRM_LEVELS, tapped
from untrojan.seeding import generator

if TYPE_CHECKING:
    from untrojan.attacks.poisoning import TriggeredTest

KernelName = Literal["GK1", "GK2", "GK3", "GMK1", "GMK2", "GMK3", "GMK4", "GMK5", "GMK6", "LK"]

KERNELS: Mapping[str, tuple[float, ...]] = {
    "GK1": (1 / 2,),
    "GK2": (1,),
    "GK3": (2,),
    "GMK1": (1 / 2, 1, 2),
    "GMK2": (1 / 4, 1 / 2, 1, 2, 4),
    "GMK3": (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8),
    "GMK4": (1 / 3, 1, 3),
    "GMK5": (1 / 9, 1 / 3, 1, 3, 9),
    "GMK6": (1 / 27, 1 / 9, 1 / 3, 1, 3, 9, 27),
    "LK": (),
}
"""Table 3's kernels by its names: Gaussian, Gaussian mixture, and linear, which has no width.

A number is a width as a multiple of the mean squared distance between different vectors of both sets, as in
the paper's released code: k(x, y) is the *sum* over the multiples c of exp(-|x - y|^2 / (c * mean))."""

FEWEST = 10
"""Images a side below which a difference says more about the sample than about the model."""


def mmd_squared(
    first: Tensor, second: Tensor, kernel: KernelName = "GMK2", *, unbiased: bool = False
) -> Tensor:
    """Squared MMD of two sets of vectors, float32 (); differentiable in both.

    ``first`` (N, ...) and ``second`` (M, ...) are flattened to (N, D) and (M, D). With c widths the biased
    value lies in 0..2c. The kernel's width is a constant to the gradient.

    Biased, the default, keeps each vector's kernel with itself (the V-statistic). It is never below zero, is
    above zero for equal distributions (by 0.012 for GMK2 and 500 long vectors a side), and is what the
    paper's table 2 reports and its released code minimises. ``unbiased``, the U-statistic, leaves them out,
    as the denominators of the paper's equation 3 suggest: it averages zero for equal distributions and may
    be negative.

    Raises UntrojanError where a side is empty (unbiased: has one vector) or their lengths differ.
    """
    first, second = _vectors(first, second, unbiased)
    widths = _widths(kernel)
    if not widths:
        return _linear(first, second, unbiased)
    values = _kernel_matrix(first, second, widths)
    return _estimate(values, len(first), unbiased)


@torch.no_grad()
def mmd_squared_in_blocks(
    first: Tensor, second: Tensor, kernel: KernelName = "GMK2", *, unbiased: bool = False, rows: int = 512
) -> float:
    """:func:`mmd_squared` of large sets, without a gradient.

    Only ``rows`` vectors a side and their ``rows`` x ``rows`` kernel values are held beside the sets.
    """
    if rows < 1:
        raise UntrojanError(f"blocks must have one row or more, not {rows}")
    first, second = _vectors(first, second, unbiased)
    widths = _widths(kernel)
    if not widths:
        return float(_linear(first, second, unbiased))
    count, other = len(first), len(second)
    total = count + other
    centre = (first.sum(0) + second.sum(0)) / total
    blocks = [*first.split(rows), *second.split(rows)]
    sides = [0] * -(-count // rows) + [1] * -(-other // rows)
    squares = [(block - centre).square().sum(1) for block in blocks]
    width = _mean_squared_distance(torch.cat(squares).double())
    sums = [[0.0, 0.0], [0.0, 0.0]]
    for i, block in enumerate(blocks):
        left = block - centre
        for j in range(i, len(blocks)):
            distances = _distances(left @ (blocks[j] - centre).T, squares[i], squares[j])
            found = float(_gaussians(distances, width.float(), widths).sum(dtype=torch.float64))
            # A block and its mirror image below the diagonal hold the same values.
            sums[sides[i]][sides[j]] += found if i == j or sides[i] != sides[j] else 2 * found
    (within, across), (_, within_other) = sums
    if unbiased:
        own, pairs, other_pairs = len(widths), count * (count - 1), other * (other - 1)
        return (
            (within - own * count) / pairs
            + (within_other - own * other) / other_pairs
            - 2 * across / (count * other)
        )
    return within / count**2 + within_other / other**2 - 2 * across / (count * other)


@dataclass(frozen=True)
class TwoSampleTest:
    """Whether two sets of vectors may come from one distribution."""

    mmd_squared: float
    """Biased."""
    p_value: float
    """Share of random splits of all vectors, this one among them, that lie as far apart: above 0, up to 1."""


@torch.no_grad()
def mmd_test(
    first: Tensor, second: Tensor, kernel: KernelName = "GMK2", *, permutations: int = 999, seed: int = 0
) -> TwoSampleTest:
    """Permutation test of equal distributions (Gretton et al., section 5), exact at any sample size.

    The vectors' kernel values are computed once; every permutation only weighs them anew, all at a time, in
    memory of (N + M) x (N + M + ``permutations``) doubles. Raises UntrojanError as :func:`mmd_squared` does.
    """
    if permutations < 1:
        raise UntrojanError(f"a permutation test needs one permutation or more, not {permutations}")
    first, second = _vectors(first.double(), second.double(), unbiased=False)
    count, total = len(first), len(first) + len(second)
    values = _kernel_matrix(first, second, _widths(kernel))
    weights = torch.full((total,), -1 / len(second), dtype=torch.float64)
    weights[:count] = 1 / count
    ranks = torch.rand(permutations, total, generator=generator(seed, "mmd test")).argsort(1)
    splits = torch.cat([weights[None], weights[ranks]]).to(values)
    found = ((splits @ values) * splits).sum(1)
    # The same split met again must count as one as far apart, whatever the order of its sums.
    slack = 1e-12 * float(values.abs().max())
    as_far = int((found[1:] >= found[0] - slack).sum())
    return TwoSampleTest(max(float(found[0]), 0.0), (1 + as_far) / (permutations + 1))


@dataclass(frozen=True)
class LevelDifference:
    """One level's column of the paper's table 2: biased squared MMD between sets of equally many features.

    A field is None where one of its sets would have fewer than :data:`FEWEST` images.
    """

    difference: float | None
    """Clean against triggered images, all predicted as the target."""
    difference_unbiased: float | None
    """The same without its bias, not in the paper: zero on average where there is no difference."""
    intra_class: float | None
    """Two disjoint sets of clean images predicted as the target: what no difference looks like."""
    inter_class: float | None
    """Clean images predicted as the target against those predicted as another class, the least of all."""
    nearest_class: int | None
    """The class for which ``inter_class`` is the least."""
    samples: int
    """Images a side. Biased values of different numbers are not comparable."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def level_differences(
    model: Classifier,
    clean_test: ImageSet,
    triggered: TriggeredTest,
    target: int,
    levels: Sequence[str] = SDRM_LEVELS,
    samples: int = 500,
    seed: int = 0,
    kernel: KernelName = "GMK2",
) -> dict[str, LevelDifference]:
    """How a model's features of triggered images differ from its features of clean ones, level by level.

    The protocol of the paper's section 4 and table 2: only images *predicted* as the class in question
    count, whatever they are. ``samples`` images a side are drawn; where fewer are there, all three distances
    use the fewer (the two intra-class sets are disjoint, so at most half of the clean images predicted as
    the target), because the bias of the squared MMD depends on the number. A class of which fewer still are
    predicted enters ``inter_class`` with all it has; the larger bias only makes it look farther.

    An attack that fails leaves ``difference`` None, it does not raise. Raises UntrojanError for an unknown
    level or target, fewer than :data:`FEWEST` samples, and features that are not finite.
    """
    if not 0 <= target < model.num_classes:
        raise UntrojanError(f"no class {target}: the model has classes 0..{model.num_classes - 1}")
    if samples < FEWEST:
        raise UntrojanError(f"a difference needs {FEWEST} samples a side or more, not {samples}")
    images, predicted = clean_test.images, predictions_of(model, clean_test.images)
    random = generator(seed, "level differences")
    by_class = [_shuffled(predicted == label, random) for label in range(model.num_classes)]
    fooled = _shuffled(predictions_of(model, triggered.images) == target, random)
    count = min(samples, len(by_class[target]) // 2)
    if len(fooled) >= FEWEST:
        count = min(count, len(fooled))
    if count < FEWEST:
        return {level: LevelDifference(None, None, None, None, None, count) for level in levels}

    def distances(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
        return {level: _finite(first[level], second[level], kernel, level) for level in levels}

    own = _features(model, images[by_class[target][:count]], levels)
    intra = distances(own, _features(model, images[by_class[target][count : 2 * count]], levels))
    attacked: Mapping[str, float] = {}
    unbiased: Mapping[str, float] = {}
    if len(fooled) >= FEWEST:
        other = _features(model, triggered.images[fooled[:count]], levels)
        attacked = distances(own, other)
        unbiased = {
            level: mmd_squared_in_blocks(own[level], other[level], kernel, unbiased=True) for level in levels
        }
    inter = {
        label: distances(own, _features(model, images[rows[:count]], levels))
        for label, rows in enumerate(by_class)
        if label != target and len(rows) >= FEWEST
    }
    found = {}
    for level in levels:
        nearest = min(inter, key=lambda label: inter[label][level]) if inter else None
        found[level] = LevelDifference(
            difference=attacked.get(level),
            difference_unbiased=unbiased.get(level),
            intra_class=intra[level],
            inter_class=None if nearest is None else inter[nearest][level],
            nearest_class=nearest,
            samples=count,
        )
    return found


def _shuffled(mask: Tensor, random: torch.Generator) -> Tensor:
    rows = mask.nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=random)]


def _features(model: Classifier, images: Tensor, levels: Sequence[str]) -> dict[str, Tensor]:
    """Flat features (N, D) at several levels from one pass, float32 on the CPU."""
    batches: dict[str, list[Tensor]] = {level: [] for level in levels}
    with torch.no_grad(), evaluating(model), tapped(model, levels) as taps:
        for batch in images.split(512):
            model(to_float(batch, model.device))
            for level in levels:
                batches[level].append(taps[level].flatten(1).cpu())
    return {level: torch.cat(found) for level, found in batches.items()}


def _finite(first: Tensor, second: Tensor, kernel: KernelName, level: str) -> float:
    found = mmd_squared_in_blocks(first, second, kernel)
    if not math.isfinite(found):
        raise UntrojanError(f"the model's features at {level} are not finite: it is broken")
    return found


def _vectors(first: Tensor, second: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    needed = 2 if unbiased else 1
    if min(len(first), len(second)) < needed:
        raise UntrojanError(
            f"the {'unbiased ' if unbiased else ''}MMD needs {needed} or more vectors a side, "
            f"not {len(first)} and {len(second)}"
        )
    first, second = (
        each if each.dtype == torch.float64 else each.float()
        for each in (first.flatten(1), second.flatten(1))
    )
    if first.shape[1] != second.shape[1]:
        raise UntrojanError(f"vectors of {first.shape[1]} and of {second.shape[1]} numbers have no distance")
    return first, second


def _widths(kernel: str) -> tuple[float, ...]:
    if kernel not in KERNELS:
        raise UntrojanError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
    return KERNELS[kernel]


def _linear(first: Tensor, second: Tensor, unbiased: bool) -> Tensor:
    """The squared distance of the means; a product of all pairs would lose digits for the same value."""
    # From a vector among them: far from the origin a float32 mean has few digits left for a difference.
    origin = first[0].detach()
    first, second = first - origin, second - origin
    squared = (first.mean(0) - second.mean(0)).square().sum()
    if not unbiased:
        return squared
    spreads = [each.var(0).sum() / len(each) for each in (first, second)]
    return squared - spreads[0] - spreads[1]


def _kernel_matrix(first: Tensor, second: Tensor, widths: tuple[float, ...]) -> Tensor:
    """(N + M, N + M) kernel values of all vectors."""
    joined = torch.cat([first, second])
    # Distances do not depend on the origin. From their mean the vectors are as short as they can be, and
    # expanding the square then loses no more than the last digits of the width the distances are held to.
    joined = joined - joined.detach().mean(0)
    products = joined @ joined.T
    if not widths:
        return products
    squares = products.diagonal()
    distances = _distances(products, squares, squares)
    return _gaussians(distances, _mean_squared_distance(squares.detach()), widths)


def _distances(products: Tensor, left_squares: Tensor, right_squares: Tensor) -> Tensor:
    return (left_squares[:, None] + right_squares - 2 * products).clamp_min(0)


def _mean_squared_distance(squares: Tensor) -> Tensor:
    """Over all pairs of different vectors, of which ``squares`` are the squared lengths from their mean.

    Where all vectors are one the kernel is the same for any width; it must only not be zero.
    """
    return (2 * squares.sum() / max(len(squares) - 1, 1)).clamp_min(1e-30)


def _gaussians(distances: Tensor, width: Tensor, widths: tuple[float, ...]) -> Tensor:
    scaled = distances / -width
    total = (scaled / widths[0]).exp()
    for multiple in widths[1:]:
        total = total + (scaled / multiple).exp()
    return total


def _estimate(values: Tensor, count: int, unbiased: bool) -> Tensor:
    first, second = values[:count, :count], values[count:, count:]
    across = values[:count, count:].mean()
    if not unbiased:
        return first.mean() + second.mean() - 2 * across
    parts = [(each.sum() - each.trace()) / (len(each) * (len(each) - 1)) for each in (first, second)]
    return parts[0] + parts[1] - 2 * across
