"""DECK's transformation of features, on encoders and decoders that are known exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import ANY, Adam, Schedule, all_pairs, invert
from untrojan.inversion.feature_space import (
    FAST,
    PAPER,
    STATISTICS,
    STATISTICS_UNIT,
    FeatureSpacePattern,
    LossWeights,
    regional_convolution,
    with_statistics,
)
from untrojan.metrics.images import ssim, structural_similarity
from untrojan.models.classifier import Classifier, predictions_of, to_float
from untrojan.models.decoders import RECIPE, Decoder, Upsampling, reconstruct, train_decoder
from untrojan.models.encoders import Encoder, load_encoder
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe


def small_encoder(channels: int = 4) -> Encoder:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())
    return Encoder([(block, nn.MaxPool2d(2))], [(channels, channels)], (127.0,) * 3, (64.0,) * 3)


def small_pattern(**settings: int) -> FeatureSpacePattern:
    encoder = small_encoder()
    torch.manual_seed(1)
    decoder = Decoder(encoder)
    decoder.psnr = 99.0
    decoder.requires_grad_(False)
    return FeatureSpacePattern(encoder, decoder, **settings)


def images_of(count: int = 6, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 16, 16, generator=torch.Generator().manual_seed(3))


def identity_parameters(pattern: FeatureSpacePattern, image: Tensor) -> Tensor:
    """One pair's parameters with identity kernels and the statistics of one image (C, H, W) in [0, 1]."""
    parameters = pattern.initial(torch.tensor([[0, 1]]), (3, 16, 16))
    pixels = 255 * image.flatten(1)
    statistics = torch.stack([pixels.mean(1).expand(3), pixels.std(1, correction=0).expand(3)])
    parameters[:, :6] = statistics.flatten() / STATISTICS_UNIT
    channels, z, m = pattern.encoder.channels, pattern.regions, pattern.kernel
    kernels = torch.zeros(z, z, channels, channels, m, m)
    kernels[:, :, range(channels), range(channels), m // 2, m // 2] = 1
    parameters[:, STATISTICS:] = kernels.flatten()
    return parameters


@pytest.mark.parametrize(("regions", "kernel", "channels"), [(1, 1, 3), (4, 3, 3), (3, 5, 1)])
def test_identity_is_the_plain_reconstruction(regions: int, kernel: int, channels: int) -> None:
    pattern = small_pattern(regions=regions, kernel=kernel)
    image = images_of(1, channels)
    decoder = pattern.decoder
    features = pattern.encoder(255 * image)
    plain = decoder(features, decoder.noise(1, *features.shape[2:], pattern.seed)).clamp(0, 255) / 255
    if channels == 1:
        plain = decoder(features, decoder.noise(1, 8, 8)).mean(1, keepdim=True).clamp(0, 255) / 255
    embedded = pattern.embed(identity_parameters(pattern, image[0]), image[None])
    torch.testing.assert_close(embedded[0], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("upsampling", ["gaussian", "nearest", "zero", "swwae"])
def test_every_decoder_decodes_what_was_transformed(upsampling: Upsampling) -> None:
    pattern = small_pattern()
    torch.manual_seed(1)
    decoder = Decoder(pattern.encoder, upsampling).requires_grad_(False)
    decoder.psnr = 99.0
    pattern = replace(pattern, decoder=decoder)
    images = (255 * images_of(1)).byte()
    embedded = pattern.embed(identity_parameters(pattern, images[0] / 255), images[None] / 255)
    difference = 255 * embedded[0] - reconstruct(pattern.encoder, decoder, images)
    assert float(difference.abs().max()) < 0.51


@pytest.mark.parametrize(("channels", "upsampling"), [(3, "gaussian"), (1, "gaussian"), (3, "swwae")])
def test_relative_triggers_set_out_from_the_image_itself(channels: int, upsampling: Upsampling) -> None:
    pattern = small_pattern()
    torch.manual_seed(1)
    decoder = Decoder(pattern.encoder, upsampling).requires_grad_(False)
    decoder.psnr = 99.0
    pattern = replace(pattern, decoder=decoder, relative=True)
    images = images_of(6, channels)
    # The statistics of any image: they are those of the parameters' own start.
    parameters = identity_parameters(pattern, images[0])
    parameters[:, 6:12] = parameters[:, :6]
    torch.testing.assert_close(pattern.embed(parameters, images[None])[0], images, atol=1e-5, rtol=0)
    _, distances = pattern.measure(parameters, images[None], pattern.embed(parameters, images[None]))
    assert float(distances.max()) < 1e-3


def test_relative_statistics_change_by_as_much_in_each_image() -> None:
    pattern = replace(small_pattern(), relative=True)
    images = 0.25 + 0.5 * images_of()
    parameters = identity_parameters(pattern, images[0])
    parameters[:, 6:12] = parameters[:, :6]
    parameters[:, 1] += 20 / STATISTICS_UNIT
    parameters[:, 3:6] *= 1.5
    pixels = 255 * images
    centre = pixels.mean((2, 3), keepdim=True)
    shifted = 1.5 * (pixels - centre) + centre + torch.tensor([0.0, 20.0, 0.0]).view(3, 1, 1)
    encoder, decoder = pattern.encoder, pattern.decoder
    noise = decoder.noise(6, 8, 8, pattern.seed)
    change = decoder(encoder(shifted), noise) - decoder(encoder(pixels), noise)
    expected = (pixels + change).clamp(0, 255) / 255
    torch.testing.assert_close(pattern.embed(parameters, images[None])[0], expected, atol=1e-4, rtol=1e-4)


def test_statistics_are_those_asked_for() -> None:
    images = 255 * images_of()
    mean, deviation = torch.tensor([100.0, 120.0, 30.0]), torch.tensor([20.0, 40.0, 7.0])
    changed = with_statistics(images, mean, deviation)
    torch.testing.assert_close(changed.mean((2, 3)), mean.expand(6, 3), rtol=1e-4, atol=1e-3)
    spread = changed.std((2, 3), correction=0)
    torch.testing.assert_close(spread, deviation.expand(6, 3), rtol=1e-4, atol=1e-3)
    flat = with_statistics(torch.full((1, 3, 4, 4), 7.0), mean, deviation)
    torch.testing.assert_close(flat, mean.view(1, 3, 1, 1).expand(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("z", "m", "height", "width"), [(2, 3, 8, 6), (4, 1, 8, 8), (3, 3, 7, 8), (2, 5, 6, 6)]
)
def test_regions_are_convolved_each_by_itself(z: int, m: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    features, kernels = torch.randn(2, 3, 4, height, width), torch.randn(2, z, z, 4, 4, m, m)
    changed = regional_convolution(features, kernels)
    tall, wide = -(-height // z), -(-width // z)
    expected = torch.zeros_like(features)
    for pair in range(2):
        for row in range(z):
            for column in range(z):
                place = (..., slice(row * tall, (row + 1) * tall), slice(column * wide, (column + 1) * wide))
                region = features[pair][place]
                expected[pair][place] = nn.functional.conv2d(
                    region, kernels[pair, row, column], padding=m // 2
                )
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)


def test_a_regions_kernel_changes_that_region_alone() -> None:
    torch.manual_seed(0)
    features, kernels = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 4, 4, 4, 4, 3, 3)
    before = regional_convolution(features, kernels)
    kernels[1, 2, 3] += 1
    changed = (regional_convolution(features, kernels) != before).any(2).any(1)
    assert not bool(changed[0].any())
    assert bool(changed[1, 4:6, 6:8].all())
    assert int(changed[1].sum()) == 4


@pytest.mark.parametrize("relative", [False, True])
def test_the_gradient_reaches_the_parameters_alone(relative: bool) -> None:
    pattern = replace(small_pattern(regions=2), relative=relative)
    images = images_of()
    parameters = pattern.initial_on(torch.tensor([[0, 1]]), lambda _: (255 * images).byte()).requires_grad_()
    embedded = pattern.embed(parameters, images[None])
    price, _ = pattern.measure(parameters, images[None], embedded)
    # The statistics' term has a kink at its start.
    price = price + embedded.square().mean()
    price.sum().backward()
    assert parameters.grad is not None
    assert bool((parameters.grad[:, :6] != 0).all())
    assert bool((parameters.grad[:, 12:] != 0).any())
    assert not bool(parameters.grad[:, 6:12].any())
    weights = [*pattern.encoder.parameters(), *pattern.decoder.parameters()]
    assert all(weight.grad is None for weight in weights)


def test_the_start_is_near_the_reconstruction_and_has_the_class_statistics() -> None:
    pattern = small_pattern()
    images = (255 * images_of()).byte()
    parameters = pattern.initial_on(
        torch.tensor([[0, 1], [ANY, 2]]), lambda label: images[: 3 if label else 6]
    )
    found = pattern.unpack(parameters)
    pixels = images.float()
    torch.testing.assert_close(found.mean[0], pixels.mean((0, 2, 3)), rtol=1e-4, atol=1e-3)
    usual = pixels[:3].std((2, 3), correction=0).mean(0)
    torch.testing.assert_close(found.usual_deviation[1], usual, rtol=1e-4, atol=1e-3)
    assert float(pattern.size(parameters).abs().max()) < 1e-3
    identity = torch.zeros(4, 4, 3, 3)
    identity[range(4), range(4), 1, 1] = 1
    deviations = found.kernels - identity
    assert float(deviations.std()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_one_step_moves_statistics_by_a_hundredth_of_the_pixel_range(rate: float) -> None:
    pattern = small_pattern()
    images = (255 * images_of()).byte()
    parameters = pattern.initial_on(torch.tensor([[0, 1]]), lambda _: images)
    assert float(pattern.size(parameters).abs().max()) < 1e-3
    stepped, _ = Adam(rate, (0.5, 0.9), leading=STATISTICS, leading_rate=1e-3)(
        parameters,
        torch.ones_like(parameters),
        torch.zeros(1, 2, parameters.shape[1]),
        torch.ones(1),
        torch.zeros(1),
    )
    moved = pattern.unpack(parameters).mean - pattern.unpack(stepped).mean
    assert moved.flatten().tolist() == pytest.approx([2.55] * 3, rel=1e-3)
    kernels = pattern.unpack(parameters).kernels - pattern.unpack(stepped).kernels
    torch.testing.assert_close(kernels, torch.full_like(kernels, rate), rtol=1e-3, atol=1e-6)


def test_price_is_equation_11() -> None:
    pattern = small_pattern(regions=2)
    images = images_of()
    parameters = pattern.initial_on(torch.tensor([[0, 1]]), lambda _: (255 * images).byte())
    parameters[:, 0] += 30 / STATISTICS_UNIT
    parameters[:, 5] -= 6 / STATISTICS_UNIT
    embedded = pattern.embed(parameters, images[None])
    price, sizes = pattern.measure(parameters, images[None], embedded)
    before, after = 255 * images, 255 * embedded[0]
    content = (pattern.encoder(before) - pattern.encoder(after)).square().mean((1, 2, 3))
    near = nn.functional.pad(after, (1, 1, 1, 1), mode="constant", value=float("nan"))
    around = near.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).nanmean(4)
    expected = 1e-3 * content.mean() + 100 * (1 - structural_similarity(before, after)).mean()
    expected = expected + 0.05 * (after - around).square().mean() + 10 + 2
    torch.testing.assert_close(price[0], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sizes[0], content)
    alone = replace(pattern, weights=LossWeights(0, 0, 0.5, 0))
    rough = 0.5 * (after - around).square().mean()
    torch.testing.assert_close(alone.measure(parameters, images[None], embedded)[0][0], rough)
    flipped = torch.tensor([[True, False, True, False, False, False]])
    mean = (content[0] + content[2]) / 2
    torch.testing.assert_close(pattern.distance(parameters, images[None], flipped)[0], mean)
    assert math.isnan(float(pattern.distance(parameters, images[None], ~flipped & flipped)))


def test_settings_and_decoders_that_do_not_fit_are_refused() -> None:
    encoder = small_encoder()
    with pytest.raises(UntrojanError, match="has not been trained"):
        FeatureSpacePattern(encoder, Decoder(encoder))
    with pytest.raises(UntrojanError, match="kernel odd, not 4 and 2"):
        small_pattern(kernel=2)
    decoder = Decoder(small_encoder(5))
    decoder.psnr = 99.0
    with pytest.raises(UntrojanError, match="made for another encoder"):
        FeatureSpacePattern(encoder, decoder)


def double_loop_ssim(first: Tensor, second: Tensor) -> float:
    """Wang et al.'s equation 13, window by window."""
    offsets = torch.arange(11).double() - 5
    window = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)
    window /= window.sum()
    values = []
    for channel in range(first.shape[0]):
        for row in range(first.shape[1] - 10):
            for column in range(first.shape[2] - 10):
                x = first[channel, row : row + 11, column : column + 11].double()
                y = second[channel, row : row + 11, column : column + 11].double()
                x_mean, y_mean = (window * x).sum(), (window * y).sum()
                x_variance = (window * (x - x_mean) ** 2).sum()
                y_variance = (window * (y - y_mean) ** 2).sum()
                covariance = (window * (x - x_mean) * (y - y_mean)).sum()
                above = (2 * x_mean * y_mean + 2.55**2) * (2 * covariance + 7.65**2)
                below = (x_mean**2 + y_mean**2 + 2.55**2) * (x_variance + y_variance + 7.65**2)
                values.append(above / below)
    return float(torch.stack(values).mean())


def test_ssim_is_its_definition() -> None:
    torch.manual_seed(0)
    first = torch.randint(0, 256, (2, 3, 14, 17), dtype=torch.uint8)
    noise = torch.randint(-40, 41, first.shape)
    second = (first.int() + noise).clamp(0, 255).to(torch.uint8)
    expected = [double_loop_ssim(*each) for each in zip(first, second, strict=True)]
    assert ssim(first, second).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(first, first).tolist() == pytest.approx([1, 1])
    single = structural_similarity(first.float(), second.float())
    assert single.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, ImageSet, Encoder, Decoder]:
    signs = make_signs(3, size=16, train_per_class=32, test_per_class=1).train
    recipe = Recipe(epochs=12, batch_size=16, learning_rate=3e-3, schedule="one_cycle")
    model, _ = train_new(signs, "vgg9@0.5", recipe)
    encoder = load_encoder("local", signs)
    decoder = train_decoder(encoder, signs.images, recipe=replace(RECIPE, epochs=20, batch_size=16))
    return model, signs, encoder, decoder


def test_generation_flips_a_class(trained: tuple[Classifier, ImageSet, Encoder, Decoder]) -> None:
    model, signs, encoder, decoder = trained
    pattern = FeatureSpacePattern(encoder, decoder, regions=2, least_psnr=0.0)
    pairs = torch.tensor([[0, 1]])
    schedule = replace(PAPER, images_a_side=32, most_steps=80)
    found = invert(model, signs, pairs, pattern, schedule)
    assert bool(found.solved.all())
    for pair, parameters in zip(pairs.tolist(), found.parameters, strict=True):
        images = to_float(signs.images[signs.labels == pair[0]])
        embedded = pattern.embed(parameters[None], images[None])[0]
        flips = predictions_of(model, (255 * embedded).round().byte()) == pair[1]
        # Not quite .9: 8 bits, and other random numbers for each image than in the search.
        assert float(flips.float().mean()) > 0.8
        distance = pattern.distance(parameters[None], images[None], flips[None])
        farthest = (encoder(255 * images) - encoder(255 * images.flip(0))).square().mean()
        assert 0 < float(distance) < float(farthest)


def test_results_do_not_depend_on_how_pairs_are_batched() -> None:
    pattern = small_pattern(regions=2)
    torch.manual_seed(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    model = Classifier(network, 3, torch.full((3,), 0.5), torch.ones(3))
    images = (255 * images_of(90)).byte()
    data = ImageSet(images, torch.arange(90) % 3, ("a", "b", "c"), torch.arange(90).numpy().astype(str))
    schedule: Schedule = replace(FAST, images_a_side=8, most_steps=12)
    pairs = all_pairs(3)
    together = invert(model, data, pairs, pattern, schedule)
    alone = torch.cat([invert(model, data, pair[None], pattern, schedule).parameters for pair in pairs])
    torch.testing.assert_close(together.parameters, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("with_bfloat16")
def test_half_precision_searches_the_same_images_and_measures_the_same_distance() -> None:
    """Decoded pixels differ by less than a level in the mean; the distance that is reported is exact."""
    exact = small_pattern(regions=2)
    rough = replace(exact, precision="bfloat16")
    images = images_of(6).unflatten(0, (2, 3))
    parameters = exact.initial(torch.tensor([[0, 1], [1, 0]]), (3, 16, 16))
    apart = 255 * (exact.embed(parameters, images) - rough.embed(parameters, images)).abs()
    assert 0 < float(apart.mean()) < 1
    flipped = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(
        exact.distance(parameters, images, flipped), rough.distance(parameters, images, flipped)
    )
    moved = parameters.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rough.embed(moved, images).sum(), moved)
    assert gradient.dtype == torch.float32
    assert float(gradient[:, 12:].abs().max()) > 0
