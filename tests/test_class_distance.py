"""Class distances of models whose distances are known, and what is made of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.sampling import some_of_each
from untrojan.defenses.scanning.class_distance import (
    ClassDistance,
    class_distances,
    exceptionally_small,
    schedule_of,
)
from untrojan.defenses.scanning.registry import SCANNERS
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import all_pairs
from untrojan.inversion.filters import FilterMatrix, neighbourhoods, second_moments
from untrojan.inversion.generators import FilterGenerator, MaskGenerator
from untrojan.metrics.class_distance import relative_increase
from untrojan.models.classifier import Classifier

SHADES = (60, 100, 180)


def by_brightness(shades: tuple[int, ...] = SHADES) -> tuple[Classifier, ImageSet]:
    """Grey images of a few shades, and a linear model of the mean pixel that tells them apart."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(30 * len(shades)) % len(shades)
    levels = torch.tensor(shades, dtype=torch.float32)[labels].view(-1, 1, 1, 1)
    images = (levels + 2 * torch.randn(len(labels), 3, 6, 6, generator=random)).to(torch.uint8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, len(shades)))
    centres = torch.tensor(shades) / 255
    with torch.no_grad():
        # -(mean - centre)^2 / 2 less what all classes share.
        network[1].weight.copy_(400 * centres[:, None].expand(-1, 108) / 108)
        network[1].bias.copy_(-200 * centres.square())
    names = tuple(f"shade {shade}" for shade in shades)
    model = Classifier(network, len(shades), torch.zeros(3), torch.ones(3))
    return model, ImageSet(images, labels, names, numbered(len(labels)))


def test_distances_of_shades_are_ordered_as_the_shades_and_near_the_least_mask() -> None:
    model, data = by_brightness()
    model.train()
    generator = MaskGenerator()
    found = class_distances(model, data, generator, schedule_of(generator, 300, 0.9, paper=False), trials=2)
    assert bool(found.matrix.diagonal().isnan().all())
    assert float(found.flips[0, 1]) >= 0.9
    # A white pixel lifts the mean by (255 - shade) / 36; the way to the middle between two shades is needed.
    least = {(0, 1): 36 * 20 / 195, (1, 2): 36 * 40 / 155, (2, 1): 36 * 40 / 180, (1, 0): 36 * 20 / 100}
    for pair, pixels in least.items():
        assert 0.95 * pixels < float(found.matrix[pair]) < 1.3 * pixels
    assert found.matrix[0, 1] < found.matrix[1, 0] < found.matrix[2, 1] < found.matrix[1, 2]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_distances_do_not_depend_on_batching() -> None:
    model, data = by_brightness()
    generator = MaskGenerator()
    together, apart = (
        class_distances(model, data, generator, schedule_of(generator, 40, 0.9, False, images), trials=1)
        for images in (512, 10)
    )
    torch.testing.assert_close(together.matrix, apart.matrix, equal_nan=True, atol=1e-3, rtol=1e-3)


def test_an_interrupted_measurement_is_not_measured_again(tmp_path: Path) -> None:
    model, data = by_brightness()
    generator = MaskGenerator()
    schedule = schedule_of(generator, 40, 0.9, False)
    place = tmp_path / "inversion.safetensors"
    first = class_distances(model, data, generator, schedule, trials=2, checkpoint=place)
    assert len(list(tmp_path.iterdir())) == 2
    again = class_distances(model, data, generator, schedule, trials=2, checkpoint=place)
    assert torch.equal(first.matrix.nan_to_num(), again.matrix.nan_to_num())


def test_a_class_out_of_reach_has_no_distance() -> None:
    model, data = by_brightness()
    with torch.no_grad():
        model.network[1].bias[1] = -1e6  # type: ignore[index, union-attr]
    report = ClassDistance(steps=20, trials=1)(model, data)
    assert report.failed == (1,)
    assert report.verdict == "undecided"
    assert [row[1] for row in report.evidence["distances"]] == [None, None, None]
    assert [0, 1] in report.evidence["failed_pairs"]
    assert "median_distance" not in report.statistics[1]
    # A count, which pages show as one: 2, not 2.00.
    assert repr([report.statistics[label]["pairs_measured"] for label in range(3)]) == "[2, 0, 2]"


def test_pairs_can_be_drawn_and_are_checked() -> None:
    scanner = SCANNERS.build("class-distance", {"pairs": 7, "seed": 3})
    assert isinstance(scanner, ClassDistance)
    drawn = scanner.chosen_pairs(20)
    assert len(drawn.unique(dim=0)) == 7
    assert bool((drawn[:, 0] != drawn[:, 1]).all())
    assert len(scanner.chosen_pairs(3)) == 6
    with pytest.raises(UntrojanError, match="measure"):
        SCANNERS.build("class-distance", {"measure": "miles"})


def ordinary(classes: int, seed: int) -> Tensor:
    """Distances that differ by their source, by their target and by chance."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = 0.2 * torch.randn(2, classes, generator=random)
    noise = 0.2 * torch.randn(classes, classes, generator=random)
    return (40 * (rows[:, None] + columns + noise).exp()).fill_diagonal_(math.nan)


def test_false_alarms_are_rare() -> None:
    alarms = 0
    for seed in range(100):
        targets, pairs, target_limit, pair_limit = exceptionally_small(ordinary(10, seed))
        alarms += bool((targets > target_limit).any() or (pairs > pair_limit).any())
    assert 1 <= alarms <= 14


def test_a_short_cut_from_everywhere_and_from_one_class_are_told_apart() -> None:
    universal = ordinary(10, 0)
    universal[:, 3] /= 8
    targets, _, limit, _ = exceptionally_small(universal)
    assert (targets > limit).nonzero().flatten().tolist() == [3]
    single = ordinary(10, 1)
    single[5, 2] /= 12
    single[4, 6] = math.nan
    targets, pairs, target_limit, pair_limit = exceptionally_small(single)
    assert (pairs > pair_limit).nonzero().tolist() == [[5, 2]]
    assert not bool((targets > target_limit).any())
    assert bool(pairs[4, 6].isnan())


def test_relative_increase_is_the_mean_of_ratios_without_failures() -> None:
    nan = math.nan
    before = torch.tensor([[nan, 10.0, 20.0], [5.0, nan, 40.0], [8.0, nan, nan]])
    after = torch.tensor([[nan, 15.0, 20.0], [10.0, nan, nan], [6.0, 99.0, nan]])
    # (0, 1) +50 %, (0, 2) 0, (1, 0) +100 %, (2, 0) -25 %; (1, 2) and (2, 1) each failed once.
    assert relative_increase(before, after) == pytest.approx((0.5 + 0 + 1 - 0.25) / 4)
    assert relative_increase(before.fill_diagonal_(1.0), after) == pytest.approx(1.25 / 4)
    assert math.isnan(relative_increase(torch.full((2, 2), nan), torch.ones(2, 2)))
    with pytest.raises(UntrojanError, match=r"\(K, K\)"):
        relative_increase(before, after[:2])


def test_each_class_gives_as_many_images_as_it_has() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2, 2, 1])
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    data = ImageSet(images, labels, ("a", "b", "c"), numbered(7))
    chosen = some_of_each(data, 2, seed=0)
    assert chosen.class_counts.tolist() == [1, 2, 2]
    assert len(chosen.images.unique()) == 5
    assert bool((labels[chosen.images.flatten().long()] == chosen.labels).all())


@pytest.mark.parametrize("window", [1, 3, 5])
def test_neighbourhoods_are_pools(window: int) -> None:
    images = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    seen = neighbourhoods(images[:, None], window)[:, 0]
    largest = F.max_pool2d(images, window, 1, window // 2)
    mean = F.avg_pool2d(images, window, 1, window // 2, count_include_pad=False)
    smallest = -F.max_pool2d(-images, window, 1, window // 2)
    torch.testing.assert_close(seen, torch.cat([images, largest, smallest, mean], 1))


def test_a_filters_size_is_the_change_of_its_images() -> None:
    images = 0.3 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    problem = FilterMatrix(second_moments(images, 5), window=5, noise=0.02)
    parameters = problem.initial(all_pairs(2), (3, 8, 8))
    embedded = problem.embed(parameters, images.expand(2, -1, -1, -1, -1))
    change = (255 * (embedded - images)).square().flatten(1).mean(1)
    torch.testing.assert_close(problem.size(parameters), change, rtol=1e-3, atol=1e-3)
    identity = torch.eye(3, 12)[None]
    assert torch.equal(problem.embed(identity, images[None])[0], images)
    assert float(problem.size(identity)) == 0


def test_a_filter_finds_the_least_change_of_shade() -> None:
    model, data = by_brightness()
    generator = FilterGenerator(second_moments(data.images.float() / 255, 3), window=3)
    found = class_distances(
        model, data, generator, schedule_of(generator, 150, 0.9, False),
        pairs=torch.tensor([[0, 1], [1, 2], [2, 1]]), trials=1,
    )  # fmt: skip
    # Halfway to the next shade, 20 or 40 levels, is what every filter has to move the mean by at least.
    assert 20**2 * 0.95 < float(found.matrix[0, 1]) < 20**2 * 1.5
    assert 40**2 * 0.95 < float(found.matrix[1, 2]) < 40**2 * 1.5
    assert 40**2 * 0.95 < float(found.matrix[2, 1]) < 40**2 * 1.5
    assert bool(found.matrix[0, 2].isnan())
