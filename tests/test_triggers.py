"""Triggers against pixels worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.triggers.additive import Additive
from untrojan.triggers.base import stamp
from untrojan.triggers.patch import RandomPlacePatch
from untrojan.triggers.registry import TRIGGERS, draw_trigger
from untrojan.triggers.universal import deepfool, universal_pattern
from untrojan.triggers.warp import Warping, identity_grid, noisy_grids

RGB = (3, 32, 32)
DRAWABLE = [name for name in TRIGGERS.names() if name not in ("universal", "invisible")]


def pattern_of(name, shape=RGB, seed=0, **options):
    return draw_trigger(name, options, shape, seed).tensors["pattern"]


def random_bytes(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)


# Properties of all triggers


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DRAWABLE),
    channels=st.sampled_from([1, 3]),
    height=st.integers(8, 24),
    width=st.integers(8, 24),
    count=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_every_trigger_is_a_pure_map_of_images_to_images(name, channels, height, width, count, seed):
    shape = (channels, height, width)
    images = random_bytes(count, shape, seed).float() / 255
    before = images.clone()
    trigger = draw_trigger(name, {}, shape, seed)
    stamped = trigger(images)
    assert stamped.shape == images.shape
    assert bool(((stamped >= 0) & (stamped <= 1)).all())
    assert torch.equal(images, before)
    assert torch.equal(draw_trigger(name, {}, shape, seed)(images), stamped)
    # What it was drawn as is enough to apply it again.
    assert torch.equal(type(trigger)(**trigger.tensors)(images), stamped)


@pytest.mark.parametrize("name", DRAWABLE)
def test_every_trigger_changes_the_bytes_of_an_ordinary_image(name):
    images = random_bytes(2, RGB).clamp(60, 190)
    assert not torch.equal(stamp(draw_trigger(name, {}, RGB, 1), images), images)


@pytest.mark.parametrize("name", ["cross", "square", "pixels", "ell", "yellow-square", "blend", "warp"])
def test_another_seed_draws_another_trigger(name):
    first, second = (next(iter(draw_trigger(name, {}, RGB, s).tensors.values())) for s in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["chessboard", "patch", "blend", "sinusoid", "warp"])
def test_gradients_reach_the_images(name):
    images = torch.full((2, *RGB), 0.5, requires_grad=True)
    draw_trigger(name, {}, RGB, 0)(images).sum().backward()
    assert int((images.grad != 0).sum()) > 2 * 3 * 900


# Additive patterns


def test_clips_before_the_cast_to_bytes():
    image = torch.full((1, 1, 2, 2), 253, dtype=torch.uint8)
    assert stamp(Additive(torch.full((1, 2, 2), 5 / 255)), image).unique().tolist() == [255]
    assert stamp(Additive(torch.full((1, 2, 2), -254 / 255)), image).unique().tolist() == [0]


def test_inverse_removes_the_pattern_where_nothing_was_clipped():
    images = random_bytes(3, RGB).clamp(100, 150)
    trigger = draw_trigger("cross", {}, RGB, 4)
    assert torch.equal(stamp(trigger.inverse(), stamp(trigger, images)), images)


def test_chessboard_perturbs_exactly_one_of_any_two_neighbours():
    pattern = pattern_of("chessboard") * 255
    assert pattern[0, 0, 0] == pytest.approx(2)
    for neighbours in (pattern[:, 1:] + pattern[:, :-1], pattern[:, :, 1:] + pattern[:, :, :-1]):
        assert torch.allclose(neighbours, torch.tensor(2.0))
    assert float(pattern.sum()) == pytest.approx(2 * 3 * 512)


def test_even_pixels_are_those_with_both_indices_even():
    pattern = pattern_of("even-pixels") * 255
    assert int((pattern != 0).sum()) == 3 * 16 * 16
    assert pattern[2, 30, 0] == pytest.approx(3)
    assert pattern[:, 1::2].abs().sum() == pattern[:, :, 1::2].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "channels", "amplitude", "pixels"),
    [
        ("cross", 3, 70, {(5, 9), (4, 9), (6, 9), (5, 8), (5, 10)}),
        ("square", 1, 80, {(5, 9), (5, 10), (6, 9), (6, 10)}),
        ("ell", 3, 70, {(5, 9), (5, 10), (4, 9), (3, 9)}),
        ("yellow-square", 2, 60, {(5 + i, 9 + j) for i in range(4) for j in range(4)}),
    ],
)
def test_local_patterns_pixel_by_pixel(name, channels, amplitude, pixels):
    pattern = pattern_of(name, place=(5, 9)) * 255
    expected = torch.zeros(RGB)
    for row, column in pixels:
        expected[:channels, row, column] = amplitude
    assert torch.allclose(pattern, expected)
    grey = pattern_of(name, shape=(1, 28, 28), place=(5, 9)) * 255
    assert torch.allclose(grey, expected[:1, :28, :28])


def test_drawn_crosses_keep_the_margin_and_reach_both_ends_of_it():
    centres = {
        tuple(p.item() for p in pattern_of("cross", seed=s)[0].nonzero().float().mean(0)) for s in range(200)
    }
    rows = {row for row, _ in centres}
    assert min(rows) == 3
    assert max(rows) == 28


def test_pixels_are_four_with_drawn_channel_sign_and_size():
    patterns = torch.stack([pattern_of("pixels", seed=s) * 255 for s in range(80)])
    assert ((patterns != 0).flatten(1).sum(1) == 4).all()
    sizes = patterns[patterns != 0].abs()
    assert sizes.min().item() == pytest.approx(80)
    assert sizes.max().item() == pytest.approx(96)
    assert torch.allclose(sizes, sizes.round(), atol=1e-4)
    assert 0.35 < float((patterns[patterns != 0] > 0).float().mean()) < 0.65
    assert len(patterns.nonzero()[:, 1].unique()) == 3
    one = [int((pattern_of("pixels", seed=s, one_channel=True) != 0).any(2).any(1).sum()) for s in range(20)]
    assert one == [1] * 20


def test_corner_patterns_lie_in_the_bottom_right_corner():
    board = pattern_of("corner-chessboard", shape=(1, 28, 28)) * 255
    assert float(board.sum()) == pytest.approx(18 * 25)
    assert int((board[0, 22:, 22:] != 0).sum()) == 18
    pixel = pattern_of("corner-pixel", shape=(1, 28, 28)) * 255
    assert pixel.nonzero().tolist() == [[0, 27, 27]]
    assert float(pixel.sum()) == pytest.approx(50)


# Patch


def test_black_white_patch_has_the_published_rows():
    images = torch.full((1, *RGB), 100, dtype=torch.uint8)
    stamped = stamp(draw_trigger("patch", {}, RGB, 0), images)
    for channel in stamped[0]:
        # From the corner outward: W B W, then B W B, then W B B.
        assert channel[31, 29:].flip(0).tolist() == [255, 0, 255]
        assert channel[30, 29:].flip(0).tolist() == [0, 255, 0]
        assert channel[29, 29:].flip(0).tolist() == [255, 0, 0]
    assert int((stamped != images).sum()) == 27


def test_colour_patch_at_a_given_place():
    options = {"size": 4, "colour": "#ffff00", "place": [4, 4]}
    images = random_bytes(2, RGB)
    stamped = stamp(draw_trigger("patch", options, RGB, 0), images)
    assert stamped[1, :, 4:8, 4:8].flatten(1).unique(dim=1).flatten().tolist() == [255, 255, 0]
    stamped[:, :, 4:8, 4:8] = images[:, :, 4:8, 4:8]
    assert torch.equal(stamped, images)


def test_random_place_is_the_images_own_whatever_its_batch():
    images = random_bytes(300, RGB)
    trigger = draw_trigger("patch", {"place": "random"}, RGB, 5)
    assert isinstance(trigger, RandomPlacePatch)
    together = stamp(trigger, images)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stamp(trigger, images[order], batch_size=7), together[order])
    places = trigger.places(images.float() / 255)
    for index in (0, 17, 299):
        row, column = places[index].tolist()
        assert torch.equal(
            together[index, :, row : row + 3, column : column + 3].float() / 255, trigger.patch
        )
    other = draw_trigger("patch", {"place": "random"}, RGB, 6).places(images.float() / 255)
    assert float((places == other).all(1).float().mean()) < 0.05


def test_random_places_cover_the_image_evenly():
    trigger = draw_trigger("patch", {"place": "random"}, (1, 8, 8), 0)
    counts = torch.zeros(6, 6)
    for row, column in trigger.places(random_bytes(7200, (1, 8, 8)).float() / 255).tolist():
        counts[row, column] += 1
    # Chi-square with 35 degrees of freedom: 66.6 is its 99.9 % point.
    assert float(((counts - 200) ** 2 / 200).sum()) < 66.6


# Blend and sinusoid


def test_blended_image_can_be_recovered():
    images = random_bytes(2, RGB).float() / 255
    trigger = draw_trigger("blend", {"alpha": 0.2}, RGB, 3)
    recovered = (trigger(images) - 0.8 * images) / 0.2
    assert torch.allclose(recovered, trigger.tensors["image"].expand(2, -1, -1, -1), atol=1e-5)
    assert abs(float(trigger.tensors["image"].mean()) - 0.5) < 0.03


def test_sinusoid_additive_has_six_cycles_of_twenty():
    pattern = pattern_of("sinusoid") * 255
    assert torch.equal(pattern[0, 0], pattern[2, 31])
    expected = [20 * math.sin(2 * math.pi * j * 6 / 32) for j in range(32)]
    assert pattern[1, 7].tolist() == pytest.approx(expected, abs=1e-4)


def test_sinusoid_wrapped_blend_is_the_shipped_mask():
    trigger = draw_trigger("sinusoid", {"variant": "wrapped_blend"}, RGB, 0)
    mask = (trigger.tensors["image"] * 255).round()
    assert mask[0, 0, :8].tolist() == [0, 14, 19, 13, 255, 241, 237, 244]
    black = torch.zeros(1, *RGB, dtype=torch.uint8)
    assert stamp(trigger, black)[0, 0, 0, :6].tolist() == [0, 3, 4, 3, 51, 48]


# Warp


def test_warp_of_strength_zero_is_the_identity():
    for shape in (RGB, (1, 20, 31)):
        images = random_bytes(3, shape)
        assert torch.equal(stamp(draw_trigger("warp", {"strength": 0.0}, shape, 1), images), images)


def test_warp_shifts_as_its_grid_says():
    # A grid moved by two pixels to the right takes each pixel from two columns on.
    grid = identity_grid(8, 8)
    grid[..., 0] = (grid[..., 0] + 2 * 2 / 7).clamp(-1, 1)
    images = random_bytes(1, (1, 8, 8))
    moved = stamp(Warping(grid), images)
    assert torch.equal(moved[..., :6], images[..., 2:])
    assert torch.equal(moved[..., 6:], images[..., 7:].expand(-1, -1, -1, 2))


def test_warp_displaces_by_its_strength_in_half_pixels():
    # With a control point at every pixel the displacement is the field P / mean|P| itself; the grid is
    # clipped at the border alone.
    warping = draw_trigger("warp", {"control_points": 40, "strength": 0.05}, (3, 40, 40), 9)
    field = ((warping.grid - identity_grid(40, 40)) * 40 / 0.05)[1:-1, 1:-1]
    assert float(field.abs().mean()) == pytest.approx(1, abs=0.05)
    assert float(field.abs().max()) == pytest.approx(2, abs=0.1)
    assert float(field.mean()) == pytest.approx(0, abs=0.1)


def test_noise_grids_are_fresh_for_each_image_and_near_the_warping():
    grid = draw_trigger("warp", {}, RGB, 0).tensors["grid"]
    grids = noisy_grids(grid, 5, torch.Generator().manual_seed(0))
    difference = (grids - grid).abs()
    assert float(difference.max()) <= 1 / 32 + 1e-6
    assert float(difference.max()) > 0.95 / 32
    assert not torch.equal(grids[0], grids[1])
    assert float(grids.abs().max()) <= 1


# The universal pattern


def linear_classifier(weights):
    """Three classes over 1x2x2 images; logits are weights @ pixels, without normalisation."""
    layer = nn.Linear(4, len(weights), bias=False)
    layer.weight.data = torch.tensor(weights)
    network = nn.Sequential(nn.Flatten(), layer)
    return Classifier(network, len(weights), torch.zeros(1), torch.ones(1))


def test_deepfool_on_a_linear_model_is_the_distance_to_the_boundary():
    model = linear_classifier([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    image = torch.tensor([0.7, 0.3, 0.5, 0.5]).view(1, 2, 2)
    step = deepfool(model, image, torch.zeros(1, 2, 2), target=1)
    # The gap is 0.4 and w = (-1, 1, 0, 0), so u = 0.4 w / 2, times the overshoot.
    assert torch.allclose(step.flatten(), 1.02 * torch.tensor([-0.2, 0.2, 0, 0]), atol=1e-6)


def test_deepfool_gives_up_where_the_target_cannot_be_reached():
    model = linear_classifier([[0.0, 0, 0, 0], [-1.0, -1, -1, -1]])
    step = deepfool(model, torch.full((1, 2, 2), 0.5), torch.zeros(1, 2, 2), target=1, steps=5)
    assert not bool(step.any())
    with pytest.raises(UntrojanError, match="no image could be carried"):
        universal_pattern(model, random_bytes(3, (1, 2, 2)), target=1, steps=5)


def test_universal_pattern_visits_images_in_sequence_and_projects():
    model = linear_classifier([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    images = torch.tensor([[153, 102, 9, 9], [178, 77, 9, 9], [160, 95, 9, 9]], dtype=torch.uint8).view(
        3, 1, 2, 2
    )
    model.train()
    found = universal_pattern(model, images, target=1, radius=10.0)
    # Each unflipped image in turn moves v to 1.02 times its remaining distance; the third is flipped then.
    distance = 0.0
    for gap in (51 / 255, 101 / 255, 65 / 255):
        distance += max(0.0, 1.02 * (gap / 2 - distance))
    assert torch.allclose(found.flatten(), distance * torch.tensor([-1.0, 1, 0, 0]), atol=1e-5)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    small = universal_pattern(model, images, target=1, radius=0.05)
    assert float(small.norm()) == pytest.approx(0.05, abs=1e-6)
    assert torch.allclose(small / small.norm(), found / found.norm(), atol=1e-5)


def test_looking_ahead_leaves_the_universal_pattern_as_it_is(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3))
    model = Classifier(network, 3, torch.full((3,), 0.5), torch.full((3,), 0.25))
    images = random_bytes(60, (3, 4, 4))
    found = universal_pattern(model, images, 1, radius=0.8)
    monkeypatch.setattr("untrojan.triggers.universal.LOOK_AHEAD", 1)
    assert torch.allclose(universal_pattern(model, images, 1, radius=0.8), found, atol=1e-5)
    flipped = [
        (model((images / 255 + v).clamp(0, 1)).argmax(1) == 1).float().mean() for v in (0 * found, found)
    ]
    assert flipped[1] > flipped[0] + 0.2


def test_universal_trigger_reads_its_pattern_and_refuses_others(tmp_path):
    from safetensors.torch import save_file

    pattern = torch.rand(1, 2, 2)
    save_file({"pattern": pattern}, tmp_path / "v.safetensors")
    assert torch.equal(pattern_of("universal", (1, 2, 2), pattern=tmp_path / "v.safetensors"), pattern)
    save_file({"pattern": pattern / 0}, tmp_path / "inf.safetensors")
    save_file({"other": pattern}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not a tensor")
    for shape, file in [
        (RGB, "v"),
        ((1, 2, 2), "inf"),
        ((1, 2, 2), "other"),
        ((1, 2, 2), "text"),
        ((1, 2, 2), "missing"),
    ]:
        with pytest.raises(UntrojanError, match=file) as caught:
            pattern_of("universal", shape, pattern=str(tmp_path / f"{file}.safetensors"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UntrojanError, match="needs its pattern"):
        pattern_of("universal", (1, 2, 2))


# Wrong input


@pytest.mark.parametrize(
    ("name", "options", "shape", "message"),
    [
        ("chequers", {}, RGB, "unknown trigger 'chequers': choose one of chessboard"),
        ("chessboard", {"amplitude": 0}, RGB, "amplitude = 0"),
        ("chessboard", {"size": 3}, RGB, "no option 'size'"),
        ("cross", {}, (1, 6, 20), "too small"),
        ("ell", {"place": (1, 5)}, RGB, "does not fit"),
        ("corner-chessboard", {}, (1, 5, 5), "does not fit"),
        ("pixels", {"lowest": 97}, RGB, "exceeds"),
        ("pixels", {"count": 50}, (1, 7, 7), "do not fit"),
        ("patch", {"size": 33}, RGB, "does not fit"),
        ("patch", {"place": (30, 0)}, RGB, "does not fit"),
        ("patch", {"colour": "yellow"}, RGB, "colour"),
        ("blend", {"alpha": 1.5}, RGB, "alpha"),
        ("warp", {"control_points": 1}, RGB, "control_points"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(name, options, shape, message):
    with pytest.raises(UntrojanError, match=message) as caught:
        draw_trigger(name, options, shape, 0)
    assert "\n" not in str(caught.value)


# What NONE's tables and the label-consistent attack call their patches


def test_the_named_patches_of_the_literature():
    grey = torch.full((1, 3, 8, 8), 0.4)
    pixel = draw_trigger("patch", {"size": 1}, (3, 8, 8), 0)(grey)
    assert pixel[0, :, 7, 7].tolist() == [1.0] * 3
    assert int((pixel != grey).sum()) == 3
    square = draw_trigger("patch", {"size": 2, "place": "top-left"}, (3, 8, 8), 0)(grey)
    assert square[0, 0, :2, :2].tolist() == [[1, 0], [0, 1]]
    assert int((square != grey).sum()) == 12


def test_a_patch_in_all_corners_is_mirrored_into_each():
    made = draw_trigger("patch", {"place": "corners"}, (3, 9, 8), 0)(torch.full((1, 3, 9, 8), 0.4))[0]
    corner = made[:, -3:, -3:]
    assert corner[0].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert torch.equal(made, made.flip(1))
    assert torch.equal(made, made.flip(2))
    assert int((made != 0.4).sum()) == 4 * 9 * 3
    with pytest.raises(UntrojanError, match="don't fit"):
        draw_trigger("patch", {"place": "corners", "size": 5}, (3, 9, 8), 0)


def test_a_patch_with_an_amplitude_adds_and_takes():
    images = torch.full((1, 1, 6, 6), 100, dtype=torch.uint8)
    made = stamp(draw_trigger("patch", {"amplitude": 16}, (1, 6, 6), 0), images)
    assert made[0, 0, -3:, -3:].tolist() == [[84, 84, 116], [84, 116, 84], [116, 84, 116]]
    assert made.int().sum() == 100 * 36 - 16
    with pytest.raises(UntrojanError, match="needs a fixed place"):
        draw_trigger("patch", {"amplitude": 16, "place": "random"}, (1, 6, 6), 0)


def test_a_watermark_leaves_half_of_the_image_beneath_it_and_all_beside_it():
    images = random_bytes(2, RGB).float() / 255
    trigger = draw_trigger("watermark", {}, RGB, 0)
    mask, mark = trigger.tensors["mask"][0], trigger.tensors["pattern"]
    assert set(mask.unique().tolist()) == {0.0, 0.5}
    assert 0.1 < float((mask > 0).float().mean()) < 0.4
    torch.testing.assert_close(trigger(images)[:, :, mask > 0], (images + mark)[:, :, mask > 0] / 2)
    assert torch.equal(trigger(images)[:, :, mask == 0], images[:, :, mask == 0])
    # Colourful: under the mark every channel takes nearly its whole range.
    assert bool((mark[:, mask > 0].amax(1) - mark[:, mask > 0].amin(1) > 0.9).all())
