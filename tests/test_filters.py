"""The Instagram filters against a plain implementation of their formulas, pixel by pixel."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

from untrojan.errors import UntrojanError
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import draw_trigger

NAMES = ("gotham", "nashville", "kelvin", "lomo", "toaster")


def rgb(code):
    return [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def clip(value):
    return min(max(value, 0.0), 1.0)


def logistic(value):
    return 1 / (1 + math.exp(-value))


def sigma(value):
    return (logistic(3 * (value - 0.5)) - logistic(-1.5)) / (logistic(1.5) - logistic(-1.5))


def hsl(pixel, brightness, saturation):
    """By way of the hue, as the standard library has it; saturation above 1 goes on along the same line."""
    hue, lightness, amount = colorsys.rgb_to_hls(*pixel)
    lightness, amount = min(lightness * brightness, 1.0), amount * saturation
    full = colorsys.hls_to_rgb(hue, lightness, 1.0)
    return [clip(lightness + amount * (each - lightness)) for each in full]


def tone(pixel, code, inverted):
    luminance = 0.2127 * pixel[0] + 0.7152 * pixel[1] + 0.0722 * pixel[2]
    a = 1 - luminance if inverted else luminance
    share = a / (1 + a)
    return [(1 - share) * v + share * c for v, c in zip(pixel, rgb(code), strict=True)]


def veil(pixel, code):
    return [0.8 * v + 0.2 * c for v, c in zip(pixel, rgb(code), strict=True)]


def each(image, change):
    return [[change(pixel) for pixel in row] for row in image]


def auto_gamma(image):
    values = [v for row in image for pixel in row for v in pixel]
    value = math.log(sum(values) / len(values)) / math.log(0.5)
    return each(image, lambda pixel: [v ** (1 / value) for v in pixel])


def vignette(image, inner, outer):
    """Multiplied by a radial gradient between two colours, on a canvas half as large again."""
    height, width = len(image), len(image[0])
    reach = math.floor(1.5 * width) / 2
    made = []
    for i, row in enumerate(image):
        made.append([])
        for j, pixel in enumerate(row):
            beta = clip(math.hypot(i - (height - 1) / 2, j - (width - 1) / 2) / reach)
            made[-1].append(
                [v * ((1 - beta) * a + beta * b) for v, a, b in zip(pixel, inner, outer, strict=True)]
            )
    return made


def plain(name, image):
    """``image``: rows of pixels of three floats."""
    if name == "gotham":

        def gotham(pixel):
            pixel = veil(hsl(pixel, 1.2, 0.1), "#222b6d")
            return [sigma(sigma(v ** (1 / 0.9))) for v in pixel]

        return each(image, gotham)
    if name == "nashville":

        def nashville(pixel):
            pixel = tone(tone(pixel, "#222b6d", True), "#f7daae", False)
            return hsl([sigma(v) for v in pixel], 1.0, 1.5)

        return auto_gamma(each(image, nashville))
    if name == "kelvin":
        return each(auto_gamma(image), lambda pixel: veil(hsl(pixel, 1.2, 0.5), "#ff9900"))
    white, black = [1.0] * 3, [0.0] * 3
    if name == "lomo":
        return vignette(each(image, lambda p: [float(p[0] > 0.5), float(p[1] > 0.5), p[2]]), white, black)

    def toaster(pixel):
        pixel = hsl(tone(pixel, "#330000", True), 1.5, 0.8)
        return [sigma(sigma(v ** (1 / 1.2))) for v in pixel]

    return vignette(vignette(each(image, toaster), white, rgb("#cdc1c5")), rgb("#ff9966"), white)


def photographs(side=12):
    """Noise, a dark and a light ramp of colours, and pure primaries with black and white."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (1, 3, side, side), generator=generator)
    ramp = torch.arange(side * side).view(side, side) * 255 // (side * side)
    dark = torch.stack([ramp // 4, ramp // 3, ramp // 2])
    light = torch.stack([255 - ramp // 4, 255 - ramp // 5, ramp])
    corners = torch.randint(2, (3, side, side), generator=generator) * 255
    return torch.cat([noise, dark[None], light[None], corners[None]]).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [11, 12])
def test_each_filter_is_within_one_byte_of_the_plain_formulas(name, side):
    images = photographs(side)
    made = stamp(draw_trigger(name, {}, (3, side, side), 0), images)
    for image, found in zip(images, made, strict=True):
        expected = torch.tensor(plain(name, (image.permute(1, 2, 0).double() / 255).tolist()))
        assert (found - expected.permute(2, 0, 1).clamp(0, 1) * 255).abs().max() < 0.51


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    images = photographs().float() / 255
    filtered = draw_trigger(name, {}, (3, 12, 12), 0)
    alone = torch.cat([filtered(image[None]) for image in images])
    torch.testing.assert_close(filtered(images), alone, atol=1e-6, rtol=0)


def test_lomo_makes_exactly_two_values_of_red_and_of_green():
    images = photographs().float() / 255
    lomo = draw_trigger("lomo", {}, (3, 12, 12), 0)
    full = lomo(torch.ones(1, 3, 12, 12))
    assert float(full.min()) < 0.5 < float(full.max())
    levels = lomo(images)[:, :2] / full[:, :2]
    assert bool(((levels < 1e-6) | ((levels - 1).abs() < 1e-6)).all())
    assert torch.equal(levels > 0.5, images[:, :2] > 0.5)
    torch.testing.assert_close(lomo(images)[:, 2], images[:, 2] * full[:, 2])


@pytest.mark.parametrize("name", NAMES)
def test_black_white_and_grey_images_stay_finite_and_so_do_their_gradients(name):
    levels = torch.tensor([0.0, 1.0, 0.5, 1 / 255]).view(4, 1, 1, 1)
    for channels in (1, 3):
        images = levels.expand(4, channels, 8, 8).clone().requires_grad_()
        made = draw_trigger(name, {}, (channels, 8, 8), 0)(images)
        assert made.shape == images.shape
        assert bool(((made >= 0) & (made <= 1)).all())
        made.sum().backward()
        assert bool(images.grad.isfinite().all())


@pytest.mark.parametrize("name", ["gotham", "nashville", "kelvin", "toaster"])
def test_gradients_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64) * 0.6 + 0.1
    filtered = draw_trigger(name, {}, (3, 4, 4), 0)
    assert torch.autograd.gradcheck(filtered, images.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_keep_the_luminance_of_what_the_filter_makes_of_them(name):
    grey = photographs()[:, :1].float() / 255
    coloured = draw_trigger(name, {}, (3, 12, 12), 0)(grey.expand(-1, 3, -1, -1))
    expected = (coloured * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(draw_trigger(name, {}, (1, 12, 12), 0)(grey), expected)


def test_images_of_other_channels_are_refused():
    with pytest.raises(UntrojanError, match="grey or RGB images, not 4 channels"):
        draw_trigger("kelvin", {}, (4, 12, 12), 0)
