"""Beatrix on features whose Gram matrices are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.activation_clustering import ActivationClustering
from untrojan.defenses.cleansing.beatrix import Beatrix, Bounds, gram_features, regularised_mmd
from untrojan.defenses.cleansing.features import Features
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier

CLASSES, EACH, SIDE = 6, 100, 6
LEVEL = "s3"
TARGET = 2


def three_channels_as_maps() -> Classifier:
    """Its level s3 is the image, three channels of 36 places; its penultimate features are the pixels."""
    network = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))
    return Classifier(network, CLASSES, torch.zeros(3), torch.ones(3))


def channels_that_go_together(poisoned: int = 20, seed: int = 0, each: int = EACH) -> tuple[ImageSet, Tensor]:
    """The second channel is bright where the first is dark; in the first images of class 2, where it is not.

    All channels are bright in half of their places, drawn at random: every pixel has the same distribution,
    hence the same mean, in all images. Only products differ.
    """
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(each)
    places = SIDE * SIDE
    bright = torch.rand(len(labels), 3, places, generator=random).argsort(2) < places // 2
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[TARGET * each : TARGET * each + poisoned] = True
    bright[:, 1] = bright[:, 0] == truth.unsqueeze(1)
    level = 150 + 8 * torch.randn(len(labels), 1, 1, generator=random)
    pixels = torch.where(bright, level, level / 5) + 5 * torch.randn(bright.shape, generator=random)
    names = tuple(f"class {i}" for i in range(CLASSES))
    images = pixels.clamp(0, 255).round().to(torch.uint8).view(-1, 3, SIDE, SIDE)
    return ImageSet(images, labels, names, numbered(len(labels))), truth


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.floats(1e-3, 1e3), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_gram_features_by_their_definition(
    channels: int, places: int, order: int, scale: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    maps = scale * torch.randn(4, channels, places, generator=random)
    found = gram_features(maps, order)
    values = maps.double().numpy()
    for n in range(4):
        pairs = [(i, j) for i in range(channels) for j in range(i, channels)]
        for (i, j), entry in zip(pairs, found[n].tolist(), strict=True):
            total = sum(values[n, i, p] ** order * values[n, j, p] ** order for p in range(places))
            expected = np.sign(total) * abs(total) ** (1 / order)
            # Sums of odd powers cancel, and a root magnifies what is left.
            peak = np.abs(values[n, i]).max() * np.abs(values[n, j]).max()
            rounding = peak * (4e-7 * places) ** (1 / order) if (values[n] < 0).any() else 0.0
            assert entry == pytest.approx(expected, rel=1e-4, abs=max(rounding, 1e-5 * peak))


def test_no_order_overflows() -> None:
    for scale in (1e-12, 1.0, 1e12):
        grams = gram_features(torch.full((1, 2, 4), scale), 16)
        np.testing.assert_allclose(grams.numpy(), scale**2 * 4 ** (1 / 16), rtol=1e-5)
    assert gram_features(torch.zeros(2, 3, 4), 5).tolist() == [[0.0] * 6] * 2


def test_orders_of_vectors_are_alike() -> None:
    vectors = torch.rand(5, 7, 1, generator=torch.Generator().manual_seed(0))
    for order in (2, 5, 9):
        torch.testing.assert_close(gram_features(vectors, order), gram_features(vectors, 1))


def test_places_may_be_permuted() -> None:
    random = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 4, 9, generator=random)
    shuffled = maps[:, :, torch.randperm(9, generator=random)]
    torch.testing.assert_close(gram_features(shuffled, 3), gram_features(maps, 3))


def test_bounds_and_deviations_by_hand() -> None:
    grams = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [50.0, 8.0]])
    bounds = Bounds.of(grams, 2.0)
    # Medians 3 and 0, median absolute deviations 1 and 0.
    assert bounds.low.tolist() == [1.0, 0.0]
    assert bounds.high.tolist() == [5.0, 0.0]
    # Excesses of 45 over a bound of 5, and of 8 over one of 0, for which the mean of 5 and 0 stands in.
    assert bounds.deviations(grams).tolist() == pytest.approx([0, 0, 0, 0, 45 / 5 + 8 / 2.5])
    assert bounds.deviations(torch.tensor([[0.5, -1.0]])).tolist() == pytest.approx([0.5 / 2.5 + 1 / 2.5])


def test_mmd_by_its_definition() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=random), 1 + torch.randn(4, 3, generator=random)
    points = torch.cat([x, y])
    squares = [float((a - b).square().sum()) for i, a in enumerate(points) for b in points[i + 1 :]]
    # The lower of two middle ones, as each counts twice.
    width = sorted(squares)[(len(squares) - 1) // 2]

    def kernel(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-(a - b).square().sum() / width))

    xx = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    for weight in (0.0, 0.3):
        expected = xx + yy - 2 * xy - weight * (xx + yy)
        assert regularised_mmd(x, y, weight) == pytest.approx(expected, rel=1e-4)


def test_mmd_of_the_same_distribution_is_zero_on_average() -> None:
    random = torch.Generator().manual_seed(0)
    drawn = [
        regularised_mmd(torch.randn(20, 4, generator=random), torch.randn(60, 4, generator=random), 0.0)
        for _ in range(300)
    ]
    assert abs(np.mean(drawn)) < 3 * np.std(drawn) / 300**0.5
    assert regularised_mmd(torch.zeros(5, 2), torch.zeros(5, 2), 0.0) == pytest.approx(0)


@pytest.mark.parametrize("with_trusted", [False, True])
@pytest.mark.parametrize("threshold", ["published", "calibrated"])
def test_equal_means_and_other_products(threshold: str, with_trusted: bool) -> None:
    """What clustering does not see: nothing but the covariance of channels differs."""
    data, truth = channels_that_go_together()
    trusted = channels_that_go_together(0, seed=1, each=60)[0] if with_trusted else None
    features = Features(three_channels_as_maps(), data, trusted)
    report = Beatrix(threshold=threshold, level=LEVEL).judge(features)  # type: ignore[arg-type]
    assert report.targets == (TARGET,)
    assert bool(report.flagged[truth].all())
    assert int(report.flagged.sum()) <= int(truth.sum()) + 12
    blind = ActivationClustering(level=LEVEL).judge(features)
    assert blind.verdict == "clean"
    if threshold == "calibrated":
        assert report.evidence["p_value"] < 0.01


def test_order_of_images_does_not_matter() -> None:
    data, _ = channels_that_go_together()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(5))
    cleanser, model = Beatrix(level=LEVEL, orders=3), three_channels_as_maps()
    report, shuffled = cleanser(data, model), cleanser(data.select(order), model)
    torch.testing.assert_close(shuffled.scores, report.scores[order])
    assert torch.equal(shuffled.flagged, report.flagged[order])
    assert shuffled.targets == report.targets


def test_few_references_do_nearly_as_well() -> None:
    data, truth = channels_that_go_together()
    cleanser, model = Beatrix(level=LEVEL, orders=3, references=40), three_channels_as_maps()
    report = cleanser(data, model)
    assert report.targets == (TARGET,)
    assert float(report.flagged[truth].float().mean()) > 0.9
    assert torch.equal(cleanser(data, model).scores, report.scores)


def test_calibrated_false_alarms() -> None:
    model, cleanser = three_channels_as_maps(), Beatrix(threshold="calibrated", level=LEVEL, orders=2)
    verdicts = [cleanser(channels_that_go_together(0, seed=s)[0], model).verdict for s in range(40)]
    # 2 of 40 are allowed on average; 7 or more come about once in 150 times.
    assert verdicts.count("poisoned") <= 6
    assert verdicts.count("undecided") == 0


def test_vectors_fused_levels_and_few_channels() -> None:
    data, _ = channels_that_go_together()
    model = three_channels_as_maps()
    features = Features(model, data)
    vectors = Beatrix(level="penultimate", channels=12).judge(features)
    alike = Beatrix(level="penultimate", channels=12, orders=1).judge(features)
    assert torch.equal(vectors.scores, alike.scores)
    fused = Beatrix(level="s3+penultimate", channels=12, orders=3).judge(features)
    maps = Beatrix(level=LEVEL, orders=3).judge(features)
    rest = Beatrix(level="penultimate", channels=12, orders=3).judge(features)
    torch.testing.assert_close(fused.scores, maps.scores + rest.scores)
    with pytest.raises(UntrojanError, match="no level"):
        Beatrix(level="s1").judge(features)


def test_channels_that_vary_most_are_kept() -> None:
    data, truth = channels_that_go_together()
    images = data.images.clone()
    images[:, 2] = 100
    grey = replace(data, images=images)
    report = Beatrix(level=LEVEL, channels=2)(grey, three_channels_as_maps())
    assert report.targets == (TARGET,)
    assert bool(report.flagged[truth].all())


def test_uniform_missing_and_untrusted_classes() -> None:
    data, truth = channels_that_go_together()
    images = data.images.clone()
    images[data.labels == 0] = 7
    kept = (data.labels != 1) | (torch.arange(len(data)) == EACH)
    odd = replace(data, images=images).select(kept)
    trusted = channels_that_go_together(0, seed=1, each=60)[0]
    lacking = trusted.select(trusted.labels != 4)
    for each in (None, lacking):
        report = Beatrix(level=LEVEL).judge(Features(three_channels_as_maps(), odd, each))
        assert report.targets[0] == TARGET
        assert bool(report.flagged[truth[kept]].all())
        assert report.evidence["classes_left_out"] == [1]
        assert bool(torch.isfinite(report.scores).all())
    few = data.select(torch.tensor([0, 1, EACH, EACH + 1]))
    assert Beatrix(level=LEVEL)(few, three_channels_as_maps()).verdict == "undecided"


def test_one_class_is_judged_among_all() -> None:
    data, _ = channels_that_go_together()
    features, cleanser = Features(three_channels_as_maps(), data), Beatrix(level=LEVEL, orders=1)
    alone = cleanser.examine(features, TARGET, data.indices_of(TARGET))
    among = cleanser.examine_all(features)[TARGET]
    assert alone.statistic == among.statistic
    assert torch.equal(alone.suspects, among.suspects)
