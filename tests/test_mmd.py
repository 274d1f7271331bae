"""The maximum mean discrepancy: against a plain double loop, closed forms, and its own statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from untrojan.attacks.poisoning import TriggeredTest
from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.metrics import mmd
from untrojan.metrics.mmd import (
    KERNELS,
    KernelName,
    level_differences,
    mmd_squared,
    mmd_squared_in_blocks,
    mmd_test,
)
from untrojan.models.classifier import Classifier
from untrojan.models.taps import features_of
from untrojan.seeding import generator


def gaussian(count: int, size: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, size, generator=generator(seed, "test vectors")) + shift


def double_loop(first: Tensor, second: Tensor, kernel: str, unbiased: bool) -> float:
    """The definition, pair by pair in double precision."""
    xs, ys = first.double().flatten(1), second.double().flatten(1)
    both = [*xs, *ys]
    pairs = list(itertools.combinations(both, 2))
    mean_distance = sum(float((a - b) @ (a - b)) for a, b in pairs) / len(pairs)

    def k(a: Tensor, b: Tensor) -> float:
        if kernel == "LK":
            return float(a @ b)
        return sum(math.exp(-float((a - b) @ (a - b)) / (c * mean_distance)) for c in KERNELS[kernel])

    def within(vectors: Tensor) -> float:
        n = len(vectors)
        if unbiased:
            return sum(k(vectors[i], vectors[j]) for i in range(n) for j in range(n) if i != j) / (n * n - n)
        return sum(k(a, b) for a in vectors for b in vectors) / n**2

    across = sum(k(a, b) for a in xs for b in ys) / (len(xs) * len(ys))
    return within(xs) + within(ys) - 2 * across


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_equals_a_plain_double_loop(kernel: KernelName, unbiased: bool) -> None:
    first, second = gaussian(7, 12, 0).view(7, 3, 2, 2), gaussian(5, 12, 1, shift=0.4).view(5, 3, 2, 2)
    expected = double_loop(first, second, kernel, unbiased)
    assert float(mmd_squared(first, second, kernel, unbiased=unbiased)) == pytest.approx(expected, abs=2e-5)
    for rows in (1, 3, 5, 100):
        found = mmd_squared_in_blocks(first, second, kernel, unbiased=unbiased, rows=rows)
        assert found == pytest.approx(expected, abs=2e-5)


def test_the_papers_kernels_are_all_there_under_its_names() -> None:
    assert set(KERNELS) == {"LK"} | {f"GK{i}" for i in (1, 2, 3)} | {f"GMK{i}" for i in range(1, 7)}
    assert KERNELS["GMK2"] == (0.25, 0.5, 1, 2, 4)


def test_gaussian_kernel_between_two_gaussians_has_its_closed_form() -> None:
    # E exp(-|x - y|^2 / w) = (1 + 4 v / w)^(-d/2) exp(-|m|^2 / (w + 4 v)) for x - y ~ N(m, 2 v I), and
    # the width is the mean squared distance over both sets: 2 d + |m|^2 / 2 for halves N(0, I), N(m, I).
    d, shift = 5, 0.7
    first, second = gaussian(2500, d, 3), gaussian(2500, d, 4, shift=shift)
    apart = d * shift**2
    w = 2 * d + apart / 2
    base = (1 + 4 / w) ** (-d / 2)
    expected = 2 * base * (1 - math.exp(-apart / (w + 4)))
    assert mmd_squared_in_blocks(first, second, "GK2", unbiased=True) == pytest.approx(expected, rel=0.05)


def test_linear_kernel_is_the_squared_distance_of_means() -> None:
    first, second = gaussian(30, 4, 0), gaussian(20, 4, 1, shift=2)
    expected = float((first.mean(0) - second.mean(0)).square().sum())
    assert float(mmd_squared(first, second, "LK")) == pytest.approx(expected, rel=1e-5)


def test_unbiased_averages_zero_for_equal_distributions_and_biased_does_not() -> None:
    draws = [(gaussian(500, 400, 2 * i), gaussian(500, 400, 2 * i + 1)) for i in range(6)]
    biased = [mmd_squared_in_blocks(*draw) for draw in draws]
    unbiased = [mmd_squared_in_blocks(*draw, unbiased=True) for draw in draws]
    # Long Gaussian vectors all lie as far apart as the width, and a vector's kernel with itself is 5.
    own_terms = 2 * (5 - sum(math.exp(-1 / c) for c in KERNELS["GMK2"])) / 500
    assert sum(biased) / len(biased) == pytest.approx(own_terms, abs=0.0005)
    assert 0.010 < own_terms < 0.018, "the paper's intra-class column"
    assert abs(sum(unbiased) / len(unbiased)) < 0.0005
    assert min(unbiased) < 0


@pytest.mark.parametrize("kernel", ["GMK2", "LK"])
def test_large_norms_do_not_drown_the_difference(kernel: KernelName) -> None:
    """In float32 the squares of such vectors are far coarser than the distances between them."""
    far = 3000.0
    first, second = gaussian(20, 64, 0) + far, gaussian(20, 64, 1, shift=0.3) + far
    naive = first.square().sum(1)[:, None] + second.square().sum(1) - 2 * first @ second.T
    true = torch.cdist(first.double(), second.double()).square()
    assert float((naive - true).abs().max()) > 10, "these vectors are no trial"
    for unbiased in (False, True):
        expected = double_loop(first, second, kernel, unbiased)
        found = float(mmd_squared(first, second, kernel, unbiased=unbiased))
        assert found == pytest.approx(expected, rel=1e-4)
        blocked = mmd_squared_in_blocks(first, second, kernel, unbiased=unbiased, rows=8)
        assert blocked == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kernel", ["GMK2", "GMK6", "LK"])
def test_one_vector_over_and_over_is_no_difference(kernel: KernelName) -> None:
    same = torch.full((6, 3), 0.1)
    assert float(mmd_squared(same, same, kernel)) == 0
    assert mmd_squared_in_blocks(same[:2], same, kernel) == 0
    given = same.clone().requires_grad_()
    mmd_squared(given, same, kernel).backward()
    assert given.grad is not None
    assert bool(given.grad.isfinite().all())


def test_sets_far_apart_reach_the_upper_bound_of_the_kernel() -> None:
    apart = torch.cat([torch.zeros(200, 2), torch.full((200, 2), 5.0)])
    expected = sum(2 - 2 * math.exp(-1 / c * 399 / 200) for c in KERNELS["GMK2"])
    assert float(mmd_squared(apart[:200], apart[200:])) == pytest.approx(expected, rel=1e-4)
    assert expected < 10


@pytest.mark.parametrize("kernel", ["GMK2", "LK"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_gradient_is_that_of_the_formula_with_its_width_held(kernel: KernelName, unbiased: bool) -> None:
    first, second = gaussian(4, 3, 0).double(), gaussian(5, 3, 1).double()
    joined = torch.cat([first, second])
    width = float(torch.pdist(joined).square().mean())
    step = 1e-6

    def held(x: Tensor) -> float:
        both = torch.cat([x, second])
        if kernel == "LK":
            values = both @ both.T
        else:
            distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
            values = sum(((-distances / (c * width)).exp() for c in KERNELS[kernel]), torch.zeros(()))
        if unbiased:
            values = values - values.diag().diag()
        n, m = (4 * 3, 5 * 4) if unbiased else (16, 25)
        return float(values[:4, :4].sum() / n + values[4:, 4:].sum() / m - 2 * values[:4, 4:].mean())

    given = first.clone().requires_grad_()
    mmd_squared(given, second, kernel, unbiased=unbiased).backward()
    assert given.grad is not None
    for place in itertools.product(range(4), range(3)):
        bump = torch.zeros_like(first)
        bump[place] = step
        slope = (held(first + bump) - held(first - bump)) / (2 * step)
        assert float(given.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_blocks_hold_no_more_than_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    whole = mmd._gaussians

    def watched(distances: Tensor, width: Tensor, widths: tuple[float, ...]) -> Tensor:
        shapes.append(tuple(distances.shape))
        return whole(distances, width, widths)

    monkeypatch.setattr(mmd, "_gaussians", watched)
    mmd_squared_in_blocks(gaussian(50, 3, 0), gaussian(70, 3, 1), rows=16)
    assert max(max(shape) for shape in shapes) == 16
    assert len(shapes) == (4 + 5) * 10 // 2


def test_p_values_are_uniform_under_the_null_and_small_under_a_shift() -> None:
    null = [
        mmd_test(gaussian(15, 3, 2 * i), gaussian(20, 3, 2 * i + 1), permutations=99, seed=i).p_value
        for i in range(200)
    ]
    # Binomial: 200 draws at 0.1, 0.5 and 0.9 have standard deviations of 0.021, 0.035 and 0.021.
    for level, slack in ((0.1, 0.07), (0.5, 0.12), (0.9, 0.07)):
        assert abs(sum(p <= level for p in null) / len(null) - level) < slack
    shifted = mmd_test(gaussian(25, 3, 0), gaussian(25, 3, 1, shift=1.5), permutations=199)
    assert shifted.p_value == 1 / 200
    assert mmd_test(gaussian(25, 3, 0), gaussian(25, 3, 1, shift=1.5), "LK").p_value == 1 / 1000


def test_p_value_counts_ties_and_repeats_itself() -> None:
    same = torch.ones(4, 2)
    assert mmd_test(same, same, permutations=50).p_value == 1
    # The same vectors on both sides: no split lies nearer than at zero, which rounding makes a hair more.
    for seed in range(10):
        assert mmd_test(gaussian(3, 5, seed), gaussian(3, 5, seed), permutations=99).p_value == 1
    # Of two and two vectors there are three splits into halves: a third of all lie as far apart.
    pairs = torch.tensor([[0.0], [0.1]]), torch.tensor([[5.0], [5.1]])
    assert mmd_test(*pairs, permutations=3000).p_value == pytest.approx(1 / 3, abs=0.03)
    first, second = gaussian(10, 3, 0), gaussian(10, 3, 1)
    found = mmd_test(first, second, seed=4)
    assert found == mmd_test(first, second, seed=4)
    assert found.mmd_squared == pytest.approx(float(mmd_squared(first, second)), abs=1e-6)


def test_impossible_sets_are_clear_errors() -> None:
    one, many = torch.zeros(1, 3), torch.zeros(4, 3)
    with pytest.raises(UntrojanError, match="1 or more vectors a side, not 0 and 4"):
        mmd_squared(one[:0], many)
    with pytest.raises(UntrojanError, match="unbiased MMD needs 2 or more vectors a side, not 4 and 1"):
        mmd_squared_in_blocks(many, one, unbiased=True)
    with pytest.raises(UntrojanError, match="vectors of 3 and of 2 numbers"):
        mmd_squared(many, torch.zeros(4, 2))
    with pytest.raises(UntrojanError, match="unknown kernel 'RBF': choose one of GK1"):
        mmd_squared(many, many, "RBF")  # type: ignore[arg-type]
    with pytest.raises(UntrojanError, match="one row or more"):
        mmd_squared_in_blocks(many, many, rows=0)
    with pytest.raises(UntrojanError, match="one permutation or more"):
        mmd_test(many, many, permutations=0)


class ByBrightness(nn.Module):
    """Predicts 0, 1 or 2 by brightness, through an activation that the levels find."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.ReLU()
        self.classes = nn.Linear(1, 3)
        with torch.no_grad():
            self.classes.weight.copy_(torch.tensor([[-9.0], [0.0], [9.0]]))
            self.classes.bias.copy_(torch.tensor([3.0, 0.0, -6.0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.keep(images).mean((1, 2, 3))[:, None])  # type: ignore[no-any-return]


def by_brightness() -> Classifier:
    return Classifier(ByBrightness(), 3, torch.zeros(1), torch.ones(1))


def bright(count: int, low: int, high: int, seed: int) -> Tensor:
    source = generator(seed, "test images", low, high)
    return torch.randint(low, high, (count, 1, 4, 4), generator=source, dtype=torch.uint8)


def a_test(
    dark: int = 60, medium: int = 40, light: int = 40, fooled: int = 50
) -> tuple[ImageSet, TriggeredTest]:
    """Dark, medium and light images are predicted 0, 1 and 2, whatever they are labelled."""
    images = torch.cat([bright(dark, 0, 60, 0), bright(medium, 100, 150, 1), bright(light, 200, 255, 2)])
    labels = torch.zeros(len(images), dtype=torch.int64)
    clean = ImageSet(images, labels, ("a", "b", "c"), numbered(len(images)))
    # Those that are not fooled are light, and far from all: they must not count.
    stamped = torch.cat([bright(fooled, 20, 80, 3), bright(30, 240, 255, 4)])
    wanted, true = torch.zeros(len(stamped), dtype=torch.int64), torch.ones(len(stamped), dtype=torch.int64)
    return clean, TriggeredTest(stamped, wanted, true)


def test_level_differences_compare_what_is_predicted_as_the_target() -> None:
    model, (clean, triggered) = by_brightness().train(), a_test()
    found = level_differences(model, clean, triggered, target=0, levels=["s3"], samples=500)["s3"]
    assert found.samples == 30, "two disjoint halves of the 60 dark images"
    assert found.nearest_class == 1
    assert model.training
    assert found.difference is not None
    assert found.intra_class is not None
    assert found.inter_class is not None
    assert found.difference_unbiased is not None
    assert 0 < found.intra_class < found.difference < found.inter_class

    assert found.difference_unbiased < found.difference

    fooled = TriggeredTest(*(each[:50] for each in (triggered.images, triggered.wanted_labels, clean.labels)))
    assert level_differences(model, clean, fooled, target=0, levels=["s3"])["s3"] == found


def test_level_differences_are_the_mmd_of_the_images_drawn() -> None:
    """Ten images a side, of twenty and ten: what is drawn is known but for which half is which."""
    model = by_brightness()
    clean, triggered = a_test(dark=20, medium=10, light=0, fooled=10)
    clean.images[:20] = torch.arange(20, dtype=torch.uint8).div(10, rounding_mode="floor").view(-1, 1, 1, 1)
    found = level_differences(model, clean, triggered, 0, ["s3"], kernel="LK")["s3"]
    stamped = features_of(model, triggered.images[:10], "s3").mean(0)
    possible = [float((stamped - (ones / 10) / 255).square().sum()) for ones in range(11)]
    which = min(range(11), key=lambda ones: abs(possible[ones] - (found.difference or 0)))
    assert found.difference == pytest.approx(possible[which], rel=1e-4)
    assert found.intra_class == pytest.approx(16 * ((10 - 2 * which) / 10 / 255) ** 2, abs=1e-9)


def test_level_differences_follow_the_seed_alone() -> None:
    model, (clean, triggered) = by_brightness(), a_test()
    found = [level_differences(model, clean, triggered, 0, ["s3"], 12, seed)["s3"] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert found[0].samples == 12


def test_a_failed_attack_and_a_rare_class_give_none_and_never_nan() -> None:
    model = by_brightness()
    clean, triggered = a_test(fooled=9)
    failed = level_differences(model, clean, triggered, 0, ["s3"])["s3"]
    assert (failed.difference, failed.difference_unbiased, failed.samples) == (None, None, 30)
    assert failed.intra_class is not None
    clean, triggered = a_test(dark=19)
    rare = level_differences(model, clean, triggered, 0, ["s3"])["s3"]
    assert rare.to_json() == {
        "difference": None, "difference_unbiased": None, "intra_class": None, "inter_class": None,
        "nearest_class": None, "samples": 9,
    }  # fmt: skip
    clean, triggered = a_test(medium=9, light=0)
    alone = level_differences(model, clean, triggered, 0, ["s3"])["s3"]
    assert (alone.inter_class, alone.nearest_class) == (None, None)
    assert alone.difference is not None


def test_level_differences_refuse_what_cannot_be() -> None:
    model, (clean, triggered) = by_brightness(), a_test()
    with pytest.raises(UntrojanError, match=r"no class 3: the model has classes 0\.\.2"):
        level_differences(model, clean, triggered, 3)
    with pytest.raises(UntrojanError, match="10 samples a side or more, not 9"):
        level_differences(model, clean, triggered, 0, samples=9)
    with pytest.raises(UntrojanError, match="no level 's1'"):
        level_differences(model, clean, triggered, 0, ["s1"])
