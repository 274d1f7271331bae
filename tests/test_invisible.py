"""Secrets in images: they are read again from stored bytes, and every image is changed in its own way."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from crafted_data import coloured_splits
from untrojan.attacks.invisible import InvisibleAttack, steganographic_loss, trained_encoder
from untrojan.errors import UntrojanError
from untrojan.metrics.images import psnr
from untrojan.triggers.base import stamp
from untrojan.triggers.invisible import Decoder, Encoder, SecretWritten, from_tensors
from untrojan.triggers.registry import draw_trigger

ATTACK = InvisibleAttack(target=4, rate=0.1, bits=4, epochs=10, secret_only=5, filters=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def data():
    return coloured_splits()


@pytest.fixture(scope="module")
def crafted(data):
    return ATTACK.craft(data, 0)


def test_a_few_seconds_of_training_write_a_readable_secret(crafted):
    assert crafted.facts["bit_accuracy"] > 0.7
    assert crafted.facts["psnr"] > 20
    assert crafted.facts["images_changed"] == 1


def test_every_image_has_its_own_residual_under_one_secret(data, crafted):
    trigger = from_tensors(crafted.tensors)
    images = data.test.images[::10].float() / 255
    residuals = (trigger(images) - images).flatten(1)
    distances = torch.cdist(residuals, residuals)
    distances.fill_diagonal_(torch.inf)
    assert float(distances.min()) > 0.05 * float(residuals.norm(dim=1).mean())


def test_it_poisons_as_any_dirty_label_attack(data, crafted):
    made = ATTACK.poison(data, 0, crafted.tensors)
    record, train = made.record, made.train
    trigger = from_tensors(crafted.tensors)
    assert int(record.poisoned.sum()) == 30
    assert (train.labels[record.poisoned] == 4).all()
    assert 4 not in record.original_labels[record.poisoned]
    origin = data.train.images[record.permutation]
    assert torch.equal(train.images[record.poisoned], stamp(trigger, origin[record.poisoned]))
    assert torch.equal(train.images[~record.poisoned], origin[~record.poisoned])
    assert record.permutation.sort().values.tolist() == list(range(len(data.train)))
    triggered = made.triggered_test
    assert 4 not in triggered.true_labels
    clean = data.test.images[data.test.labels != 4]
    assert torch.equal(triggered.images, stamp(trigger, clean))
    assert abs(float(psnr(clean, triggered.images).mean()) - crafted.facts["psnr"]) < 1


def test_the_file_is_enough_to_apply_it_again(data, crafted, tmp_path):
    place = tmp_path / "trigger.safetensors"
    save_file({name: value.contiguous() for name, value in crafted.tensors.items()}, place)
    again = draw_trigger("invisible", {"encoder": str(place)}, (3, 16, 16), 7)
    images = data.test.images[:5]
    assert torch.equal(stamp(again, images), stamp(from_tensors(crafted.tensors), images))
    with pytest.raises(UntrojanError, match="no encoder for images of 1 channels"):
        draw_trigger("invisible", {"encoder": str(place)}, (1, 16, 16), 7)


@pytest.mark.parametrize("damage", ["secret", "encoder.last.weight", "encoder.last.bias"])
def test_a_damaged_file_is_refused(crafted, tmp_path, damage):
    place = tmp_path / "trigger.safetensors"
    tensors = {name: value.contiguous() for name, value in crafted.tensors.items()}
    save_file({**tensors, damage: torch.zeros(10**6)}, place)
    with pytest.raises(UntrojanError, match="holds no encoder"):
        draw_trigger("invisible", {"encoder": str(place)}, (3, 16, 16), 0)
    with pytest.raises(UntrojanError, match="no steganographic encoder"):
        from_tensors({**tensors, damage: torch.full_like(tensors[damage], torch.nan)})


def test_no_file_is_no_encoder(tmp_path):
    with pytest.raises(UntrojanError, match="needs its encoder"):
        draw_trigger("invisible", {}, (3, 16, 16), 0)
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(UntrojanError, match="no readable encoder"):
        draw_trigger("invisible", {"encoder": str(tmp_path / "text")}, (3, 16, 16), 0)


def test_training_resumes_to_the_same_weights(data, tmp_path):
    method = InvisibleAttack(bits=3, epochs=2, secret_only=1, filters=4, images=64)
    whole, _ = trained_encoder(data.train, method, 3, tmp_path)
    # Cut off between the phases: the second starts from the first's checkpoint.
    (tmp_path / "encoder.pt").unlink()
    again, _ = trained_encoder(data.train, method, 3, tmp_path)
    fresh, _ = trained_encoder(data.train, method, 3)
    other, _ = trained_encoder(data.train, method, 4)
    weights = whole.residual.weight
    assert torch.equal(weights, again.residual.weight)
    assert torch.equal(weights, fresh.residual.weight)
    assert not torch.equal(weights, other.residual.weight)


@torch.no_grad()
def test_the_loss_is_the_sum_of_its_weighted_terms():
    torch.manual_seed(0)
    encoder, decoder = Encoder(3, 5, 4), Decoder(3, 5, 4)
    images, secrets = torch.rand(2, 3, 12, 12), torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]]).float()
    terms = {}
    for name in ("residual_weight", "similarity_weight", "secret_weight"):
        off = {"residual_weight": 0.0, "similarity_weight": 0.0, "secret_weight": 0.0, name: 2.0}
        terms[name] = float(steganographic_loss(encoder, decoder, images, secrets, InvisibleAttack(**off))[0])
    residual = encoder(images, secrets)
    assert terms["residual_weight"] == pytest.approx(2 * float(residual.square().mean()))
    default = float(steganographic_loss(encoder, decoder, images, secrets, InvisibleAttack())[0])
    expected = 2 * terms["residual_weight"] + 1.5 * (terms["similarity_weight"] + terms["secret_weight"])
    assert default == pytest.approx(expected / 2, rel=1e-5)
    alone, _ = steganographic_loss(encoder, decoder, images, secrets, InvisibleAttack(), secret_only=True)
    assert float(alone) == pytest.approx(terms["secret_weight"] / 2)


def test_the_trigger_is_differentiable_in_the_images():
    trigger = SecretWritten(Encoder(1, 3, 4).requires_grad_(False), torch.tensor([1.0, 0, 1]))
    images = torch.full((2, 1, 10, 9), 0.5, requires_grad=True)
    trigger(images).sum().backward()
    assert bool((images.grad != 0).all())
