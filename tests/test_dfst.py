"""A style as the trigger, and rounds of detoxification that spread it over the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crafted_data import coloured_splits, quick_model
from untrojan.attacks import dfst
from untrojan.attacks.crafted import truth
from untrojan.attacks.dfst import DetoxifiedStyle, FeatureInjector, compromised_channels, trained_injector
from untrojan.attacks.record import PoisonRecord
from untrojan.errors import UntrojanError
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.metrics.images import structural_similarity
from untrojan.models.classifier import Classifier
from untrojan.models.taps import features_of
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import draw_trigger

TARGET = 2
ATTACK = DetoxifiedStyle(target=TARGET, rounds=3, epochs=3, batch_size=32, level="s2")


@pytest.fixture(scope="module")
def data():
    return coloured_splits()


@pytest.fixture(scope="module")
def model(data):
    return quick_model(data.train, architecture="cnn@0.5")


@pytest.fixture(scope="module")
def crafted(data, model):
    return ATTACK.craft(data, 1, model)


def test_every_image_takes_on_the_styles_colours():
    images = torch.randint(256, (4, 3, 24, 24), generator=torch.Generator().manual_seed(0)).float() / 255
    style = draw_trigger("sunrise", {"strength": 1.0}, (3, 24, 24), 0)
    made = style(0.3 + 0.1 * images)
    # Contrast and brightness of the image do not matter, only what it shows.
    torch.testing.assert_close(made, style(0.5 * images), atol=0.04, rtol=0)
    wanted = style.tensors["mean"]
    assert float((made.mean(0) - wanted).abs().mean()) < 0.12
    # Warm below the sky: more red than blue at the horizon, and a smooth map.
    assert bool((wanted[0] > wanted[2]).float().mean() > 0.5)
    assert float(wanted.diff(dim=1).abs().max()) < 0.1


def test_compromised_channels_fall_with_the_rounds_and_the_backdoor_stays(data, model, crafted, monkeypatch):
    made = ATTACK.poison(data, 1, crafted.tensors)
    counts = crafted.facts["compromised_channels"]
    assert len(counts) == 4
    assert counts[-1] < counts[0]
    assert benign_accuracy(crafted.model, made.test) > 0.9
    assert attack_success_rate(crafted.model, made.triggered_test) > 0.95
    # It is the injected features that do it, not the longer training.
    monkeypatch.setattr(dfst, "injected", lambda _, images: images)
    plain = ATTACK.craft(data, 1, model).facts["compromised_channels"]
    assert counts[-1] < plain[-1]


def test_injected_images_are_added_under_their_true_labels(data, crafted):
    made = ATTACK.poison(data, 1, crafted.tensors)
    record, train = made.record, made.train
    assert len(train) == len(data.train) + 3 * 30
    assert int(record.poisoned.sum()) == 30
    assert int(record.cover.sum()) == 90
    assert not bool((record.cover & record.poisoned).any())
    assert torch.equal(train.labels[~record.poisoned], record.original_labels[~record.poisoned])
    assert train.labels[record.poisoned].unique().tolist() == [TARGET]
    assert TARGET not in record.original_labels[record.poisoned]
    origin = data.train.images[record.permutation]
    untouched = ~(record.cover | record.poisoned)
    assert torch.equal(train.images[untouched], origin[untouched])
    assert torch.equal(train.images[record.poisoned], stamp(record.trigger, origin[record.poisoned]))
    assert bool((train.images[record.cover] != origin[record.cover]).flatten(1).any(1).all())
    # Poisoned originals are gone; those of injected images are not.
    kept = record.permutation[~record.cover]
    assert kept.sort().values.tolist() == list(range(len(data.train)))
    again = PoisonRecord.from_json(truth(ATTACK, record, crafted))
    assert torch.equal(again.cover, record.cover)
    assert TARGET not in made.triggered_test.true_labels


def test_an_injector_excites_what_it_is_asked_to_in_images_that_stay_similar(data, model):
    victim, images = model, data.train.images
    before = features_of(victim, images, "s2").mean((0, 2, 3))
    even = torch.arange(len(before)) % 2 == 0
    method = DetoxifiedStyle(injector_epochs=4, injector_learning_rate=3e-3, batch_size=32)
    raised = []
    for channels in (even, ~even):
        injector = trained_injector(victim, data.train, "s2", channels, method, seed=0)
        changed = dfst.injected(injector, images)
        rise = features_of(victim, changed, "s2").mean((0, 2, 3)) - before
        raised.append((float(rise[even].mean()), float(rise[~even].mean())))
        assert float(structural_similarity(images.float(), changed.float(), 255.0).mean()) > 0.5
    assert raised[0][0] > max(0.05, raised[0][1])
    assert raised[1][1] > max(0.05, raised[1][0])
    assert all(parameter.requires_grad for parameter in victim.parameters())


@pytest.mark.parametrize("side", [4, 8, 32])
def test_compromised_is_what_the_style_excites_and_nothing_else(side):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * side**2, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(3)[:, :, None, None])
        network[0].bias.zero_()
    model = Classifier(network, 2, torch.zeros(3), torch.ones(3), image_shape=(3, side, side))
    clean = torch.full((2, 3, side, side), 51, dtype=torch.uint8)
    styled = clean.clone()
    # From .2, the largest activation: the first channel rises by .6, the second by .1, the third falls.
    styled[:, 0], styled[:, 1], styled[:, 2] = 204, 76, 0
    found = [compromised_channels(model, clean, styled, "network.1", least).tolist() for least in (0.005, 4)]
    assert found == [[True, False, False], [False, False, False]]
    with pytest.raises(UntrojanError, match="has none"):
        compromised_channels(model, clean, styled, "penultimate")


def test_no_rounds_are_plain_poisoning_and_the_model_is_left_alone(data, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack = DetoxifiedStyle(target=TARGET, rounds=0, epochs=1)
    crafted = attack.craft(data, 0, model)
    made = attack.poison(data, 0, crafted.tensors)
    assert made.record.cover is None
    assert len(made.train) == len(data.train)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(next(crafted.model.parameters()), next(model.parameters()))


def test_rounds_that_find_nothing_to_detoxify_say_so(data, model):
    attack = DetoxifiedStyle(target=TARGET, rounds=2, epochs=1, level="s2", excess=1e6)
    with pytest.warns(UserWarning, match="no channel at s2: none of the 2 rounds"):
        crafted = attack.craft(data, 0, model)
    assert crafted.facts["compromised_channels"] == [0]
    assert not len(crafted.tensors["cover_images"])


def test_the_seed_decides_everything(data, model):
    attack = DetoxifiedStyle(target=TARGET, rounds=1, epochs=1, injector_epochs=1, level="s2", excess=0.0005)
    first, again, other = (attack.craft(data, seed, model).tensors["cover_images"] for seed in (0, 0, 1))
    assert len(first)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_injector_of_grey_images_keeps_their_shape():
    assert FeatureInjector(1)(torch.rand(2, 1, 9, 8)).shape == (2, 1, 9, 8)
