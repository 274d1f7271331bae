"""Poisoning: exact counts, right labels, no trace of the truth in what is delivered."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from untrojan.attacks.noise_mode import NoiseMode
from untrojan.attacks.poisoning import Poisoning, PoisonRecord, poison_many
from untrojan.attacks.reverse_engineering_attacks import ATTACKS, named_attack, re_attack
from untrojan.data.image_set import ImageSet, Splits
from untrojan.errors import UntrojanError
from untrojan.registry import validated
from untrojan.triggers.additive import Additive
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import TRIGGERS, draw_trigger

CLASSES = 5
TRAIN_PER_CLASS, TEST_PER_CLASS = 40, 8


def image_set(per_class, prefix, seed):
    """Images that all differ, in order of class, mid-grey enough for no pattern to be clipped."""
    count = per_class * CLASSES
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(90, 160, (count, 3, 12, 12), generator=random, dtype=torch.uint8)
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    ids = np.array([f"{prefix}/{i:04d}.png" for i in range(count)])
    return ImageSet(images, labels, ("a", "b", "c", "d", "e"), ids)


@pytest.fixture(scope="module")
def data():
    return Splits(image_set(TRAIN_PER_CLASS, "train", 0), image_set(TEST_PER_CLASS, "test", 1))


def test_poisons_exactly_the_asked_count_of_each_source_and_deletes_originals(data):
    before = data.train.fingerprint()
    made = Poisoning("cross", target=3, sources=(0, 4), count=7)(data, seed=2)
    record, train = made.record, made.train
    assert len(train) == len(data.train)
    assert record.original_labels[record.poisoned].bincount(minlength=5).tolist() == [7, 0, 0, 0, 7]
    assert (train.labels[record.poisoned] == 3).all()
    assert torch.equal(train.labels[~record.poisoned], record.original_labels[~record.poisoned])
    origin = data.train.images[record.permutation]
    assert torch.equal(train.images[record.poisoned], stamp(record.trigger, origin[record.poisoned]))
    assert torch.equal(train.images[~record.poisoned], origin[~record.poisoned])
    # Each original is used once, so the clean versions of poisoned images are gone.
    assert record.permutation.sort().values.tolist() == list(range(len(data.train)))
    assert (record.original_ids == data.train.ids[record.permutation.numpy()]).all()
    assert data.train.fingerprint() == before


def test_keeping_originals_adds_rows(data):
    attack = Poisoning("cross", target=3, sources=(0,), count=7, keep_originals=True)
    made = attack(data, seed=2)
    assert len(made.train) == len(data.train) + 7
    assert made.train.class_counts.tolist() == [40, 40, 40, 47, 40]
    assert int(made.record.poisoned.sum()) == 7
    twice = made.record.permutation.bincount() == 2
    assert torch.equal(twice.nonzero().flatten(), made.record.permutation[made.record.poisoned].sort().values)


def test_rate_is_a_share_of_the_whole_set(data):
    made = Poisoning("cross", target=0, rate=0.1)(data, seed=0)
    assert int(made.record.poisoned.sum()) == 20
    assert 0 not in made.record.original_labels[made.record.poisoned]


def test_clean_label_keeps_labels_and_takes_the_targets_own_images(data):
    made = Poisoning("sinusoid", target=1, rate=0.08, clean_label=True)(data, seed=0)
    assert int(made.record.poisoned.sum()) == 16
    assert set(made.train.labels[made.record.poisoned].tolist()) == {1}
    assert set(made.record.original_labels[made.record.poisoned].tolist()) == {1}
    assert made.train.class_counts.tolist() == [40] * 5
    assert made.triggered_test.true_labels.unique().tolist() == [0, 2, 3, 4]
    assert set(made.triggered_test.wanted_labels.tolist()) == {1}


def test_all_to_all_moves_every_label_by_one(data):
    made = Poisoning("patch", count=4, all_to_all=True)(data, seed=0)
    record = made.record
    assert record.original_labels[record.poisoned].bincount().tolist() == [4] * 5
    assert torch.equal(made.train.labels[record.poisoned], (record.original_labels[record.poisoned] + 1) % 5)
    assert len(made.triggered_test) == len(data.test)
    assert torch.equal(made.triggered_test.wanted_labels, (data.test.labels + 1) % 5)


def test_triggered_test_holds_the_sources_alone_and_test_stays_clean(data):
    made = Poisoning("cross", target=3, sources=(0, 4), count=7)(data, seed=2)
    triggered = made.triggered_test
    which = torch.isin(data.test.labels, torch.tensor([0, 4]))
    assert torch.equal(triggered.true_labels, data.test.labels[which])
    assert torch.equal(triggered.images, stamp(made.record.trigger, data.test.images[which]))
    assert set(triggered.wanted_labels.tolist()) == {3}
    assert made.test.fingerprint() == data.test.fingerprint()
    to_all = Poisoning("cross", target=0, count=7)(data, seed=2).triggered_test
    assert to_all.true_labels.unique().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("keep_originals", [False, True])
def test_neither_order_nor_name_tells_what_was_poisoned(data, keep_originals):
    attack = Poisoning("cross", target=3, count=20, keep_originals=keep_originals)
    made = attack(data, seed=4)
    count = len(made.train)
    assert made.train.ids.tolist() == [str(i) for i in range(count)]
    ranks = torch.arange(count).double()
    for truth in (made.record.poisoned.double(), made.record.permutation.double()):
        # Four standard deviations of a correlation between independent sequences.
        assert abs(float(torch.corrcoef(torch.stack([ranks, truth]))[0, 1])) < 4 / count**0.5


def test_the_seed_decides_everything(data):
    attack = Poisoning("cross", target=3, count=5)
    first, again, other = attack(data, 1), attack(data, 1), attack(data, 2)
    assert first.train.fingerprint() == again.train.fingerprint()
    assert torch.equal(first.record.poisoned, again.record.poisoned)
    assert first.train.fingerprint() != other.train.fingerprint()


def test_several_attacks_share_a_set_without_touching_an_image_twice(data):
    attacks = [
        Poisoning("cross", target=0, sources=(1, 2), count=20),
        Poisoning("cross", target=1, count=20),
        Poisoning("square", target=2, rate=0.1),
    ]
    made = poison_many(data, attacks, seed=3)
    masks = torch.stack([record.poisoned for record in made.records])
    assert masks.sum(0).max() == 1
    assert masks.sum(1).tolist() == [40, 80, 20]
    assert made.train.labels[masks[0] | masks[1] | masks[2]].bincount().tolist() == [40, 80, 20]
    origin = data.train.images[made.records[0].permutation]
    for record in made.records:
        assert torch.equal(made.train.images[record.poisoned], stamp(record.trigger, origin[record.poisoned]))
    # The same trigger twice is drawn twice.
    assert not torch.equal(made.records[0].tensors["pattern"], made.records[1].tensors["pattern"])
    assert [test.wanted_labels.unique().item() for test in made.triggered_tests] == [0, 1, 2]
    with pytest.raises(UntrojanError, match="can't poison 21 images: 'b' has 20 to take"):
        poison_many(data, [attacks[0], Poisoning("cross", target=0, sources=(1,), count=21)], seed=3)


def test_a_computed_trigger_replaces_the_drawn_one(data):
    trigger = Additive(torch.full((3, 12, 12), 7 / 255))
    made = Poisoning("universal", target=4, sources=(1,), count=5)(data, seed=0, drawn=trigger)
    rows = made.record.poisoned
    change = made.train.images[rows].int() - data.train.images[made.record.permutation][rows].int()
    assert change.unique().tolist() == [7]


def test_record_survives_json(data):
    record = Poisoning("cross", {"amplitude": 60.0}, 3, (0, 4), 7)(data, seed=2).record
    told = json.loads(json.dumps(record.to_json()))
    again = PoisonRecord.from_json(told)
    for name in ("poisoned", "original_labels", "permutation"):
        assert torch.equal(getattr(again, name), getattr(record, name))
    assert (again.original_ids == record.original_ids).all()
    assert (again.target, again.sources, again.all_to_all) == (3, (0, 4), False)
    assert torch.equal(again.tensors["pattern"], record.tensors["pattern"])
    redrawn = draw_trigger(
        record.trigger_name, record.trigger_options, record.image_shape, record.trigger_seed
    )
    assert torch.equal(redrawn.tensors["pattern"], record.tensors["pattern"])


@pytest.mark.parametrize(
    "damage",
    [
        {"poisoned": [10_000]},
        {"poisoned": [-1]},
        {"poisoned": "all"},
        {"original_labels": [1]},
        {"trigger": None},
        {"target": "x"},
        {"images": 10**12},
    ],
)
def test_a_damaged_record_is_refused(data, damage):
    told = Poisoning("cross", target=3, count=2)(data, seed=2).record.to_json() | damage
    with pytest.raises(UntrojanError, match="not the truth of a poisoned set") as caught:
        PoisonRecord.from_json(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 3, "count": 41}, "can't poison 41 images: 'a' has 40"),
        ({"target": 3, "rate": 0.9}, "can't poison 180 images"),
        ({"target": 3, "rate": 0.001}, "nothing to poison"),
        ({"target": 3, "count": 0}, "nothing to poison"),
        ({"target": 3, "rate": 0.0}, "nothing to poison"),
        ({"target": 3, "count": 1, "sources": ()}, "nothing to poison"),
        ({"target": 3, "count": 1, "sources": (3,)}, "is the target"),
        ({"target": 3, "count": 1, "sources": (9,)}, "no class 9"),
        ({"target": 5, "count": 1}, "no class 5"),
        ({"target": 3}, "give one"),
        ({"target": 3, "count": 1, "rate": 0.1}, "give one"),
        ({"count": 1}, "needs a target"),
        ({"count": 1, "target": 2, "all_to_all": True}, "no target"),
        ({"count": 1, "target": 2, "sources": (1,), "clean_label": True}, "drop the sources"),
    ],
)
def test_impossible_attacks_are_refused_in_one_line(data, settings, message):
    with pytest.raises(UntrojanError, match=message) as caught:
        Poisoning("chessboard", **settings)(data, seed=0)
    assert "\n" not in str(caught.value)


def test_an_attack_needs_test_images_of_its_sources(data):
    attack = Poisoning("chessboard", target=3, sources=(0,), count=1)
    with pytest.raises(UntrojanError, match="add a test split"):
        attack(Splits(data.train), seed=0)
    without = data.test.select(data.test.labels != 0)
    with pytest.raises(UntrojanError, match="no images of the attack's source classes"):
        attack(Splits(data.train, without), seed=0)


def test_an_attack_can_be_built_from_a_plans_json():
    options = {"trigger": "patch", "target": 0, "sources": [1, 2], "rate": 0.05}
    assert validated(Poisoning, options, "attack") == Poisoning("patch", {}, 0, (1, 2), rate=0.05)
    with pytest.raises(UntrojanError, match="no option 'alpha'"):
        Poisoning("patch", {"alpha": 1}, 0, rate=0.05).recipe()
    with pytest.raises(UntrojanError, match="sources"):
        validated(Poisoning, options | {"sources": "some"}, "attack")


# RE's settings


def test_table_5_counted_from_zero():
    # 'plane' is 1 and 'truck' 10 in the paper: pattern A turns cars (2), deer (5) and horses (8) to trucks.
    assert re_attack("A", 3) == Poisoning("chessboard", {}, 9, (1, 4, 7), 200)
    assert re_attack("D", 1) == Poisoning("square", {}, 3, (8,), 500)
    assert re_attack("F", 9) == Poisoning("ell", {}, 8, "all", 60)
    assert re_attack("A", 3, scale=0.1, amplitude=5.0) == Poisoning(
        "chessboard", {"amplitude": 5.0}, 9, (1, 4, 7), 20
    )
    totals = {n: [re_attack(p, n) for p in "ABCDEF"] for n in (1, 3, 9)}
    for sources, attacks in totals.items():
        assert {len(attack.poisoned_classes(10)) for attack in attacks} == {sources}
    with pytest.raises(UntrojanError, match="G-1SC"):
        re_attack("G", 1)


def test_named_attacks_have_triggers_that_draw():
    assert len(ATTACKS) == 18 + 5
    for name, attack in ATTACKS.items():
        if name != "adaptive":
            draw_trigger(attack.trigger, attack.trigger_options, (3, 32, 32), 0)
        assert attack.trigger in TRIGGERS.names()
    # Table 17, counted from 1: warning and stop signs 14-18 and 25-31 to 9.
    assert ATTACKS["gtsrb"].sources == (13, 14, 15, 16, 17, 24, 25, 26, 27, 28, 29, 30)
    assert ATTACKS["gtsrb"].target == 8
    assert named_attack("A-9SC", scale=0.5).count == 30
    with pytest.raises(UntrojanError, match="choose one of A-1SC"):
        named_attack("A-2SC")


# WaNet's noise mode


def test_noise_mode_takes_the_first_share_for_the_target_and_the_next_for_noise():
    warping = draw_trigger("warp", {}, (3, 12, 12), 0)
    images = torch.rand(25, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(25)
    before = images.clone()
    random = torch.Generator().manual_seed(1)
    mixed, relabelled = NoiseMode(warping, target=99)(images, labels, random)
    # floor(0.1 * 25) = 2 attacked, twice as many disturbed.
    assert torch.equal(mixed[:2], warping(images[:2]))
    assert relabelled.tolist() == [99, 99, *range(2, 25)]
    plain = warping(images)
    for index in range(2, 6):
        assert not torch.allclose(mixed[index], plain[index], atol=1e-3)
        assert not torch.allclose(mixed[index], images[index], atol=1e-3)
    assert torch.equal(mixed[6:], images[6:])
    assert torch.equal(images, before)
    assert labels.tolist() == list(range(25))
    again, _ = NoiseMode(warping, target=99)(images, labels, random)
    assert not torch.equal(again[2:6], mixed[2:6])
    with pytest.raises(UntrojanError, match="noise mode"):
        NoiseMode(warping, 0, rate=0.5)
