"""Label-consistent poisoning: what is stored, not what was computed, keeps the bounds."""

from __future__ import annotations

import json

import pytest
import torch

from crafted_data import coloured_splits, quick_model
from untrojan.attacks.crafted import CRAFTED_ATTACKS, truth
from untrojan.attacks.label_consistent import LabelConsistent, perturbed, pgd_l2
from untrojan.data.image_set import Splits
from untrojan.errors import UntrojanError
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import draw_trigger

TARGET = 2


@pytest.fixture(scope="module")
def data():
    return coloured_splits()


@pytest.fixture(scope="module")
def model(data):
    return quick_model(data.train)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 8.0), ("l2", 300.0)])
def test_stored_images_keep_label_and_bound_and_the_model_does_not_know_them(data, model, norm, radius):
    attack = LabelConsistent(TARGET, norm=norm, radius=radius, share=0.25, steps=10)
    crafted = attack.craft(data, seed=1, model=model)
    made = attack.poison(data, 1, crafted.tensors)
    record, train = made.record, made.train
    assert int(record.poisoned.sum()) == 15
    assert train.labels[record.poisoned].unique().tolist() == [TARGET]
    assert record.original_labels[record.poisoned].unique().tolist() == [TARGET]
    assert torch.equal(train.labels, record.original_labels)
    # The trigger aside, each image is its original plus a bounded change.
    origin = data.train.images[record.permutation]
    change = (train.images.int() - origin.int()).double()
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[-3:, -3:] = False
    change = change[record.poisoned][:, :, outside].flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert float(size.max()) <= radius
    assert float(size.min()) > 0.8 * radius
    trigger = draw_trigger("patch", {}, (3, 16, 16), 1)
    assert torch.equal(stamp(trigger, train.images[record.poisoned]), train.images[record.poisoned])
    # Originals are gone, all else is untouched.
    assert record.permutation.sort().values.tolist() == list(range(len(data.train)))
    assert torch.equal(train.images[~record.poisoned], origin[~record.poisoned])
    assert crafted.facts["recognised_before"] > 0.9
    assert crafted.facts["recognised_after"] < 0.1


def test_the_test_images_get_the_trigger_alone_and_none_is_of_the_target(data, model):
    made = LabelConsistent(TARGET, share=0.1, steps=1)(data, 1, model)
    triggered = made.triggered_test
    assert triggered.true_labels.unique().tolist() == [0, 1, 3, 4]
    assert triggered.wanted_labels.unique().tolist() == [TARGET]
    clean = data.test.images[data.test.labels != TARGET]
    assert torch.equal(triggered.images, stamp(draw_trigger("patch", {}, (3, 16, 16), 1), clean))


def test_the_seed_and_what_was_stored_decide_everything(data, model):
    attack = LabelConsistent(TARGET, share=0.2, steps=3)
    first, other = attack.craft(data, 1, model), attack.craft(data, 2, model)
    assert (
        attack(data, 1, model).train.fingerprint()
        == attack.poison(data, 1, first.tensors).train.fingerprint()
    )
    assert not torch.equal(first.tensors["rows"], other.tensors["rows"])


def test_crafting_leaves_the_model_as_it_was(data, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.train()
    LabelConsistent(TARGET, share=0.1, steps=2).craft(data, 0, model)
    assert model.training
    model.eval()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_l2_steps_raise_the_loss_within_ball_and_range(data, model):
    images = data.train.images[:40].float() / 255
    labels = data.train.labels[:40]
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(images), labels)
    for random in (None, torch.Generator().manual_seed(0)):
        made = pgd_l2(model, images, labels, 0.8, 0.2, 10, random)
        assert float((made - images).flatten(1).norm(dim=1).max()) <= 0.8 + 1e-5
        assert bool(((made >= 0) & (made <= 1)).all())
        with torch.no_grad():
            assert float(torch.nn.functional.cross_entropy(model(made), labels)) > before + 0.5


def test_an_l2_bound_of_less_than_a_byte_changes_nothing(data, model):
    images, labels = data.train.images[:4], data.train.labels[:4]
    made = perturbed(model, images, labels, norm="l2", radius=0.9 / 255, step=0.5 / 255, steps=3)
    assert torch.equal(made, images)


def test_truth_is_json_and_names_the_attack(data, model):
    attack = LabelConsistent(TARGET, share=0.1, steps=1)
    crafted = attack.craft(data, 0, model)
    told = json.loads(json.dumps(truth(attack, attack.poison(data, 0, crafted.tensors).record, crafted)))
    options = dict(told["attack"])
    assert CRAFTED_ATTACKS.build(options.pop("name"), options) == attack
    assert told["clean_label"] is True


def test_what_cannot_be_attacked_is_refused(data, model):
    with pytest.raises(UntrojanError, match="no class 7"):
        LabelConsistent(7).craft(data, 0, model)
    with pytest.raises(UntrojanError, match="give one trained"):
        LabelConsistent(TARGET).craft(data, 0)
    with pytest.raises(UntrojanError, match="nothing to poison"):
        LabelConsistent(TARGET, share=0.001).craft(data, 0, model)
    with pytest.raises(UntrojanError, match="add a test split"):
        LabelConsistent(TARGET, share=0.1, steps=1)(Splits(data.train), 0, model)
