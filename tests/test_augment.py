from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from untrojan.data.augment import augment, collage, crop, rotate
from untrojan.errors import UntrojanError
from untrojan.models.classifier import to_float
from untrojan.seeding import generator


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed, "images"), dtype=torch.uint8)


def plain_crop(image: Tensor, row: int, column: int, padding: int, mirrored: bool) -> Tensor:
    """One image, pixel by pixel, from the definition."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                from_y, from_x = y + row - padding, x + column - padding
                if 0 <= from_y < height and 0 <= from_x < width:
                    out[c, y, x] = image[c, from_y, width - 1 - from_x if mirrored else from_x]
    return out


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 7),
    st.integers(),
)
def test_crop_is_the_plain_one(
    count: int, channels: int, height: int, width: int, padding: int, seed: int
) -> None:
    images = random_images(count, channels, height, width, seed=seed)
    draw = generator(seed, "places")
    shifts = torch.randint(0, 2 * padding + 1, (count, 2), generator=draw)
    mirrored = torch.randint(0, 2, (count,), generator=draw)
    for mirror in (None, mirrored):
        flags = [False] * count if mirror is None else mirror.bool().tolist()
        expected = torch.stack(
            [
                plain_crop(image, row, column, padding, flag)
                for image, (row, column), flag in zip(images, shifts.tolist(), flags, strict=True)
            ]
        )
        assert torch.equal(crop(images, shifts, padding, mirror), expected)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(crop(channels_last, shifts, padding, mirror), expected)


def shifts_of_single_pixels(count: int, padding: int) -> tuple[Tensor, Tensor]:
    """Row and column by which the centre pixel of each image moved."""
    side = 2 * padding + 1
    images = torch.zeros(count, 1, side, side, dtype=torch.uint8)
    images[:, 0, padding, padding] = 255
    moved = augment(images, generator(0, "shifts"), crop_padding=padding)
    assert moved.sum() == count
    where = moved.flatten(1).argmax(1)
    return padding - where // side, padding - where % side


def test_shifts_cover_all_places_evenly() -> None:
    rows, columns = shifts_of_single_pixels(10_000, padding=2)
    counts = torch.bincount((rows + 2) * 5 + columns + 2, minlength=25)
    # Chi-square over 25 equally likely places: 51.2 is exceeded once in a thousand seeds.
    assert len(counts) == 25
    assert float(((counts - 400) ** 2 / 400).sum()) < 51.2


def test_half_of_the_images_are_mirrored_and_nothing_else_happens() -> None:
    images = random_images(2000, 3, 4, 5)
    seen = augment(images, generator(0, "flip"), flip=True)
    kept = (seen == to_float(images)).flatten(1).all(1)
    mirrored = (seen == to_float(images.flip(3))).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 900 < int(mirrored.sum()) < 1100


def test_mirroring_does_not_depend_on_the_shift() -> None:
    images = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)
    images[:, :, 1, 1], images[:, :, 1, 2] = 255, 51
    seen = augment(images, generator(0, "both"), crop_padding=1, flip=True)
    centre = (seen == 1).flatten(1).double().argmax(1)
    for place in range(9):
        here = seen[centre == place]
        row, column = divmod(place, 3)
        if column == 1:
            share = (here[:, 0, row, 0] == 0.2).double().mean()
            assert 0.42 < share < 0.58


def test_everything_off_is_the_plain_conversion_and_draws_nothing() -> None:
    images, draw = random_images(5, 3, 8, 8), generator(0, "off")
    before = draw.get_state()
    assert torch.equal(augment(images, draw), to_float(images))
    assert torch.equal(draw.get_state(), before)


@pytest.mark.parametrize("options", [{"crop_padding": 2, "flip": True}, {"rotation": 20.0}, {}])
def test_input_is_left_alone_and_the_result_is_in_range(options: dict[str, float]) -> None:
    images = random_images(16, 3, 9, 7)
    before = images.clone()
    seen = augment(images, generator(0, "range"), **options)  # type: ignore[arg-type]
    assert torch.equal(images, before)
    assert seen.dtype == torch.float32
    assert seen.shape == images.shape
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    seen.zero_()
    assert torch.equal(images, before)


def test_the_generator_decides() -> None:
    images = random_images(32, 3, 8, 8)

    def run(seed: int) -> Tensor:
        torch.rand(3)  # the global stream must not matter
        return augment(images, generator(seed, "x"), crop_padding=2, flip=True, rotation=10)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_an_empty_batch_stays_empty() -> None:
    seen = augment(random_images(0, 3, 8, 8), generator(0), crop_padding=2, flip=True, rotation=10)
    assert seen.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_move_pixels_counter_clockwise(quarters: int) -> None:
    images = torch.rand(2, 3, 6, 6, generator=generator(0))
    turned = rotate(images, torch.full((2,), 90.0 * quarters))
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)), atol=1e-5, rtol=0)


def test_half_turn_of_an_oblong_image() -> None:
    images = torch.rand(1, 3, 4, 9, generator=generator(0))
    torch.testing.assert_close(rotate(images, torch.tensor([180.0])), images.flip((2, 3)), atol=1e-5, rtol=0)


def test_quarter_turn_of_an_oblong_image_keeps_lengths() -> None:
    # A horizontal line of three pixels in the middle of a 5x9 image becomes a vertical line of three.
    image, expected = torch.zeros(1, 1, 5, 9), torch.zeros(1, 1, 5, 9)
    image[..., 2, 3:6], expected[..., 1:4, 4] = 1, 1
    torch.testing.assert_close(rotate(image, torch.tensor([90.0])), expected, atol=1e-5, rtol=0)


def test_an_eighth_turn_interpolates_between_pixel_centres() -> None:
    # The corner pixel centre of a 3x3 image, turned by 45 degrees, looks sqrt(2) pixels right or down of the
    # centre: beyond the outermost centre by sqrt(2) - 1, so that much of its weight is black.
    image = torch.ones(1, 1, 3, 3)
    turned = rotate(image, torch.tensor([45.0]))[0, 0]
    for row, column in ((0, 0), (0, 2), (2, 0), (2, 2)):
        assert turned[row, column].item() == pytest.approx(2 - 2**0.5, abs=1e-5)
    assert turned[1, 1].item() == pytest.approx(1)


def test_each_image_turns_by_its_own_angle_within_the_bound() -> None:
    # The angle is read off a bright pixel ten pixels right of the centre of a black image.
    images = torch.zeros(400, 1, 31, 31, dtype=torch.uint8)
    images[:, 0, 15, 25] = 255
    turned = augment(images, generator(0, "turn"), rotation=30)[:, 0].double()
    axis = torch.arange(31.0, dtype=torch.float64) - 15
    weight = turned.sum((1, 2))
    x, y = (turned.sum(1) * axis).sum(1) / weight, (turned.sum(2) * axis).sum(1) / weight
    degrees = torch.rad2deg(torch.atan2(-y, x))
    assert degrees.abs().max() < 31.5
    assert degrees.min() < -27
    assert degrees.max() > 27
    assert abs(degrees.mean()) < 2.6  # three standard errors of a uniform mean
    assert degrees.std() == pytest.approx(30 / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"crop_padding": -1}, "crop_padding"),
        ({"rotation": -5.0}, "rotation"),
        ({"rotation": 181.0}, "rotation"),
        ({"rotation": float("nan")}, "rotation"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(UntrojanError, match=named):
        augment(random_images(1, 3, 4, 4), generator(0), **options)  # type: ignore[arg-type]


def test_float_images_are_refused() -> None:
    with pytest.raises(UntrojanError, match="uint8"):
        augment(torch.rand(1, 3, 4, 4), generator(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_a_collage_has_one_rectangle_of_somebody_else(count: int, height: int, width: int, seed: int) -> None:
    images = torch.arange(count)[:, None, None, None].expand(-1, 3, height, width).clone()
    out, others = collage(images, generator(seed, "collage"))
    assert bool((others != torch.arange(count)).all())
    assert out.shape == images.shape
    foreign = out != images
    # The same places in every image and channel, and all of them one rectangle from one other image.
    assert torch.equal(foreign, foreign[:1, :1].expand_as(foreign))
    where = foreign[0, 0].nonzero()
    if len(where):
        spans = where.amax(0) - where.amin(0) + 1
        assert int(spans.prod()) == len(where)
    for image, alien, other in zip(out, foreign, others.tolist(), strict=True):
        assert image[alien].unique().tolist() == [other][: int(alien.any())]


def test_collages_are_of_any_size_and_the_same_for_the_same_seed() -> None:
    images = random_images(6, 3, 32, 32)
    draw = generator(0, "collage")
    shares = torch.stack([(collage(images, draw)[0] != images).any(1)[0].float().mean() for _ in range(300)])
    assert 0.4 < float(shares.mean()) < 0.55
    assert float(shares.min()) < 0.1
    assert float(shares.max()) > 0.8
    first, second = (collage(images, generator(3, "collage"))[0] for _ in range(2))
    assert torch.equal(first, second)
    alone, others = collage(images[:1], draw)
    assert torch.equal(alone, images[:1])
    assert others.tolist() == [0]
