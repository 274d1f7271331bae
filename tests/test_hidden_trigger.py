"""Hidden triggers: the poison looks like its class, keeps its label and has the source's features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crafted_data import QUICK, coloured_splits, quick_model
from untrojan.attacks.hidden_trigger import (
    HiddenTrigger,
    collided,
    greedy_pairs,
    other_classes,
    pair_of,
    train_last_layer,
)
from untrojan.errors import UntrojanError
from untrojan.models.taps import features_of
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import draw_trigger

PAIR = (3, 1)
ATTACK = HiddenTrigger(
    target=1, sources=(3,), trigger_options={"size": 5, "place": "random"}, count=10, candidates=16,
    update="sign", iterations=25, learning_rate=0.01, halve_every=10, enough=0.0, batch_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return coloured_splits(train=30, test=10)


@pytest.fixture(scope="module")
def model(data):
    return quick_model(other_classes(data.train, PAIR))


@pytest.fixture(scope="module")
def crafted(data, model):
    return ATTACK.craft(data, 0, model)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 12), levels=st.sampled_from([2, 5, 10_000]), seed=st.integers(0, 2**31))
def test_greedy_pairs_are_those_of_taking_the_smallest_again_and_again(count, levels, seed):
    random = torch.Generator().manual_seed(seed)
    distances = torch.randint(levels, (count, count), generator=random).float()
    partner = greedy_pairs(distances)
    assert sorted(partner.tolist()) == list(range(count))
    left, expected = distances.clone(), torch.zeros(count, dtype=torch.int64)
    for _ in range(count):
        row, column = divmod(int(left.argmin()), count)
        expected[row] = column
        left[row], left[:, column] = torch.inf, torch.inf
    if len(distances.unique()) == distances.numel():
        assert torch.equal(partner, expected)


def test_distances_that_are_no_numbers_still_end():
    partner = greedy_pairs(torch.tensor([[torch.nan, torch.inf], [1.0, torch.nan]]))
    assert partner.tolist() == [1, 0]


def test_features_come_nearer_within_the_bound_of_the_stored_bytes(data, model, crafted):
    made = ATTACK.poison(data, 0, crafted.tensors)
    pair = pair_of(data, *PAIR)
    record, train = made.record, made.train
    assert train.class_names == ("d", "b")
    assert int(record.poisoned.sum()) == 10
    origin = pair.train.images[record.permutation]
    change = (train.images.int() - origin.int()).abs().flatten(1).amax(1)
    assert bool((change[record.poisoned] <= 16).all())
    assert bool((change[record.poisoned] > 0).all())
    assert not bool(change[~record.poisoned].any())
    # Labels stay, and each original is gone.
    assert train.labels[record.poisoned].unique().tolist() == [1]
    assert torch.equal(train.labels, pair.train.labels[record.permutation])
    assert record.permutation.sort().values.tolist() == list(range(len(pair.train)))
    facts = crafted.facts
    assert facts["feature_distance_after"] < 0.7 * facts["feature_distance_before"]
    # Nearer to triggered sources as a whole, too, whoever the partner was.
    trigger = draw_trigger("patch", ATTACK.trigger_options, (3, 16, 16), 0)
    centre = features_of(model, stamp(trigger, pair.train.images[pair.train.labels == 0])).mean(0)
    before, after = (
        (features_of(model, images[record.poisoned]) - centre).norm(dim=1).mean()
        for images in (origin, train.images)
    )
    assert after < 0.9 * before


def test_the_lowest_losses_come_first_and_more_steps_lower_them(data, model, crafted):
    losses = crafted.tensors["losses"]
    assert torch.equal(losses, losses.sort().values)
    pair = pair_of(data, *PAIR)
    images, sources = (pair.train.images[pair.train.labels == label][:8] for label in (1, 0))
    means = []
    for iterations in (1, 5, 25):
        made, before, after = collided(model, images, sources, replace(ATTACK, iterations=iterations))
        means.append(float(after.mean()))
        assert made.dtype == torch.uint8
    assert float(before.mean()) > means[0] > means[1] > means[2]


def test_only_triggered_source_images_are_tested(data, crafted):
    triggered = ATTACK.poison(data, 0, crafted.tensors).triggered_test
    clean = data.test.images[data.test.labels == PAIR[0]]
    trigger = draw_trigger("patch", ATTACK.trigger_options, (3, 16, 16), 0)
    assert torch.equal(triggered.images, stamp(trigger, clean))
    assert triggered.true_labels.unique().tolist() == [0]
    assert triggered.wanted_labels.unique().tolist() == [1]


def test_the_seed_decides_everything(data, model, crafted):
    again, other = ATTACK.craft(data, 0, model), ATTACK.craft(data, 1, model)
    for name, tensor in crafted.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    assert not torch.equal(other.tensors["rows"], crafted.tensors["rows"])


def test_the_victim_learns_its_last_layer_alone(data, model):
    pair = pair_of(data, *PAIR)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    victim, history = train_last_layer(model, pair.train, replace(QUICK, epochs=12))
    after = victim.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 1)[0] for name in changed} == {"network.linear"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert victim.num_classes == 2
    assert history.epochs[-1].accuracy > 0.8


def test_a_network_that_ends_in_a_convolution_gets_a_new_one(data):
    from untrojan.models.registry import build_for
    from untrojan.models.transfer import with_new_head

    model = build_for(other_classes(data.train, PAIR), "nin@0.1")
    victim = with_new_head(model, 2, seed=1)
    assert victim(torch.rand(2, 3, 16, 16)).shape == (2, 2)
    trained = [name for name, parameter in victim.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert torch.equal(
        victim.get_parameter(trained[0]), with_new_head(model, 2, seed=1).get_parameter(trained[0])
    )


def test_what_cannot_be_attacked_is_refused(data, model):
    with pytest.raises(UntrojanError, match="one source class"):
        HiddenTrigger(target=1, sources=(0, 2))
    with pytest.raises(UntrojanError, match="one source class"):
        HiddenTrigger(target=1, sources=(1,))
    with pytest.raises(UntrojanError, match="no class 9"):
        HiddenTrigger(target=1, sources=(9,)).craft(data, 0, model)
    with pytest.raises(UntrojanError, match="can't poison 400 images: the target has 30"):
        HiddenTrigger(target=1, sources=(3,)).craft(data, 0, model)
    with pytest.raises(UntrojanError, match="two classes beside its pair"):
        HiddenTrigger(target=1, sources=(0,)).clean(coloured_splits(4, 2, classes=3))
