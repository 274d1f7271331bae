from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import (
    COLOURS,
    GLYPHS,
    SHAPES,
    _polygon_distance,
    _stroke_distance,
    class_designs,
    make_signs,
    sign_texture,
)
from untrojan.errors import UntrojanError


@pytest.fixture(scope="module")
def ten_classes() -> tuple[ImageSet, ImageSet]:
    splits = make_signs(train_per_class=60, test_per_class=20, seed=3)
    assert splits.test is not None
    return splits.train, splits.test


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_sets_have_the_promised_form(ten_classes: tuple[ImageSet, ImageSet]) -> None:
    train, test = ten_classes
    assert train.image_shape == test.image_shape == (3, 32, 32)
    assert train.class_counts.tolist() == [60] * 10
    assert test.class_counts.tolist() == [20] * 10
    assert train.class_names == test.class_names
    assert train.class_names[0] == "red octagon bar"
    assert train.ids[7] == "train/red octagon bar/0007"
    assert len({*train.ids, *test.ids}) == 800


def test_no_image_occurs_twice(ten_classes: tuple[ImageSet, ImageSet]) -> None:
    everything = torch.cat([each.images for each in ten_classes]).flatten(1)
    assert len(everything.unique(dim=0)) == 800


def test_no_test_images_where_none_are_asked_for() -> None:
    assert make_signs(2, 16, 1, 0).test is None


def test_the_seed_alone_decides_the_bytes(threads: int) -> None:
    def fingerprint(seed: int) -> str:
        return make_signs(3, 24, 5, 0, seed=seed).train.fingerprint()

    torch.set_num_threads(1)
    first = fingerprint(1)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    assert fingerprint(1) == first
    assert torch.get_num_threads() == 2
    assert fingerprint(2) != first


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="bytes are promised per torch version")
def test_bytes_are_those_of_every_machine() -> None:
    assert (
        make_signs(3, 32, 4, 0).train.fingerprint()
        == "b4dc91cca788bef3cf1bb0a4d1d47f4dd5763b365f1b80dc6cc9e4d087d6eed3"
    )


@pytest.mark.parametrize("size", [17, 32])
def test_a_class_is_the_same_in_a_larger_set(size: int) -> None:
    small = make_signs(2, size, 3, 2, seed=5)
    large = make_signs(6, size, 7, 4, seed=5)
    for few, many in ((small.train, large.train), (small.test, large.test)):
        assert few is not None
        assert many is not None
        assert few.class_names == many.class_names[:2]
        for label in range(2):
            mine, theirs = few.indices_of(label), many.indices_of(label)[: few.class_counts[0]]
            assert torch.equal(few.images[mine], many.images[theirs])
            assert few.ids[mine.numpy()].tolist() == many.ids[theirs.numpy()].tolist()


def test_chunks_leave_no_seam() -> None:
    # At 256x256 an image set is made four images at a time.
    few, more = make_signs(2, 256, 4, 0).train, make_signs(2, 256, 6, 0).train
    assert torch.equal(few.images[:4], more.images[:4])
    assert len(more.images.flatten(1).unique(dim=0)) == 12


def test_any_two_of_the_hundred_classes_differ_in_two_respects() -> None:
    designs = class_designs(100)
    for one, other in itertools.combinations(designs, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2
    assert {part for design in designs for part in design} == {*COLOURS, *SHAPES, *GLYPHS}


def test_any_two_of_the_hundred_classes_look_different() -> None:
    textures = torch.stack([sign_texture(*design, size=32) for design in class_designs(100)])
    distances = torch.pdist(textures.flatten(1)) / math.sqrt(32 * 32)
    # Root mean square over the area, all channels together: 0.15 is a tenth of all pixels off by a half.
    assert distances.min() > 0.15


@pytest.mark.parametrize("shape", SHAPES)
def test_every_glyph_is_legible_on_every_shape(shape: str) -> None:
    textures = torch.stack([sign_texture("blue", shape, glyph, size=32) for glyph in GLYPHS])
    assert 0 <= float(textures.min()) <= float(textures.max()) <= 1
    # Coverage reaches no edge of the texture, where sampling would cut it off.
    coverage = textures[:, 3]
    assert not torch.cat([coverage[:, [0, -1]], coverage[:, :, [0, -1]].mT], 1).any()
    assert torch.pdist(textures.flatten(1)).min() / 32 > 0.08


def test_signs_can_be_told_from_their_pixels(ten_classes: tuple[ImageSet, ImageSet]) -> None:
    train, test = ten_classes

    def features(data: ImageSet) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(data.images.double() / 255, 2).flatten(1)
        return small - small.mean(1, keepdim=True)

    means = torch.stack([features(train)[train.indices_of(label)].mean(0) for label in range(10)])
    accuracy = (torch.cdist(features(test), means).argmin(1) == test.labels).double().mean()
    # A nearest-mean rule over pixels is far above chance (0.1) and far from solving the set.
    assert 0.2 < accuracy < 0.9


def test_images_of_a_class_vary(ten_classes: tuple[ImageSet, ImageSet]) -> None:
    train, _ = ten_classes
    for label in range(10):
        images = train.images[train.indices_of(label)].double() / 255
        assert images.mean((1, 2, 3)).std() > 0.05
        assert images.std(0).mean() > 0.12


def test_sensor_noise_leaves_room_for_a_faint_pattern(ten_classes: tuple[ImageSet, ImageSet]) -> None:
    train, _ = ten_classes
    chess = torch.ones(32, 32)
    chess[::2, ::2] = chess[1::2, 1::2] = -1
    projection = (train.images.float() * chess).mean((1, 2, 3))
    # A chessboard of 3/255 projects to 3 levels; natural content must stay well under that.
    assert projection.abs().quantile(0.99) < 0.5


SQUARE = torch.tensor([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("place", "distance"),
    [
        ((0, 0), -1.0),
        ((0.5, 0), -0.5),
        ((0.2, -0.9), -0.1),
        ((2, 0), 1.0),
        ((2, 2), math.sqrt(2)),
        ((-4, 5), 5.0),
    ],
)
def test_polygon_distance_of_a_square(place: tuple[float, float], distance: float) -> None:
    x, y = (torch.full((1, 1), value, dtype=torch.float64) for value in place)
    assert _polygon_distance(x, y, SQUARE).item() == pytest.approx(distance)


@pytest.mark.parametrize(
    ("place", "distance"), [((0, 0), 1), ((1, 1), 0), ((-3, 5), 5), ((5, 8), 5), ((1, 3), 1)]
)
def test_distance_to_a_stroke_with_a_bend(place: tuple[float, float], distance: float) -> None:
    x, y = (torch.full((1, 1), value, dtype=torch.float64) for value in place)
    bend = torch.tensor([(0.0, 1.0), (2, 1), (2, 4)], dtype=torch.float64)
    assert _stroke_distance(x, y, bend).item() == pytest.approx(distance)


def test_even_odd_rule_leaves_the_notches_of_a_star_outside() -> None:
    star = torch.tensor(SHAPES["star"][0], dtype=torch.float64)
    angles = torch.deg2rad(torch.arange(-90.0, 270, 36, dtype=torch.float64))
    x, y = 0.75 * angles.cos()[None], 0.75 * angles.sin()[None]
    inside = _polygon_distance(x, y, star).flatten() < 0
    assert inside.tolist() == [True, False] * 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 101}, "num_classes"),
        ({"num_classes": 2.0}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"size": 15}, "size"),
        ({"size": 1025}, "size"),
        ({"train_per_class": 0}, "train_per_class"),
        ({"test_per_class": -1}, "test_per_class"),
        ({"num_classes": 100, "size": 1024, "train_per_class": 1000}, "GB"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(UntrojanError, match=named) as raised:
        make_signs(**options)
    assert "\n" not in str(raised.value)
